"""Kernels by channel: ranges of what a layer makes and reads, factors moved between layers.

Kernels have outputs last and inputs (of one group) second to last; outputs of a group lie together.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.numerics.affine import NumpyOrJax

Kernel = Float[Array, "... k o"]


def by_group(v: Float[NumpyOrJax, "... o"], groups: int) -> Float[NumpyOrJax, "g k n"]:
    """A kernel, or one number for each of its outputs, as one matrix a group."""
    return v.reshape(-1, groups, v.shape[-1] // groups).swapaxes(0, 1)


def output_ranges(kernel: Kernel) -> Float[Array, " o"]:
    """Largest magnitude of each output channel's weights."""
    return jnp.max(jnp.abs(kernel), axis=tuple(range(kernel.ndim - 1)))


def input_ranges(kernel: Kernel, groups: int = 1) -> Float[Array, " i"]:
    """Largest magnitude of each input channel's weights.

    Args:
      kernel: any layer's.
      groups: into which its channels are divided.

    Returns:
      One range for each of `groups * k` input channels.
    """
    peaks = jnp.max(jnp.abs(kernel), axis=tuple(range(kernel.ndim - 2)))
    split = peaks.reshape(peaks.shape[0], groups, -1)
    return jnp.max(split, axis=2).T.reshape(-1)


def scaled_inputs(kernel: Kernel, factors: Float[Array, " i"], groups: int = 1) -> Kernel:
    """The kernel that makes of `x` what `kernel` makes of `x * factors`."""
    outputs = kernel.shape[-1] // groups
    by_group = factors.reshape(groups, -1).T
    return kernel * jnp.repeat(by_group, outputs, axis=1)


def balancing(first: Float[Array, " c"], second: Float[Array, " c"]) -> Float[Array, " c"]:
    """Factors that make ranges equal: `first / s = second * s`.

    Args:
      first: ranges of the channels where they are made.
      second: where they are read.

    Returns:
      `s = sqrt(first / second)` within [1e-8, 1e8]; 1 where either range is 0.

    Reference:
      Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization ...".
    """
    alive = (first > 0) & (second > 0)
    s = jnp.where(alive, jnp.sqrt(first / jnp.where(alive, second, 1.0)), 1.0)
    return jnp.clip(s, 1e-8, 1e8)
