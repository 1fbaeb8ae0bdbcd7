"""Gradients on grids: clipped where they turn least, unbiased, worth less the more they turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.gradient_grids import (
    SHARES,
    counteracted_rate,
    deviation,
    gradient_on_grid,
)

KEY = jax.random.key(0)
rounded = jax.jit(gradient_on_grid, static_argnums=1)


def long_tailed(n=4000):
    """Mostly small values, and a few very large ones."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=n) * np.where(rng.random(n) < 0.002, 300, 1)).astype(np.float32)


def nearest(g, clip, bits):
    step = clip / (2 ** (bits - 1) - 1)
    return np.clip(np.round(g / step), -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) * step


def turned(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 1 - a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_clip_turns_least_of_ten(bits):
    g = long_tailed()
    wanted = [turned(g, nearest(g, share * abs(g).max(), bits)) for share in SHARES]
    found, least = rounded(jnp.asarray(g), bits, KEY)
    assert float(least) == pytest.approx(min(wanted), abs=1e-5)
    clip = SHARES[int(np.argmin(wanted))] * abs(g).max()
    assert float(jnp.max(jnp.abs(found))) == pytest.approx(clip, rel=1e-5)
    codes = np.asarray(found) / (clip / (2 ** (bits - 1) - 1))
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)


def test_rounding_is_right_in_the_mean():
    g = jnp.asarray(long_tailed(64))
    many = jax.vmap(lambda key: rounded(g, 4, key)[0])(jax.random.split(KEY, 3000))
    clip = float(jnp.max(jnp.abs(many)))
    step = clip / 7
    error = np.abs(np.mean(many, 0) - np.clip(g, -clip, clip))
    assert error.max() < 5 * step / 2 / np.sqrt(3000)  # five deviations at most


def test_gradients_of_any_size_keep_their_direction():
    g = long_tailed()
    _, wanted = rounded(jnp.asarray(g), 8, KEY)
    found, tiny = rounded(jnp.asarray(g * 1e-8), 8, KEY)
    assert float(tiny) == pytest.approx(float(wanted), abs=1e-6)
    assert np.any(np.asarray(found) != 0)
    zero, none = rounded(jnp.zeros(5), 8, KEY)
    np.testing.assert_array_equal(zero, 0)
    assert float(none) == 0


def test_deviation_is_one_minus_the_cosine():
    a, b = np.random.default_rng(1).normal(size=(2, 50)).astype(np.float32)
    assert float(deviation(jnp.asarray(a), jnp.asarray(b))) == pytest.approx(turned(a, b), abs=1e-6)
    assert float(deviation(jnp.asarray(a), jnp.asarray(-a))) == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize(("turn", "phi"), [(0.0, 1.0), (0.05, np.exp(-1)), (0.5, 0.1)])
def test_the_rate_falls_with_the_deviation(turn, phi):
    assert float(counteracted_rate(jnp.float32(turn))) == pytest.approx(phi, rel=1e-5)
