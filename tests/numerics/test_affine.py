from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq_jax.numerics import affine as module
from dfq_jax.numerics.affine import (
    BIAS_LIMIT,
    DEAD_SCALE,
    Affine,
    Grid,
    Steps,
    bias_scale,
    covers,
    dequantize,
    fake_quantize,
    from_range,
    guard_bias_overflow,
    nearest_values,
    quantize,
    quantize_bias,
    round_ste,
    steps_of,
)

GRIDS = [Grid(2), Grid(4), Grid(8), Grid(3, symmetric=True), Grid(8, symmetric=True)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
examples = settings(deadline=None, max_examples=40, derandomize=True)

ends = st.one_of(
    st.sampled_from([0.0, 1e-45, 1e-40, 1e-30, 1e-13, 1e-6, 1.0, 1e30]),
    st.floats(0, 2.0**99, width=32),
    st.floats(0, 10, width=32),
)
values = st.lists(st.floats(-20, 20, width=32), min_size=16, max_size=16)

ranged = jax.jit(from_range, static_argnames="grid")
coded = jax.jit(quantize, static_argnames="grid")
snapped = jax.jit(fake_quantize, static_argnames="grid")
valued = jax.jit(dequantize)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def test_worked_example():
    grid = Grid(4)
    affine = from_range(f32(-1), f32(2), grid)
    x = f32([-1, -0.27, 0, 0.2, 0.65, 2])
    assert float(affine.scale) == pytest.approx(0.2)
    assert int(affine.zero_point) == 5
    codes = quantize(x, affine, grid)
    assert codes.tolist() == [0, 4, 5, 6, 8, 15]
    assert codes.dtype == np.uint8
    wanted = [-1, -0.2, 0, 0.2, 0.6, 2]
    np.testing.assert_allclose(dequantize(codes, affine), wanted, rtol=1e-6)
    np.testing.assert_allclose(fake_quantize(x, affine, grid), wanted, rtol=1e-6)


def test_symmetric_grid_is_narrow():
    grid = Grid(8, symmetric=True)
    assert (grid.qmin, grid.qmax, grid.dtype) == (-127, 127, np.int8)
    affine = from_range(f32(-254), f32(100), grid)
    assert (float(affine.scale), int(affine.zero_point)) == (2, 0)
    assert quantize(f32([-1000, -254, 3.1, 1000]), affine, grid).tolist() == [-127, -127, 2, 127]
    assert [float(v) for v in covers(affine, grid)] == [-254, 254]


def test_ties_round_to_even():
    one = Affine(f32(1), jnp.uint8(10))
    x = f32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, one, Grid(8)).tolist() == [8, 8, 10, 10, 12, 12]


def test_zero_is_always_inside():
    """A range on one side of zero is extended to it."""
    for lo, hi in [(3.0, 6.0), (-6.0, -3.0)]:
        affine = from_range(f32(lo), f32(hi), Grid(2))
        assert float(affine.scale) == 2
        assert int(affine.zero_point) == (0 if lo > 0 else 3)


@pytest.mark.parametrize("bits", [1, 9])
def test_grid_needs_possible_bits(bits):
    with pytest.raises(ValueError, match=f"a grid needs 2 <= bits <= 8, got {bits}"):
        Grid(bits)


def test_reduced_axes():
    assert Grid(8).reduced_axes(3) == (0, 1, 2)
    assert Grid(8, axis=-1).reduced_axes(4) == (0, 1, 2)
    assert Grid(8, axis=1).reduced_axes(3) == (0, 2)


@pytest.mark.parametrize("grid", [Grid(8), Grid(3), Grid(8, symmetric=True)], ids=str)
def test_ranges_of_numpy_stay_in_numpy_bit_by_bit(grid):
    for lo, hi in np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32):
        ours, theirs = from_range(lo, hi, grid), from_range(f32(lo), f32(hi), grid)
        for a, b in zip(ours, theirs, strict=True):
            assert isinstance(a, np.ndarray | np.generic)
            assert (a.dtype, a) == (b.dtype, np.asarray(b))


@every_grid
@examples
@given(below=ends, above=ends)
def test_any_range_gives_a_sound_scale(grid, below, above):
    affine = ranged(f32(-below), f32(above), grid)
    scale, zero_point = float(affine.scale), int(affine.zero_point)
    assert 0 < scale < np.inf
    assert affine.scale.dtype == np.float32
    assert affine.zero_point.dtype == grid.dtype
    assert grid.qmin <= zero_point <= grid.qmax
    step = max(below, above) / grid.qmax if grid.symmetric else (below + above) / grid.qmax
    if step > 2e-12:
        assert scale == pytest.approx(step, rel=1e-5)
        lo, hi = (float(v) for v in covers(affine, grid))
        assert lo <= -below + (0.5 + 1e-4) * scale
        assert hi >= above - (0.5 + 1e-4) * scale
    elif step < 0.5e-12:
        assert scale == np.float32(DEAD_SCALE)


