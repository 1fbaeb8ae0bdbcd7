"""Examples: arrays by input, and what they are evidence of."""

import jax.numpy as jnp
import pytest

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.examples import Examples, evidence_in
from dfq_jax.types import InputContract, Tokens

IMAGE = InputContract(2, 3)


def test_inputs_are_split_together():
    ids = jnp.arange(20).reshape(5, 4)
    made = Examples((ids, -ids), (Tokens(4, 20), Tokens(4, 20)), {"n": 5}, "given")
    seen, held_out = made.split(2)
    assert (len(seen), len(held_out)) == (3, 2)
    assert all((a == b).all() for a, b in zip(held_out.arrays, (ids[3:], -ids[3:]), strict=True))
    assert held_out.given
    assert held_out.provenance == {"n": 5}
    assert repr(seen) == "<Examples: 3 of 4 tokens of 20, 4 tokens of 20, evidence: given>"
    with pytest.raises(UnsupportedModelError, match="not with 4 tokens of 20, 4 tokens"):
        _ = made.images


@pytest.mark.parametrize(
    "arrays", [(), (jnp.zeros((2, 2, 3, 3)),) * 2, (jnp.zeros((1, 4)), jnp.zeros((2, 4)))]
)
def test_arrays_that_are_not_those_of_the_inputs_are_refused(arrays):
    inputs = (IMAGE,) if len(arrays) != 2 or arrays[0] is arrays[1] else (Tokens(4, 9),) * 2
    with pytest.raises(UsageError, match="arrays of equal length, one for each; got"):
        Examples(arrays, inputs)


@pytest.mark.parametrize(
    ("method", "evidence", "guessed"),
    [
        ("noise", "noise", True),
        ("gzsq", "estimates", True),
        ("aac", "peaks", False),
        ("given", "given", False),
        ("best", "statistics", False),
        (None, "statistics", False),
    ],
)
def test_files_that_say_only_how_images_were_made(method, evidence, guessed):
    found = evidence_in({} if method is None else {"method": method})
    made = Examples((jnp.zeros((1, 2, 3, 3)),), (IMAGE,), evidence=found)
    assert (found, made.guessed, made.given) == (evidence, guessed, evidence == "given")
