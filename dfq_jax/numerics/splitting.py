"""Outlier channel splitting: a channel and its copy, half the weights each, do what it did alone.

Zhao et al. 2019, "Improving Neural Network Quantization without Retraining using Outlier Channel
Splitting", sections 3.1 and 3.2.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class Splits(NamedTuple):
    """Which channels are split, one after the other; each copy is put behind all channels.

    Attributes:
      picks: position of the channel halved by each split.
      source: for each position in the end, the original channel.
    """

    picks: Int[Array, " n"]
    source: Int[Array, " m"]


def plan_splits(ranges: Float[Array, " i"], count: int) -> Splits:
    """Splits the channel with the widest range, `count` times; halves may be split again.

    Args:
      ranges: largest magnitude of each input channel's weights.
      count: of copies.

    Returns:
      The splits.
    """
    width = ranges.shape[0]

    def split(carry: tuple, t: Int[Array, ""]) -> tuple:
        widest, source = carry
        k = jnp.argmax(widest)
        half = widest[k] / 2
        widest = widest.at[k].set(half).at[width + t].set(half)
        return (widest, source.at[width + t].set(source[k])), k.astype(jnp.int32)

    start = jnp.pad(ranges, (0, count)), jnp.arange(width + count, dtype=jnp.int32)
    (_, source), picks = lax.scan(split, start, jnp.arange(count))
    return Splits(picks, source)


def split_inputs(
    kernel: Float[Array, "... i o"], splits: Splits, step: Float[Array, "..."] | None = None
) -> Float[Array, "... m o"]:
    """A kernel with channels split: summed over copies it is what it was.

    Args:
      kernel: of a layer without groups.
      splits: of its input channels.
      step: of the grid the kernel will be rounded to, size 1 along inputs: halves are then moved
        apart by a half of it, `w / 2 -+ step / 4`, and their codes sum to the code of the whole;
        None for equal halves.

    Returns:
      The kernel with more input channels.

    Reference:
      Zhao et al. 2019: `round(a/2 - 1/4) + round(a/2 + 1/4) = round(a)`.
    """
    width, count = kernel.shape[-2], splits.picks.shape[0]
    apart = jnp.zeros(()) if step is None else step / 4
    apart = jnp.broadcast_to(apart, (*kernel.shape[:-2], 1, kernel.shape[-1]))[..., 0, :]

    def split(w: Float[Array, "... m o"], at: tuple) -> tuple:
        t, k = at
        half = w[..., k, :] / 2
        return w.at[..., k, :].set(half - apart).at[..., width + t, :].set(half + apart), None

    room = [(0, 0)] * (kernel.ndim - 2) + [(0, count), (0, 0)]
    return lax.scan(split, jnp.pad(kernel, room), (jnp.arange(count), splits.picks))[0]
