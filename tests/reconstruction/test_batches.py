"""Batches are the same whether images lie on the device or are fed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.reconstruction.batches import MOST_STEPS, Rows, drawn, read_rows, supply


@pytest.fixture(scope="module")
def rows():
    images: Any = np.random.default_rng(0).normal(size=(24, 5, 4, 3)).astype(np.float32)
    return Rows(images, images + 1, images[:, :2] + 2, logits=images[:, 0, :, 0])


def read_of(given, step, length):
    """What some steps read."""
    fed = given.feed(step, length)
    at = lambda i: jax.tree.map(lambda v: jnp.asarray(v)[i], fed)
    return [read_rows(given.resident, at(i)) for i in range(length)]


def test_both_ways_read_the_same(rows):
    ways = [supply(rows, 8, 3, memory) for memory in (0, rows.nbytes)]
    assert [w.resident is None for w in ways] == [True, False]
    for step in (0, 4):
        for fed, resident in zip(*(read_of(w, step, 3) for w in ways), strict=True):
            for a, b in zip(jax.tree.leaves(fed), jax.tree.leaves(resident), strict=True):
                np.testing.assert_array_equal(a, b)


def test_rows_of_earlier_steps_survive_later_ones(rows):
    given = supply(rows, 8, 3, 0)
    first: Any = given.feed(0, 2)
    before = np.array(first.exact)
    given.feed(2, 2)
    np.testing.assert_array_equal(first.exact, before)


def test_rows_of_an_image_stay_together(rows):
    for entry in read_of(supply(rows, 8, 3, 0), 0, 4):
        np.testing.assert_array_equal(entry.rough, entry.exact + 1)
        np.testing.assert_array_equal(entry.targets, entry.exact[:, :2] + 2)


def test_draws_depend_on_the_step_only():
    whole = drawn(24, 8, 3, 0, 6)
    np.testing.assert_array_equal(drawn(24, 8, 3, 2, 3), whole[2:5])
    assert all(len(set(step)) == 8 for step in whole)
    assert len({tuple(step) for step in whole}) == 6
    assert drawn(4, 30, 3, 0, 1).shape == (1, 30)  # more than there are


def test_chunks_fit_into_memory(rows):
    each = 8 * rows.nbytes // 24
    for memory, steps in ((0, 1), (each, 1), (2 * each + 1, 2), (10**12, MOST_STEPS)):
        assert supply(rows, 8, 3, memory).chunk == steps


def test_numbers_without_images_are_refused():
    with pytest.raises(ValueError, match="no images lie on the device"):
        read_rows(None, jnp.zeros(3, jnp.int32))
