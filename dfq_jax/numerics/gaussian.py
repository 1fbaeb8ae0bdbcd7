"""Closed forms of clipped normal variables: what an activation does to Gaussian pre-activations.

Moments in arrays of NumPy stay in NumPy; one program for each curve serves any number of channels.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from dfq_jax.numerics.affine import NumpyOrJax, namespace
from dfq_jax.types import Moments

WIDTH = 1024
"""Channels that a program computes at a time where moments are NumPy's."""

ElementFunction = Callable[[Float[Array, "..."]], Float[Array, "..."]]
"""A function of each element alone."""


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
    if namespace(*moments) is np:
        return by_width(partial(clipped_jax, ceiling=ceiling), moments)
    return clipped_jax(moments, ceiling)


def by_width(program: Callable[[Moments], Moments], moments: Moments) -> Moments:
    """What a program of `WIDTH` channels makes of any number of them, in arrays of NumPy.

    Args:
      program: of each channel alone.
      moments: of any shape.
    """
    shape, size = np.shape(moments.mean), np.size(moments.mean)
    filled = np.zeros((2, max(1, -(-size // WIDTH)) * WIDTH), np.float32)
    filled[:, :size] = [np.ravel(part) for part in moments]
    parts = [
        jax.device_get(program(Moments(*filled[:, first : first + WIDTH])))
        for first in range(0, filled.shape[1], WIDTH)
    ]
    return Moments(*(np.concatenate(x)[:size].reshape(shape) for x in zip(*parts, strict=True)))


@partial(jax.jit, static_argnames="ceiling")
def clipped_jax(moments: Moments, ceiling: float | None) -> Moments:
    """`clipped_normal` of arrays of JAX."""
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


def leaky_normal(moments: Moments, slope: Float[NumpyOrJax, "..."] | float) -> Moments:
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
    return Moments(mean, (square - mean**2).clip(0.0))


NODES = np.linspace(-8.0, 8.0, 257, dtype=np.float32)
"""Where a standard normal variable is looked at: with equal steps the trapezoidal rule converges
faster than any power of the step, and stays good to 1e-3 for curves with a kink."""


def curve_of_normal(curve: ElementFunction, moments: Moments) -> Moments:
    """Mean and variance of `curve(X)` for X normal with `moments`, per channel.

    Args:
      curve: a function of each element alone; equal ones (`values.bound`) share a program.
      moments: mean and variance of the normal variables.

    Returns:
      Moments of the result, by the trapezoidal rule on fixed points.
    """
    if namespace(*moments) is np:
        return by_width(partial(curved_jax, curve=curve), moments)
    return curved_jax(moments, curve)


@partial(jax.jit, static_argnames="curve")
def curved_jax(moments: Moments, curve: ElementFunction) -> Moments:
    """`curve_of_normal` of arrays of JAX."""
    std = jnp.sqrt(jnp.maximum(moments.var, 0.0))
    values = curve(moments.mean + std * NODES[:, None])
    density = np.exp(-(NODES**2) / 2)
    weights = jnp.asarray(density / density.sum())
    mean = weights @ values
    return Moments(mean, weights @ (values - mean) ** 2)


def normal_range(
    moments: Moments, sigmas: float, *, rectified: bool = False
) -> tuple[Float[NumpyOrJax, ""], Float[NumpyOrJax, ""]]:
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
    xp = namespace(*moments)
    std = xp.sqrt(moments.var)
    lo, hi = (moments.mean - sigmas * std).min(), (moments.mean + sigmas * std).max()
    return (xp.zeros_like(lo) if rectified else lo), hi