@pytest.mark.parametrize("end", [1.25, 0.63, 2.51])
def test_what_is_nearly_a_tie_has_one_code_in_every_program(end):
    """Half a step from a code, a division and a product with the reciprocal round apart."""
    grid = Grid(8)
    affine = ranged(f32(-end), f32(end), grid)
    x = f32([0] * 15 + [end])
    in_numpy = quantize(np.asarray(x), Affine(*map(np.asarray, affine)), grid)
    np.testing.assert_array_equal(coded(x, affine, grid), in_numpy)
    np.testing.assert_array_equal(snapped(x, affine, grid), valued(in_numpy, affine))
    np.testing.assert_array_equal(fake_quantize(x, affine, grid), valued(in_numpy, affine))


@every_grid
@examples
@given(xs=values, below=st.floats(0.125, 8, width=32), above=st.floats(0, 8, width=32))
def test_laws_of_fake_quantization(grid, xs, below, above):
    affine = ranged(f32(-below), f32(above), grid)
    x = f32(xs)
    y = np.asarray(snapped(x, affine, grid))
    codes = np.asarray(coded(x, affine, grid))
    scale = float(affine.scale)
    lo, hi = (float(v) for v in covers(affine, grid))
    np.testing.assert_array_equal(snapped(f32(y), affine, grid), y)  # idempotent
    np.testing.assert_array_equal(valued(jnp.asarray(codes), affine), y)
    inside = (np.asarray(xs) >= lo) & (np.asarray(xs) <= hi)
    assert np.all(np.abs(y - xs)[inside] <= scale * (0.5 + 1e-4))
    outside = np.clip(xs, lo, hi)
    np.testing.assert_allclose(y[~inside], outside[~inside], rtol=1e-6)
    assert codes.min() >= grid.qmin
    assert codes.max() <= grid.qmax
    assert float(snapped(f32(np.zeros(16)), affine, grid)[0]) == 0


@every_grid
def test_no_more_values_than_codes(grid):
    affine = from_range(f32(-0.7), f32(1.3), grid)
    y = fake_quantize(jnp.linspace(-3, 3, 5001, dtype=jnp.float32), affine, grid)
    assert len(np.unique(y)) == grid.qmax - grid.qmin + 1


def test_channels_do_not_see_each_other():
    grid = Grid(4, axis=-1)
    rng = np.random.default_rng(0)
    x = f32(rng.normal(size=(3, 5, 4)) * [0.1, 1, 10, 100])
    lo, hi = jnp.min(x, (0, 1), keepdims=True), jnp.max(x, (0, 1), keepdims=True)
    together = fake_quantize(x, from_range(lo, hi, grid), grid)
    for c in range(4):
        alone = from_range(lo[0, 0, c], hi[0, 0, c], grid)
        apart = fake_quantize(x[..., c], alone, grid)
        np.testing.assert_allclose(together[..., c], apart, rtol=1e-6)


def test_gradients_are_clipped_straight_through_and_lsq():
    grid = Grid(3)
    affine = Affine(f32(0.5), jnp.uint8(2))  # covers -1 .. 2.5
    x = np.array([-9, -1.1, -1, -0.9, 0.1, 0.6, 2.4, 2.5, 2.6, 7], np.float32)
    by_x = jax.grad(lambda x: fake_quantize(x, affine, grid).sum())(f32(x))
    assert by_x.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    by_scale = jax.vmap(
        jax.grad(lambda s, x: fake_quantize(x, affine._replace(scale=s), grid)), (None, 0)
    )(affine.scale, f32(x))
    v = x / 0.5
    wanted = np.where(v < -2, -2, np.where(v > 5, 5, np.round(v) - v))
    np.testing.assert_allclose(by_scale, wanted, atol=1e-6)


def test_rounding_passes_gradients_on():
    x = f32([-1.5, 0.2, 2.5])
    assert round_ste(x).tolist() == [-2, 0, 2]
    assert jax.grad(lambda x: jnp.sum(round_ste(x) * f32([1, 2, 3])))(x).tolist() == [1, 2, 3]


