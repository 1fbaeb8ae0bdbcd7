"""Where activations round up: at a border that makes up for what rounding did to the weights.

A value `x = s (k + f)` with weight `w`, rounded to `w^`, should become code `k` or `k + 1`,
whichever brings `w^ x^` closer to `w x`: the border between the two is no longer 1/2, and affine
in `k`. A channel that many weights read has the best value `gain x`, and without the restriction
to the two nearest codes that is what to round. A gain is a factor of the producer's output channel,
so it costs nothing at inference.

Reference:
  Li et al. 2022, "Efficient Adaptive Activation Rounding for Post-Training Quantization" (AQuant);
  formulas derived from its abstract: minimal error of products, no expected bias.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

PerChannel = Float[Array, " cin"]


class Borders(NamedTuple):
    """`B(k) = clip(1/2 + offset + slope (k + 1/2), 0, 1)` for each channel.

    Attributes:
      offset: 0 for rounding half up.
      slope: 0 for rounding half up.
    """

    offset: PerChannel
    slope: PerChannel

    def at(self, code: Float[Array, "... cin"]) -> Float[Array, "... cin"]:
        """The fraction from which on a value between `code` and the next is rounded up."""
        return jnp.clip(0.5 + self.offset + self.slope * (code + 0.5), 0.0, 1.0)


def gains(w: Float[Array, "... cin cout"], rounded: Float[Array, "... cin cout"]) -> PerChannel:
    """`sum w w^ / sum w^ w^` over all that reads an input channel; 1 where nothing is left of it.

    Args:
      w: kernel, HWIO or (in, out).
      rounded: the same on its grid.

    Returns:
      The factors of the inputs with which the rounded kernel comes closest to the kernel.
    """
    axes = (*range(w.ndim - 2), w.ndim - 1)
    power = jnp.sum(rounded**2, axes)
    return jnp.where(power > 0, jnp.sum(w * rounded, axes) / jnp.where(power > 0, power, 1.0), 1.0)


def borders_of(gain: PerChannel) -> Borders:
    """The borders that round `x` as near to `gain x` as the two codes around `x` allow."""
    return Borders(jnp.zeros_like(gain), 1 / gain - 1)


def rounded_at(
    x: Float[Array, "... cin"], scale: Float[Array, ""], borders: Borders, low: float, high: float
) -> Float[Array, "... cin"]:
    """Codes in `low..high` of values, by their borders."""
    steps = x / scale
    code = jnp.floor(steps)
    return jnp.clip(jnp.where(steps - code >= borders.at(code), code + 1, code), low, high)
