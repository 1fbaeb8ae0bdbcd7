"""The parts of a method of reconstruction."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.reconstruction.method import (
    Penalty,
    Rates,
    UnitSeen,
    fisher_gap,
    relative_gap,
    squared_gap,
)
from dfq_jax.reconstruction.objective import blended, optimizer_of

KEY = jax.random.key(7)


def test_blends_are_of_both_in_the_share_asked_for():
    first, second = jnp.ones((64, 64)), jnp.zeros((64, 64))
    found = blended(KEY, first, second, 0.25)
    assert set(np.unique(found)) == {0.0, 1.0}
    assert float(found.mean()) == pytest.approx(0.25, abs=0.02)
    assert blended(KEY, first, second, 0.0) is second
    assert blended(KEY, first, second, 1.0) is first
    draws = np.stack([blended(k, first, second, 0.5) for k in jax.random.split(KEY, 40)])
    assert np.abs(draws.mean(0) - 0.5).max() < 0.4  # no element is always of one
    assert draws.mean() == pytest.approx(0.5, abs=0.01)
    flat = draws.reshape(40, -1) - 0.5  # neighbours, also a word apart, have nothing in common
    for lag in (1, 31, 32, 64):
        assert abs(np.mean(flat[:, lag:] * flat[:, :-lag])) < 0.005
    assert blended(KEY, jnp.ones((3, 7)), jnp.zeros((3, 7)), 0.5).shape == (3, 7)


@pytest.mark.parametrize("curve", ["linear", "cosine"])
def test_the_exponent_falls_after_the_warm_up(curve):
    penalty = Penalty(0.3, curve=curve)
    found = [float(penalty.exponent(jnp.int32(s), 100)) for s in (0, 20, 40, 60, 80, 100)]
    done = np.array([0, 0, 0.25, 0.5, 0.75, 1])
    left = 1 - done if curve == "linear" else (1 + np.cos(np.pi * done)) / 2
    np.testing.assert_allclose(found, 2 + 18 * left, rtol=1e-5)
    factors = [float(penalty.factor(jnp.int32(s), 100)) for s in (0, 19, 20, 99)]
    np.testing.assert_allclose(factors, [0, 0, 0.3, 0.3], rtol=1e-6)


def test_losses_by_hand():
    out, target = jnp.zeros((2, 3, 3, 4)), jnp.full((2, 3, 3, 4), 0.5)
    seen = UnitSeen(out, target, jnp.float32(0.25))
    assert float(squared_gap(seen)) == pytest.approx(4 * 0.25)
    assert float(relative_gap(seen)) == pytest.approx(4.0)


def test_fisher_weights_of_ones_are_a_multiple_of_the_squared_gap():
    """BRECQ card: with constant slopes the gradients are parallel."""
    out = jax.random.normal(KEY, (2, 3, 3, 4))
    slopes = jnp.ones_like(out)
    gap = lambda loss, s: jax.grad(lambda o: loss(UnitSeen(o, 0 * out, jnp.float32(1), s)))(out)
    np.testing.assert_allclose(gap(fisher_gap, slopes), 4 * gap(squared_gap, None), rtol=1e-5)
    np.testing.assert_allclose(gap(fisher_gap, None), gap(squared_gap, None), rtol=1e-6)


def test_rates_in_units_of_each_scale():
    """Adam's first step is as long as the rate; scales of any size move by the same share."""
    optimizer = optimizer_of(Rates(scale=1e-2, edges=2e-2, biases=3e-3, relative=True), 10)
    scales = {"bits": jnp.array([0.5]), "scale": jnp.array([1e-8, 2.0])}
    x = {
        "kernels": {"conv": scales},
        "edges": {"t": jnp.array(4.0)},
        "biases": {"conv": jnp.ones(1)},
    }
    slopes = jax.tree.map(jnp.ones_like, x)
    with jax.numpy_dtype_promotion("standard"):
        steps: Any = optimizer.update(slopes, optimizer.init(x), x)[0]
    np.testing.assert_allclose(steps["kernels"]["conv"]["scale"], [-1e-10, -2e-2], rtol=1e-4)
    np.testing.assert_allclose(steps["edges"]["t"], -8e-2, rtol=1e-4)
    np.testing.assert_allclose(steps["biases"]["conv"], -3e-3, rtol=1e-4)
    np.testing.assert_allclose(steps["kernels"]["conv"]["bits"], -Rates().bits, rtol=1e-4)