def test_bias_codes():
    rng = np.random.default_rng(0)
    bias, scales = rng.normal(size=6), rng.uniform(1e-4, 1e-2, 6)
    kernel_scale = f32(scales).reshape(1, 1, 1, 6)
    together = bias_scale(f32(0.05), kernel_scale)
    np.testing.assert_array_equal(together, np.float32(0.05) * scales.astype(np.float32))
    codes = np.asarray(quantize_bias(f32(bias), f32(0.05), kernel_scale))
    assert codes.dtype == np.int32
    assert np.all(np.abs(codes - bias / (0.05 * scales)) <= 0.5 + 1e-6 * np.abs(codes))
    huge = quantize_bias(f32([1e30, -1e30]), f32(1), f32([[1, 1]]))
    assert huge.tolist() == [BIAS_LIMIT, -BIAS_LIMIT]


def test_guard_raises_only_scales_that_would_overflow():
    scale = f32([1e-12, 1e-3, 1e-12]).reshape(1, 1, 1, 3)
    bias, step = f32([8, 8, 0]), f32(0.01)
    guarded = guard_bias_overflow(scale, step, bias)
    assert guarded.shape == scale.shape
    np.testing.assert_allclose(guarded.ravel(), [8 / (0.01 * 2**30), 1e-3, 1e-12], rtol=1e-6)

    def stored(scale):
        codes = np.asarray(quantize_bias(bias, step, scale))
        assert np.abs(codes).max() <= 2**30
        return codes * np.asarray(bias_scale(step, scale))

    np.testing.assert_allclose(stored(guarded), bias, rtol=1e-6)
    assert stored(scale)[0] < 0.1  # what the guard prevents


def test_one_program_serves_grids_of_any_bits():
    x = jax.random.normal(jax.random.key(0), (64,))
    run = jax.jit(chex.assert_max_traces(module.snapped, n=1))
    for grid in (Grid(b, symmetric=symmetric) for b in range(2, 9) for symmetric in (True, False)):
        affine = from_range(jnp.min(x) / 2, jnp.max(x) / 2, grid)
        codes = np.round(np.asarray(x) / np.asarray(affine.scale)) + float(affine.zero_point)
        truth = (np.clip(codes, grid.qmin, grid.qmax) - float(affine.zero_point)) * affine.scale
        np.testing.assert_allclose(run(x, module.steps_of(affine, grid)), truth, rtol=1e-6)


def test_gradients_of_a_traced_grid_are_those_of_straight_through_rounding():
    """Against autodiff of the same formula with `round_ste`, scale, low and high per channel."""
    rng = np.random.default_rng(0)
    x, slope = f32(rng.normal(size=(50, 3)) * 4), f32(rng.normal(size=(50, 3)))
    steps = Steps(f32([[0.5, 1.0, 2.0]]), f32([[-2.0, 0.0, -1.0]]), f32([[1.0, 3.0, 2.0]]))

    def plain(x, steps):
        wanted = x / steps.scale
        low = jnp.where(wanted < steps.low, steps.low, wanted)
        return round_ste(jnp.where(wanted > steps.high, steps.high, low)) * steps.scale

    for grid in (steps, Steps(f32(0.7), f32(-2.0), f32(3.0))):  # one scale for all, too
        truth, pull = jax.vjp(plain, x, grid)
        found, back = jax.vjp(module.snapped, x, grid)
        np.testing.assert_allclose(found, truth, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(back(slope)), jax.tree.leaves(pull(slope)), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (3, 3, 5, 1), (6, 9)], ids=str)
def test_numpy_gives_the_bits_of_xla(shape, symmetric, axis):
    rng = np.random.default_rng(1)
    x, grid = rng.normal(size=shape).astype(np.float32), Grid(5, symmetric, axis=axis)
    axes = grid.reduced_axes(len(shape))
    affine = ranged(0.7 * x.min(axes, keepdims=True), 0.7 * x.max(axes, keepdims=True), grid=grid)
    host = jax.device_get(affine)
    bias, data = rng.normal(size=shape[-1]).astype(np.float32) * 100, np.asarray(np.float32(0.013))
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (lambda x, a: quantize(x, a, grid), (x,)),
        (lambda x, a: nearest_values(x, steps_of(a, grid)), (x,)),
        (lambda b, x, a: quantize_bias(b, x, a.scale), (bias, data)),
        (lambda b, x, a: guard_bias_overflow(a.scale, x, b), (bias * np.float32(1e8), data)),
    ]
    for function, arguments in cases:
        ours, theirs = function(*arguments, host), jax.jit(function)(*arguments, affine)
        assert isinstance(ours, np.ndarray)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
