from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import PlanError
from dfq_jax.numerics.affine import Affine, Grid, from_range
from dfq_jax.numerics.basis import LearnedLevels, fit_basis
from dfq_jax.numerics.levels import (
    QuantizedArray,
    multiplied_as_integers,
    on_levels,
    quantized,
    scales_of,
    with_scales,
)
from dfq_jax.numerics.ranges import Lp, MinMax, Percentile, weight_affine
from dfq_jax.numerics.signs import Alpha, Signs, best_alpha

NUMBERS = np.random.default_rng(0).normal(size=(3, 3, 10, 4)).astype(np.float32)
KERNEL = jnp.asarray(NUMBERS)
EVERY = [
    Grid(4),
    Grid(8, symmetric=True, axis=-1),
    Grid(3, axis=-1, group=4),
    Grid(8, symmetric=True, axis=-1, group=3),
    Grid(16, axis=-1),
    Signs(),
    Signs(axis=None),
    LearnedLevels(2, "signs", axis=-1),
    LearnedLevels(3, "signs"),
]
every_kind = pytest.mark.parametrize("levels", EVERY, ids=str)


def fitted(x, levels) -> Any:
    match levels:
        case Grid():
            return weight_affine(x, levels, MinMax())
        case Signs():
            return best_alpha(x, levels)
        case LearnedLevels(bits, kind):
            return fit_basis(levels.rows(x), bits, kind).basis
        case _:
            raise AssertionError(levels)


@pytest.fixture(scope="module")
def arrays():
    return {levels: quantized(KERNEL, levels, fitted(KERNEL, levels)) for levels in EVERY}


@every_kind
def test_values_of_codes_are_the_simulated_ones(arrays, levels):
    array = arrays[levels]
    assert array.codes.dtype == levels.dtype
    assert array.shape == KERNEL.shape
    values = array.dequantize()
    np.testing.assert_allclose(on_levels(KERNEL, levels, array.parameters), values, atol=1e-6)
    again = quantized(values, levels, array.parameters)
    np.testing.assert_array_equal(again.codes, array.codes)


@every_kind
def test_an_array_is_a_pytree(arrays, levels):
    array = arrays[levels]
    there = jax.jit(lambda a: a)(array)
    assert isinstance(there, QuantizedArray)
    assert there.levels == levels
    np.testing.assert_array_equal(there.dequantize(), array.dequantize())


@every_kind
def test_output_channels_can_be_taken_out(arrays, levels):
    array = arrays[levels]
    part = array.channels(slice(1, 3))
    assert part.shape == (3, 3, 10, 2)
    np.testing.assert_array_equal(part.dequantize(), array.dequantize()[..., 1:3])


@every_kind
def test_scales_have_gradients_and_zero_points_have_none(arrays, levels):
    array = arrays[levels]
    loss = lambda scales: jnp.sum(array.with_scales(scales).dequantize() ** 2) / 2
    slopes = jax.grad(loss)(array.scales)
    step = (
        jax.random.normal(jax.random.key(1), slopes.shape) * 1e-2 * jnp.mean(jnp.abs(array.scales))
    )
    ends = [loss(array.scales + sign * step) for sign in (1, -1)]
    np.testing.assert_allclose(jnp.sum(slopes * step), (ends[0] - ends[1]) / 2, rtol=2e-2)


@every_kind
def test_rounding_passes_gradients_within_the_range(arrays, levels):
    slopes = jax.grad(lambda x: jnp.sum(on_levels(x, levels, arrays[levels].parameters)))(KERNEL)
    assert np.all(np.isclose(slopes, 0) | np.isclose(slopes, 1))
    assert np.mean(slopes) > 0.4


def test_groups_are_kernels_of_their_own_whatever_is_left_over():
    grid = Grid(4, axis=-1, group=4)
    for observer in (MinMax(), Lp(2.4), Percentile(98.0)):
        whole = weight_affine(KERNEL, grid, observer)
        assert whole.scale.shape == whole.zero_point.shape == (1, 1, 3, 4)
        for number, rows in enumerate((slice(0, 4), slice(4, 8), slice(8, 10))):
            alone = weight_affine(KERNEL[:, :, rows], Grid(4, axis=-1), observer)
            np.testing.assert_allclose(whole.scale[:, :, number], alone.scale[:, :, 0], rtol=1e-6)
            np.testing.assert_array_equal(whole.zero_point[:, :, number], alone.zero_point[:, :, 0])


def test_grouped_values_against_numpy():
    grid = Grid(4, axis=-1, group=4)
    found = quantized(KERNEL, grid, weight_affine(KERNEL, grid, MinMax()))
    truth = np.empty_like(NUMBERS)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        part = NUMBERS[:, :, rows].astype(np.float64)
        low, high = np.minimum(part.min((0, 1, 2)), 0), np.maximum(part.max((0, 1, 2)), 0)
        scale = (high - low) / 15
        point = np.round(-low / scale)
        truth[:, :, rows] = (np.clip(np.round(part / scale) + point, 0, 15) - point) * scale
    np.testing.assert_allclose(found.dequantize(), truth, atol=1e-5)


def test_signs_against_numpy():
    kernel = NUMBERS.copy()
    kernel[0, 0, 0, 0] = 0.0
    found = quantized(jnp.asarray(kernel), Signs(), best_alpha(jnp.asarray(kernel), Signs()))
    truth = np.where(kernel < 0, -1, 1) * np.abs(kernel).mean((0, 1, 2))
    np.testing.assert_allclose(found.dequantize(), truth, rtol=1e-5)
    assert set(np.unique(found.codes)) == {-1, 1}


def test_the_best_alpha_leaves_the_least_error():
    alpha = best_alpha(KERNEL, Signs()).scale
    error = lambda a: jnp.sum((KERNEL - on_levels(KERNEL, Signs(), Alpha(a))) ** 2)
    assert all(error(alpha) < error(alpha * f) for f in (0.98, 1.02))


def test_integers_multiply_grids_of_a_byte_and_signs():
    assert [multiplied_as_integers(levels) for levels in EVERY] == [
        *(True, True, False, False, False),
        *(True, True, False, False),
    ]


def test_parameters_of_another_kind_are_refused():
    affine = from_range(jnp.float32(-1), jnp.float32(1), Grid(4))
    with pytest.raises(PlanError, match=r"Signs\(axis=-1\) have no parameters like Affine"):
        quantized(KERNEL, Signs(), affine)


def test_scales_stand_apart_from_what_is_not_trained():
    affine = from_range(jnp.float32(-1), jnp.float32(2), Grid(4))
    assert scales_of(affine) is affine.scale
    moved = with_scales(affine, affine.scale * 2)
    assert isinstance(moved, Affine)
    assert moved.zero_point is affine.zero_point


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"bits": 9}, "2 <= bits <= 8, got 9; the only wider one has 16"),
        ({"bits": 4, "group": 0, "axis": -1}, "groups of at least 1 and axis -1"),
        ({"bits": 4, "group": 8}, "axis None"),
    ],
)
def test_grids_there_are_none_of(grid, told):
    with pytest.raises(ValueError, match=told):
        Grid(**grid)
