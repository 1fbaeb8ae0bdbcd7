import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.io.verification.layers import CodeGap, LayerCheck, gap, summary
from dfq_jax.numerics.affine import Affine, Grid
from dfq_jax.quantization.node_by_node import Batch

GRID = Grid(8)
AFFINE = Affine(jnp.float32(0.5), jnp.uint8(10))


def codes(x):
    return np.clip(np.round(np.asarray(x, np.float64) / 0.5) + 10, 0, 255)


def found(x, theirs, valid=None):
    x, theirs = np.asarray(x, np.float32), np.asarray(theirs, np.uint8)
    batch = Batch(jnp.zeros((len(x), 1, 1, 1)), len(x) if valid is None else valid)
    return gap(batch.counting(x), batch.counting(theirs), jax.device_get(AFFINE), GRID)


def test_gaps_against_numpy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 7)) * 30
    theirs = np.clip(codes(x) + rng.integers(-2, 3, x.shape), 0, 255)
    place = np.clip(x / 0.5 + 10, 0, 255)
    steps = np.abs(codes(x) - theirs)
    for valid in (6, 4):
        seen = found(x, theirs, valid)
        assert seen.steps == steps[:valid].max()
        assert seen.unequal == (steps[:valid] != 0).sum()
        beyond = np.maximum(np.abs(place - theirs) - 0.5, 0)[:valid].max()
        assert seen.beyond == pytest.approx(beyond, abs=1e-4)


def test_ties_are_told_from_faults():
    """A value half way between two codes may have either; another may not."""
    tie, other = 0.25, 0.35  # codes 10.5 and 10.7
    assert found([[tie]], [[10]]).beyond == found([[tie]], [[11]]).beyond == 0
    assert found([[other]], [[11]]).beyond == 0
    wrong = found([[other]], [[10]])
    assert (wrong.steps, wrong.unequal) == (1, 1)
    assert wrong.beyond == pytest.approx(0.2, abs=1e-5)


def test_beyond_the_range_all_is_one_code():
    assert found([[1e9, -1e9]], [[255, 0]]) == (0, 0, 0)
    assert found([[1e9, -1e9]], [[254, 0]]).beyond == pytest.approx(0.5)


def test_constants_have_one_row():
    batch = Batch(jnp.zeros((4, 1, 1, 1)), 1)
    x, theirs = np.ones((1, 3), np.float32), np.full((1, 3), 14, np.uint8)
    seen = gap(batch.counting(x), batch.counting(theirs), jax.device_get(AFFINE), GRID)
    assert seen.steps == 2


def test_batches_are_summed_up():
    batches = [
        [CodeGap(*g) for g in batch]
        for batch in (
            [(1, 3, 0.0), (0, 0, 0.0)],
            [(2, 1, 0.4), (1, 5, 0.01)],
        )
    ]
    assert summary(batches, np.array([8, 10])) == [
        pytest.approx((2, 0.5, 0.4)),
        pytest.approx((1, 0.5, 0.01)),
    ]
    assert summary([], np.array([8, 10])) == []


def test_without_the_integer_function_the_simulator_speaks():
    check = LayerCheck("a", 8, 1, None, 0.9, None, 10, 0.02, None)
    assert (check.steps, check.equal, check.beyond) == (1, 0.9, 0.02)
    both = LayerCheck("a", 8, 1, 2, 0.9, 0.8, 10, 0.02, 0.5)
    assert (both.steps, both.equal, both.beyond) == (2, 0.8, 0.5)
