"""Closed forms of clipped normal variables: what an activation does to Gaussian pre-activations."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from dfq_jax.types import Moments


def clipped_normal(moments: Moments, ceiling: float | None) -> Moments:
    """Mean and variance of `clip(X, 0, ceiling)` for X normal with `moments`, per channel.

    Args:
      moments: mean and variance of the normal variables; variance 0 is a constant.
      ceiling: upper cap, None for ReLU.

    Returns:
      Moments of the clipped variables.

    Reference:
      Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
      section 4.2.1 and appendix C (the mean); the second moment by the same integration.
    """
    mean = moments.mean
    std = jnp.sqrt(jnp.maximum(moments.var, 1e-20))
    a = -mean / std
    b = jnp.full_like(a, jnp.inf) if ceiling is None else (ceiling - mean) / std
    inside = norm.cdf(b) - norm.cdf(a)
    density_gap = norm.pdf(a) - norm.pdf(b)
    top = 0.0 if ceiling is None else ceiling
    above = 1 - norm.cdf(b)
    first = std * density_gap + mean * inside + top * above
    b_density = jnp.where(jnp.isinf(b), 0.0, jnp.where(jnp.isinf(b), 0.0, b) * norm.pdf(b))
    inner = inside + a * norm.pdf(a) - b_density  # E[Z^2; a < Z < b]
    second = std**2 * inner + 2 * mean * std * density_gap + mean**2 * inside + top**2 * above
    return Moments(first, jnp.maximum(second - first**2, 0.0))


def leaky_normal(moments: Moments, slope: Float[Array, "..."] | float) -> Moments:
    """Mean and variance of X where positive and `slope * X` elsewhere, for X normal.

    Args:
      moments: mean and variance of the normal variables.
      slope: one for all channels, or one for each.

    Returns:
      Moments of the result: `y = slope x + (1 - slope) relu(x)` and
      `y^2 = slope^2 x^2 + (1 - slope^2) relu(x)^2`, by the moments of `relu(x)`.
    """
    positive = clipped_normal(moments, None)
    mean = slope * moments.mean + (1 - slope) * positive.mean
    square = slope**2 * (moments.var + moments.mean**2)
    square = square + (1 - slope**2) * (positive.var + positive.mean**2)
    return Moments(mean, jnp.maximum(square - mean**2, 0.0))


NODES = np.linspace(-8.0, 8.0, 257, dtype=np.float32)
"""Where a standard normal variable is looked at: with equal steps the trapezoidal rule converges
faster than any power of the step, and stays good to 1e-3 for curves with a kink."""


def curve_of_normal(
    curve: Callable[[Float[Array, "..."]], Float[Array, "..."]], moments: Moments
) -> Moments:
    """Mean and variance of `curve(X)` for X normal with `moments`, per channel.

    Args:
      curve: a function of each element alone.
      moments: mean and variance of the normal variables.

    Returns:
      Moments of the result, by the trapezoidal rule on fixed points.
    """
    std = jnp.sqrt(jnp.maximum(moments.var, 0.0))
    values = curve(moments.mean + std * NODES[:, None])
    density = np.exp(-(NODES**2) / 2)
    weights = jnp.asarray(density / density.sum())
    mean = weights @ values
    return Moments(mean, weights @ (values - mean) ** 2)


def normal_range(
    moments: Moments, sigmas: float, *, rectified: bool = False
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Range of a tensor from its channel moments: `mean -/+ sigmas * std`, widest channel.

    Args:
      moments: mean and variance per channel.
      sigmas: how many standard deviations to keep (DFQ: 6).
      rectified: whether the tensor is known to be nonnegative.

    Returns:
      Lower and upper end, scalars.

    Reference:
      Nagel et al. 2019, section 5 ("activation range ... beta +/- n gamma").
    """
    std = jnp.sqrt(moments.var)
    lo, hi = jnp.min(moments.mean - sigmas * std), jnp.max(moments.mean + sigmas * std)
    return (jnp.zeros_like(lo) if rectified else lo), hi
