"""Gradients on few bits: where to clip them, and how much slower to learn from what is left.

Zhu et al. 2020, "Towards Unified INT8 Training for Convolutional Neural Network" (UI8). Gradients
of deep layers have long tails: a grid up to their largest rounds most of them to 0, and one that
cuts the tail turns their direction. The clip is that of ten shares of the largest magnitude which
turns least, looked for at every step; the paper descends to it every so many steps.

    d(c) = 1 - cos(g, Q_c(g))          deviation of the direction, section 4.1
    c    = argmin_c d(c)               direction sensitive clipping
    phi  = max(exp(-alpha d), beta)    deviation counteractive rate, section 4.2
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dfq_jax.numerics.affine import Grid, fake_quantize, from_range
from dfq_jax.numerics.rounding import rounded_at_random

SHARES = np.linspace(0.1, 1.0, 10, dtype=np.float32)
"""Of the largest magnitude, where gradients may be cut."""
ALPHA, BETA = 20.0, 0.1
"""How fast the rate falls with the deviation, and how far: as in the paper."""


def gradient_on_grid(
    gradient: Float[Array, "..."], bits: int, key: Key[Array, ""]
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """A gradient on a symmetric grid, rounded at random, and its deviation.

    Args:
      gradient: any shape.
      bits: of the grid.
      key: of the draws.

    Returns:
      The gradient, in the mean what its clipped values are; and the deviation in [0, 2] of what
      rounding to nearest makes of it; 0 where all of it is 0.
    """
    grid = Grid(bits, symmetric=True)
    largest = jnp.max(jnp.abs(gradient))
    cut = lambda share: from_range(-share * largest, share * largest, grid)
    turned = lambda share: deviation(gradient, fake_quantize(gradient, cut(share), grid))
    found = jax.lax.map(turned, jnp.asarray(SHARES))
    best = jnp.argmin(found)
    return rounded_at_random(gradient, cut(jnp.asarray(SHARES)[best]), grid, key), found[best]


def deviation(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, ""]:
    """1 - cos of two arrays of one shape; 0 where either is 0 everywhere."""
    top = lambda v: jnp.maximum(jnp.max(jnp.abs(v)), jnp.finfo(v.dtype).tiny)
    a, b = a / top(a), b / top(b)  # squares of gradients may be too small for float32
    lengths = jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))
    return jnp.where(lengths > 0, 1 - jnp.sum(a * b) / jnp.maximum(lengths, 1e-30), 0.0)


def counteracted_rate(turned: Float[Array, ""]) -> Float[Array, ""]:
    """phi: the share of the learning rate that a gradient of this deviation is worth."""
    return jnp.maximum(jnp.exp(-ALPHA * turned), BETA)
