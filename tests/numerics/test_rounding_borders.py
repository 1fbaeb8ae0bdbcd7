"""Adaptive borders of activations, by the numbers of a channel that many 2-bit weights read."""

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.affine import Grid, fake_quantize
from dfq_jax.numerics.ranges import MinMax, weight_affine
from dfq_jax.numerics.rounding_borders import Borders, borders_of, gains, rounded_at

STEP, MOST = 0.25, 255.0


@pytest.fixture(scope="module")
def channel():
    """One input channel, 64 Gaussian weights and what 2 bits make of them, inputs in 0..4."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(1, 64)), jnp.float32)
    grid = Grid(2)
    return w, fake_quantize(w, weight_affine(w, grid, MinMax()), grid), rng.uniform(0, 4, 20_000)


def codes(x, borders):
    return rounded_at(jnp.asarray(x, jnp.float32)[:, None], jnp.float32(STEP), borders, 0.0, MOST)


def loss(channel, found):
    """Mean over outputs of the squared gap of products."""
    w, rounded, x = channel
    gap = STEP * np.asarray(found) * np.asarray(rounded) - x[:, None] * np.asarray(w)
    return np.mean(gap**2)


def test_borders_beat_nearest_and_a_gain_beats_borders(channel):
    w, rounded, x = channel
    gain = gains(w, rounded)
    nearest = loss(channel, codes(x, Borders(jnp.zeros(1), jnp.zeros(1))))
    at_borders = loss(channel, codes(x, borders_of(gain)))
    scaled = loss(channel, jnp.round(jnp.asarray(x)[:, None] * gain / STEP))
    assert 0.6 < float(gain[0]) < 0.95
    assert scaled < 0.95 * at_borders < 0.95 * 0.95 * nearest


def test_no_offset_and_no_slope_round_half_up():
    x = np.array([0.0, 0.1249, 0.125, 0.375, 0.6249, 100.0])
    found = codes(x, Borders(jnp.zeros(1), jnp.zeros(1)))[:, 0]
    np.testing.assert_array_equal(found, [0, 0, 1, 2, 2, MOST])


def test_borders_choose_the_better_of_two_codes(channel):
    """Where the border lies inside 0..1, against trying both."""
    w, rounded, x = channel
    found = np.asarray(codes(x, borders_of(gains(w, rounded))))[:, 0]
    low = np.floor(x / STEP)
    error = lambda code: np.sum(
        (STEP * code[:, None] * np.asarray(rounded) - x[:, None] * np.asarray(w)) ** 2, 1
    )
    best = np.where(error(low + 1) < error(low), low + 1, low)
    near_tie = np.abs(error(low + 1) - error(low)) < 1e-3 * error(low)
    np.testing.assert_array_equal(found[~near_tie], best[~near_tie])


def test_a_gain_and_a_shift_are_borders_of_the_same_form():
    """`round(gain x / s - shift)` rounds up at borders affine in the code, inside 0..1."""
    gain, shift, s = 0.95, 0.1, 0.5
    x = np.linspace(0, 3, 997)
    scaled = np.round(gain * x / s - shift)
    slope = 1 / gain - 1
    found = rounded_at(
        jnp.asarray(x, jnp.float32)[:, None],
        jnp.float32(s),
        Borders(jnp.array([shift / gain]), jnp.array([slope])),
        0.0,
        MOST,
    )[:, 0]
    np.testing.assert_array_equal(found, scaled)


def test_gains_of_exact_and_of_dead_channels():
    w = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 4, 5)), jnp.float32)
    np.testing.assert_allclose(gains(w, w), 1, rtol=1e-6)
    np.testing.assert_allclose(gains(w, 0.5 * w), 2, rtol=1e-6)
    np.testing.assert_array_equal(gains(w, jnp.zeros_like(w)), 1)
    np.testing.assert_allclose(gains(w[0, 0], w[0, 0] * 4), 0.25, rtol=1e-6)
