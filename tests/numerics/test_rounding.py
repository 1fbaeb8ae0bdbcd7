"""Learned rounding against the formulas of the papers, in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dfq_jax.numerics.affine import Affine, Grid, dequantize, fake_quantize, quantize
from dfq_jax.numerics.ranges import Lp, weight_affine
from dfq_jax.numerics.rounding import (
    adaround,
    flexround,
    indecision,
    logit,
    nearest,
    rescaled,
    soft_bit,
)

WAYS = {
    "nearest": nearest(),
    "adaround": adaround(),
    "genie_m": adaround(scale=True),
    "flexround": flexround(),
    "rescaled": rescaled(),
}
GRIDS = (Grid(2, axis=-1), Grid(4, axis=-1), Grid(8, symmetric=True, axis=-1))


def kernel_on(grid):
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 6))
    return kernel, weight_affine(kernel, grid, Lp(2.4))


def codes(kernel, affine, grid):
    """Whole numbers `q - z` of a kernel that lies on its grid."""
    exact = Affine(jnp.ones_like(affine.scale), affine.zero_point)
    return dequantize(quantize(kernel, affine, grid), exact)


def test_soft_bits_of_the_card():
    """AdaRound card: fractions, the variables that give them, and back."""
    fractions = jnp.array([0, 0.1, 0.5, 0.9, 0.999])
    wanted = [-2.3979, -1.6094, 0, 1.6094, 2.3870]
    np.testing.assert_allclose(logit(fractions), wanted, atol=2e-4)
    np.testing.assert_allclose(soft_bit(logit(fractions)), fractions, atol=1e-6)


def test_indecision_of_the_card():
    h = jnp.array([0.5, 0.6, 0.8, 0.9, 0.99])
    wanted = [1, 1, 0.99996, 0.98847, 0.33239]
    np.testing.assert_allclose(indecision(h, jnp.float32(20)), wanted, atol=2e-5)
    wanted = [1, 0.96, 0.64, 0.36, 0.0396]
    np.testing.assert_allclose(indecision(h, jnp.float32(2)), wanted, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["adaround", "genie_m"])
def test_soft_kernels_begin_as_the_float_one_within_the_grid(name, grid):
    kernel, affine = kernel_on(grid)
    trained, fixed = WAYS[name].init(kernel, affine, grid)
    zero = np.asarray(affine.zero_point, np.float64)
    low, high = ((end - zero) * affine.scale for end in (grid.qmin, grid.qmax))
    soft = WAYS[name].soft(trained, fixed, grid)
    np.testing.assert_allclose(soft, np.clip(kernel, low, high), atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_hard_kernels_begin_as_the_nearest_and_stay_on_their_grid(name, grid):
    kernel, affine = kernel_on(grid)
    way = WAYS[name]
    trained, fixed = way.init(kernel, affine, grid)
    found, hard = way.hard(trained, fixed, grid)
    np.testing.assert_allclose(hard, fake_quantize(kernel, affine, grid), atol=1e-6)
    moved = jax.tree.map(lambda v: v + 0.1 * jax.random.normal(jax.random.key(1), v.shape), trained)
    if "scale" in moved:
        moved |= {"scale": trained["scale"] * 1.1}
    found, hard = way.hard(moved, fixed, grid)
    np.testing.assert_allclose(hard, fake_quantize(hard, found, grid), atol=1e-6)
    assert quantize(hard, found, grid).dtype == grid.dtype
    whole = np.asarray(codes(hard, found, grid))
    np.testing.assert_allclose(whole * np.asarray(found.scale), hard, atol=1e-6)


def test_adaround_keeps_to_the_two_nearest_codes():
    kernel, affine = kernel_on(Grid(4, axis=-1))
    trained, fixed = WAYS["adaround"].init(kernel, affine, Grid(4, axis=-1))
    wild = {"bits": 9 * jax.random.normal(jax.random.key(2), kernel.shape)}
    _, hard = WAYS["adaround"].hard(wild, fixed, Grid(4, axis=-1))
    steps = np.asarray(kernel / affine.scale)
    zero = np.asarray(affine.zero_point, np.float64)
    either = [np.clip(f(steps), -zero, 15 - zero) for f in (np.floor, np.ceil)]
    taken = np.round(np.asarray(hard / affine.scale))
    assert np.all((taken == either[0]) | (taken == either[1]))
    assert np.any(taken != np.round(np.clip(steps, -zero, 15 - zero)))
    assert set(trained) == {"bits"}


def test_the_gradient_by_the_scale_is_the_code():
    """GENIE-M: the floor is a constant, so `d w / d s = clip(B + h + z) - z`."""
    grid, way = Grid(3, axis=-1), WAYS["genie_m"]
    kernel, affine = kernel_on(grid)
    trained, fixed = way.init(kernel, affine, grid)
    picked = jax.random.normal(jax.random.key(3), kernel.shape)
    slope = jax.grad(lambda s: jnp.sum(picked * way.soft({**trained, "scale": s}, fixed, grid)))
    zero = np.asarray(affine.zero_point, np.float64)
    code = np.clip(np.floor(kernel / affine.scale) + soft_bit(trained["bits"]), -zero, 7 - zero)
    wanted = np.sum(np.asarray(picked, float) * code, axis=(0, 1, 2), keepdims=True)
    np.testing.assert_allclose(slope(trained["scale"]), wanted, rtol=1e-4, atol=1e-4)


def test_rescaled_codes_stay():
    """Whatever the scale becomes; its gradient is the code, a whole number."""
    grid, way = Grid(3, axis=-1), WAYS["rescaled"]
    kernel, affine = kernel_on(grid)
    trained, fixed = way.init(kernel, affine, grid)
    assert set(trained) == {"scale"}
    found, hard = way.hard({"scale": trained["scale"] * 1.7}, fixed, grid)
    before = codes(fake_quantize(kernel, affine, grid), affine, grid)
    np.testing.assert_array_equal(codes(hard, found, grid), before)
    np.testing.assert_allclose(found.scale, affine.scale * 1.7, rtol=1e-6)
    slope = jax.grad(lambda s: jnp.sum(kernel * way.soft({"scale": s}, fixed, grid)))
    wanted = np.sum(np.asarray(kernel, float) * before, axis=(0, 1, 2), keepdims=True)
    np.testing.assert_allclose(slope(trained["scale"]), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_soft_bits():
    grid, way = Grid(4, axis=-1), WAYS["genie_m"]
    kernel, affine = kernel_on(grid)
    trained, fixed = way.init(kernel, affine, grid)
    inner = {**trained, "bits": jnp.clip(trained["bits"], -2, 2)}
    check_grads(
        jax.jit(lambda t: way.soft(t, fixed, grid)), (inner,), order=1, modes=["rev"], rtol=1e-2
    )


def test_flexround_by_hand():
    """Codes move by more than one where the divisor says so, and the gradient grows with `w`."""
    grid, way = Grid(4, axis=-1), WAYS["flexround"]
    kernel = jnp.array([[0.8, -0.3]])
    affine = Affine(jnp.full((1, 2), 0.1), jnp.full((1, 2), 8, jnp.uint8))
    trained, fixed = way.init(kernel, affine, grid)
    np.testing.assert_allclose(way.soft(trained, fixed, grid), [[0.7, -0.3]], atol=1e-6)
    moved = {**trained, "divisor": jnp.log(jnp.array([[2.0, 0.5]]))}
    np.testing.assert_allclose(way.soft(moved, fixed, grid), [[0.4, -0.6]], atol=1e-6)
    moved |= {"divisor_in": jnp.log(jnp.array([[2.0]]))}
    np.testing.assert_allclose(way.soft(moved, fixed, grid), [[0.2, -0.3]], atol=1e-6)
    slope = jax.grad(lambda d: jnp.sum(way.soft({**trained, "divisor": d}, fixed, grid)))
    inside = jnp.array([[0.6, -0.3]])
    found = slope(jnp.zeros((1, 2)))
    assert found[0, 0] == 0  # beyond the grid
    trained, fixed = way.init(inside, affine, grid)
    slope = jax.grad(lambda d: jnp.sum(way.soft({**trained, "divisor": d}, fixed, grid)))
    np.testing.assert_allclose(slope(jnp.zeros((1, 2))), -inside, atol=1e-6)


def test_who_penalises_indecision():
    for name, way in WAYS.items():
        trained, _ = way.init(*kernel_on(GRIDS[1]), GRIDS[1])
        found = float(way.undecided(trained, jnp.float32(20.0)))
        assert (found > 0) == (name in ("adaround", "genie_m"))
