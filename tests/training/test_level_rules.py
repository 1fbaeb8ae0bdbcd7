"""How tensors meet their levels, and the slopes that papers lend to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import PlanError
from dfq_jax.numerics.affine import Affine, Grid, from_range
from dfq_jax.numerics.basis import LearnedLevels
from dfq_jax.numerics.levels import affine_of, on_levels
from dfq_jax.training.level_rules import as_calibrated, clipped, learned_steps, min_max

GRID = Grid(3)
AFFINE = Affine(jnp.float32(0.5), jnp.uint8(0))
X = jnp.array([[-1.0, 0.3, 1.1, 9.0], [0.6, 2.2, 3.4, 4.0]], jnp.float32)


def through(rule, x, trained):
    now = rule.parameters(x, GRID, trained, AFFINE)
    return rule.snap(x, GRID, now)


@pytest.mark.parametrize("rule", [as_calibrated(), learned_steps(scaled=False), clipped()])
def test_values_are_those_of_the_levels(rule):
    trained = rule.begin(GRID, AFFINE)
    np.testing.assert_array_equal(through(rule, X, trained), on_levels(X, GRID, AFFINE))


def test_a_slope_of_one_everywhere():
    slope = jax.grad(lambda x: jnp.sum(through(as_calibrated(), x, None)))(X)
    np.testing.assert_array_equal(slope, np.ones_like(X))


def test_extremes_are_found_anew():
    x = jnp.linspace(-2, 3, 24).reshape(3, 8)
    grid = Grid(4, axis=-1)
    stale = from_range(jnp.zeros((1, 8)), jnp.ones((1, 8)), grid)
    found = affine_of(min_max().parameters(x, grid, None, stale))
    wanted = from_range(x.min(0, keepdims=True), x.max(0, keepdims=True), grid)
    np.testing.assert_array_equal(found.scale, wanted.scale)
    np.testing.assert_array_equal(found.zero_point, wanted.zero_point)
    assert min_max().parameters(None, grid, None, stale) is stale
    with pytest.raises(PlanError, match="no extremes"):
        min_max().parameters(x, LearnedLevels(2, "bits"), None, stale)


def lsq_by_hand(x, step, qmax):
    """Esser et al. 2020, Eq. 3, element by element."""
    v = x / step
    return np.where(v <= 0, 0.0, np.where(v >= qmax, qmax, np.round(v) - v))


@pytest.mark.parametrize("scaled", [True, False])
def test_lsq(scaled):
    rule = learned_steps(scaled=scaled, images=True)
    slope = jax.grad(lambda s: jnp.sum(through(rule, X, s)))(jnp.float32(0.5))
    wanted = lsq_by_hand(np.asarray(X), 0.5, 7).sum()
    factor = 1 / np.sqrt(4 * 7) if scaled else 1.0  # four values an image
    np.testing.assert_allclose(slope, wanted * factor, rtol=1e-5)


def test_lsq_of_kernels_counts_the_values_of_a_step():
    grid = Grid(3, axis=-1)
    affine = Affine(jnp.full((1, 4), 0.5), jnp.zeros((1, 4), jnp.uint8))
    rule = learned_steps()

    def total(s):
        return jnp.sum(rule.snap(X, grid, rule.parameters(X, grid, s, affine), 1.0))

    slope = jax.grad(total)(affine.scale)
    wanted = lsq_by_hand(np.asarray(X), 0.5, 7).sum(0) / np.sqrt(2 * 7)
    np.testing.assert_allclose(slope[0], wanted, rtol=1e-5)


def test_pact():
    """Choi et al. 2018, Eq. 3: the clip moves by what is beyond it, rounding by nothing."""
    slope = jax.grad(lambda s: jnp.sum(through(clipped(), X, s)))(jnp.float32(0.5))
    alpha = 7 * 0.5
    np.testing.assert_allclose(slope / 7, np.sum(np.asarray(X) >= alpha), rtol=1e-6)


def test_scales_stay_positive():
    now = affine_of(learned_steps().parameters(None, GRID, jnp.float32(-1.0), AFFINE))
    assert float(now.scale) > 0
