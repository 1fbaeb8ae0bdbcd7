"""Rounding by Gram matrices against NumPy in float64, and what must hold of it."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.affine import Grid, fake_quantize
from dfq_jax.numerics.ranges import Lp, weight_affine
from dfq_jax.numerics.second_order import (
    DAMPING,
    best_scale,
    damped,
    lattice,
    polished,
    rounded_in_order,
    transported,
)


def problem(inputs=24, outputs=10, bits=3, seed=0):
    """A layer behind correlated, rectified inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs)) / np.sqrt(inputs)
    x = np.maximum(rng.normal(size=(400, inputs)) @ mixing + 0.3, 0)
    w = rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    w, gram = (jnp.asarray(v, jnp.float32) for v in (w, x.T @ x / len(x)))
    grid = Grid(bits, axis=-1)
    return w, gram, lattice(weight_affine(w, grid, Lp(2.4)), grid, w.shape), x


def quadratic_error(codes, w, gram, scale):
    """`(s c - w)^T H (s c - w)` for each output."""
    gap = scale * codes - w
    return jnp.sum(gap * (gram @ gap), 0)


def by_hand(w, gram, grid):
    """OBQ in order of power, each time with the inverse of what is left, in float64."""
    w, gram = np.asarray(w, np.float64), np.asarray(gram, np.float64)
    order = np.argsort(-np.diag(gram), kind="stable")
    gram = gram + DAMPING * np.trace(gram) / len(gram) * np.eye(len(gram))
    w, found, left = w.copy(), np.zeros_like(w), list(order)
    scale = np.asarray(grid.scale, np.float64)
    while left:
        inverse = np.linalg.inv(gram[np.ix_(left, left)])
        i = left[0]
        code = np.clip(np.round(w[i] / scale), grid.low, grid.high)[0]
        error = (w[i] - code * scale[0]) / inverse[0, 0]
        w[left] -= np.outer(inverse[:, 0], error)
        found[i] = code
        left.pop(0)
    return found


def test_rounding_in_order_is_obq():
    w, gram, grid, _ = problem()
    found = np.asarray(rounded_in_order(w, gram, grid))
    assert np.mean(found == by_hand(w, gram, grid)) > 0.99  # but for ties in float32
    np.testing.assert_array_equal(found, np.round(found))
    assert np.all((found >= grid.low) & (found <= grid.high))


@pytest.mark.parametrize("seed", range(4))
def test_each_step_is_better_than_the_last(seed):
    w, gram, grid, x = problem(seed=seed)
    error = lambda codes, scale: float(jnp.sum(quadratic_error(codes, w, gram, scale)))
    plain = error(grid.nearest(w), grid.scale)
    obq = rounded_in_order(w, gram, grid)
    assert error(obq, grid.scale) < 0.7 * plain
    codes, scale = polished(obq, w, gram, grid)
    assert error(codes, scale) < 0.99 * error(obq, grid.scale)
    assert np.all((codes >= grid.low) & (codes <= grid.high))
    gap = x @ (np.asarray(scale * codes, np.float64) - np.asarray(w, np.float64))
    np.testing.assert_allclose(error(codes, scale), np.sum(gap**2) / len(x), rtol=1e-3)


def test_the_best_scale_is_that_of_least_squares():
    w, gram, grid, x = problem()
    codes = np.asarray(grid.nearest(w), np.float64)
    found = np.asarray(best_scale(jnp.asarray(codes, jnp.float32), w, gram))[0]
    for o in range(codes.shape[1]):
        rows, wanted = x @ codes[:, o], x @ np.asarray(w[:, o], np.float64)
        np.testing.assert_allclose(found[o], rows @ wanted / (rows @ rows), rtol=1e-3)


def test_polishing_finds_the_optimum_of_a_small_layer_more_often():
    """Eight inputs, one output: all 2^8 roundings enumerated, as the AdaRound card does."""
    ratios = []
    for seed in range(10):
        w, gram, grid, _ = problem(8, 1, seed=seed)
        floor = np.floor(np.asarray(w / grid.scale))[:, 0]
        errors = []
        for up in product((0, 1), repeat=8):
            codes = np.clip(floor + up, grid.low[0, 0], grid.high[0, 0])
            gap = codes * float(grid.scale[0, 0]) - np.asarray(w[:, 0], np.float64)
            errors.append(gap @ np.asarray(gram, np.float64) @ gap)
        codes = rounded_in_order(w, gram, grid)
        codes, _ = polished(codes, w, gram, grid, 1)
        found = float(quadratic_error(codes, w, gram, grid.scale)[0])
        plain = float(quadratic_error(grid.nearest(w), w, gram, grid.scale)[0])
        assert found <= plain * (1 + 1e-4)
        ratios.append(found / min(errors))
    assert np.median(ratios) < 1.2


def test_weights_for_quantized_inputs():
    """Against least squares in NumPy; with much damping they stay as they were."""
    w, _, _, x = problem()
    rough = np.round(x * 3) / 3
    gram, cross = (jnp.asarray(rough.T @ v / len(x), jnp.float32) for v in (rough, x))
    found = transported(w, gram, cross, 0.0)
    wanted = np.linalg.lstsq(rough, x @ np.asarray(w, np.float64), rcond=None)[0]
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    np.testing.assert_allclose(transported(w, gram, cross, 1e5), w, atol=1e-3)
    loss = lambda v: np.sum(
        (rough @ np.asarray(v, np.float64) - x @ np.asarray(w, np.float64)) ** 2
    )
    assert loss(found) < loss(w)


def test_dead_inputs_do_no_harm():
    w, gram, grid, _ = problem()
    gram = gram.at[3].set(0).at[:, 3].set(0)
    codes = rounded_in_order(w, gram, grid)
    codes, scale = polished(codes, w, gram, grid)
    assert jnp.isfinite(codes).all()
    assert jnp.isfinite(scale).all()
    assert jnp.isfinite(jnp.linalg.inv(damped(jnp.zeros((4, 4))))).all()
    assert jax.device_get(scale).min() > 0


@pytest.mark.parametrize("shape", [(24, 10), (2, 2, 6, 10)])
def test_scales_of_groups_are_those_of_their_rows(shape):
    """A weight has the scale of its input channel's group, whatever the rank of the kernel."""
    w, _, _, _ = problem()
    grid, kernel = Grid(3, axis=-1, group=3), w.reshape(shape)
    affine = weight_affine(kernel, grid, Lp(2.4))
    found = lattice(affine, grid, shape)
    assert found.scale.shape == w.shape
    want = fake_quantize(kernel, affine, grid).reshape(w.shape)
    np.testing.assert_allclose(found.nearest(w) * found.scale, want, rtol=1e-6)


def test_rounding_in_groups_makes_up_for_errors():
    w, gram, _, _ = problem()
    grid = Grid(3, axis=-1, group=6)
    cells = lattice(weight_affine(w, grid, Lp(2.4)), grid, w.shape)
    error = lambda codes: float(jnp.sum(quadratic_error(codes, w, gram, cells.scale)))
    ordered = rounded_in_order(w, gram, cells)
    codes, scale = polished(ordered, w, gram, cells, 2)
    np.testing.assert_array_equal(scale, cells.scale)
    assert error(codes) <= error(ordered) < 0.8 * error(cells.nearest(w))
    assert jnp.all((codes >= cells.low) & (codes <= cells.high))
