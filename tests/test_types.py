"""Inputs of networks: shapes, examples, refusals."""

import dataclasses

import jax
import numpy as np
import pytest

from dfq_jax.io.frontends.normalisation import assumptions
from dfq_jax.types import InputContract, Tokens, Values

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "read",
    [InputContract(2, 3), Tokens(5, 7), Tokens(5, mask=True, symbol="T"), Values((2, 6), 0.5, 4.0)],
    ids=str,
)
def test_examples_have_the_shape_and_type_that_is_stated(read):
    found = read.example(KEY, 3)
    assert found.shape == (3, *read.shape)
    assert found.dtype == read.dtype
    assert not np.array_equal(found, read.example(jax.random.key(1), 3)) or read == Tokens(
        5, mask=True, symbol="T"
    )


def test_examples_stay_in_range():
    contract = InputContract(8, 8, (0.5, 0.25, 0.5), (0.25, 0.5, 1.0))
    pixels = np.asarray(contract.example(KEY, 4), np.float64)
    pixels = (pixels * contract.std + contract.mean) * 255
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-4)
    assert (np.rint(pixels).min(), np.rint(pixels).max()) == (0, 255)
    ids = np.asarray(Tokens(200, 5).example(KEY, 4))
    assert set(ids.flat) == set(range(5))
    values = np.asarray(Values((400,), -3.0, 1.0).example(KEY, 1))
    assert -3 <= values.min() < -2.9
    assert 0.9 < values.max() <= 1


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Tokens(0, 5), "a length of 1 or more"),
        (lambda: Tokens(3, 1), "2 ids or more"),
        (lambda: Tokens(3, 9, mask=True), "2 for a mask"),
        (lambda: Values((3, 0)), "positive sizes"),
        (lambda: Values((3,), 1.0, 1.0), "needs a range"),
        (lambda: Values((3,), 0.0, float("inf")), "needs a range"),
    ],
)
def test_inputs_that_nothing_satisfies_are_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize(
    ("contract", "told"),
    [
        (InputContract(4, 4, (0.5,), (0.25,)), "(pixel/255 - (0.5)) / (0.25)"),
        (InputContract(1, 900, (0.5,), (0.5,)), "values from -1 to 1"),
        (InputContract(1, 1, (0.5,) * 999, (0.25,) * 999), "values from -2 to 2"),
        (InputContract(8, 8, (0.0,) * 5, (1.0,) * 5), "values from 0 to 1"),
    ],
)
def test_what_is_no_picture_has_values_and_no_pixels(contract, told):
    """Nine hundred channels are not listed, and sound is not divided by 255."""
    assert contract.normalised == told
    assert contract.is_picture == told.startswith("(pixel")
    notes = assumptions(dataclasses.replace(contract, assumed=True))
    assert ("images are normalised" in notes[0]) == contract.is_picture
    assert len(notes[0]) < 300
