"""Steps in proportion to the deviation of each channel of each image, found while a network runs.

Hong et al. 2022, "DAQ: Channel-Wise Distribution-Aware Quantization for Deep Image Super-Resolution
Networks", as released, but that values behind a ReLU are kept to as many levels as there are bits.
"""

from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.errors import check_choice

GAUSSIAN_STEPS: Mapping[int, float] = {
    **{1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335},
    **{5: 0.188, 6: 0.104, 7: 0.057, 8: 0.031},
}
"""{bits: step of the uniform quantizer with the least squared error on values of deviation 1}."""
StepTable = Literal["gaussian", "released"]
"""`gaussian`: the step of as many bits; `released`: that of one bit fewer, as its code reads it."""
UNTOUCHED = 32
"""Bits of deviations that are not rounded."""


def step_multiplier(bits: int, table: StepTable = "gaussian") -> float:
    """G: the step in units of the deviation.

    Args:
      bits: 1..8, or 2..8 as released.
      table: how it is read.

    Raises:
      UsageError: for other bits or another table.
    """
    check_choice("table", table, ("gaussian", "released"))
    read = bits - (table == "released")
    check_choice("bits", str(read), tuple(map(str, GAUSSIAN_STEPS)))
    return GAUSSIAN_STEPS[read]


def mid_rise(u: Float[Array, "..."], step: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """MR: `clip((round(u / step + 1/2) - 1/2) step, -T, T)`, `T = (2^b / 2 - 1/2) step`.

    No level is 0. Where the step is 0, so is the result.
    """
    safe = jnp.where(step > 0, step, 1.0)
    top = 2**bits / 2 - 0.5
    codes = jnp.clip(jnp.round(u / safe + 0.5) - 0.5, -top, top)
    return jnp.where(step > 0, codes * safe, 0.0)


def channel_moments(
    x: Float[Array, "b h w c"], *, behind_relu: bool
) -> tuple[Float[Array, "b 1 1 c"], Float[Array, "b 1 1 c"]]:
    """Mean and deviation of each image and channel.

    Args:
      x: activations.
      behind_relu: none is below 0, and positive ones alone are counted (and one more).
    """
    if behind_relu:
        count = jnp.sum(x > 0, (1, 2), keepdims=True).astype(x.dtype) + 1
        mean = jnp.sum(x, (1, 2), keepdims=True) / count
        var = jnp.sum(x**2, (1, 2), keepdims=True) / count - mean**2
        return mean, jnp.sqrt(jnp.maximum(var, 0.0))
    places = max(x.shape[1] * x.shape[2] - 1, 1)
    mean = jnp.mean(x, (1, 2), keepdims=True)
    return mean, jnp.sqrt(jnp.sum((x - mean) ** 2, (1, 2), keepdims=True) / places)


def rounded_deviations(
    sigma: Float[Array, "b 1 1 c"], bits: int, table: StepTable = "gaussian"
) -> Float[Array, "b 1 1 c"]:
    """Deviations of an image's channels on few levels about their mean, none below 0.

    m + MR(sigma - m, G std_c sigma),   m = mean_c sigma
    """
    if bits == UNTOUCHED or sigma.shape[-1] < 2:
        return sigma
    mean = jnp.mean(sigma, -1, keepdims=True)
    spread = jnp.std(sigma, -1, keepdims=True, ddof=1)
    rounded = mid_rise(sigma - mean, step_multiplier(bits, table) * spread, bits) + mean
    return jnp.maximum(rounded, 0.0)


def channelwise(
    x: Float[Array, "b h w c"],
    bits: int,
    *,
    behind_relu: bool,
    sigma_bits: int = 4,
    table: StepTable = "gaussian",
    bounded: bool = True,
) -> Float[Array, "b h w c"]:
    """Activations on levels of each image's and channel's own.

        MR(x - mean, G sigma) + mean;   behind a ReLU  G sigma {0, 1, ..., 2^b - 1}

    Args:
      x: activations.
      bits: of them.
      behind_relu: none is below 0; zeros stay zeros.
      sigma_bits: of deviations; `UNTOUCHED` for all of them.
      table: how multipliers are read.
      bounded: levels behind a ReLU end where the bits do; released code lets them go on.
    """
    mean, sigma = channel_moments(x, behind_relu=behind_relu)
    step = step_multiplier(bits, table) * rounded_deviations(sigma, sigma_bits, table)
    if not behind_relu:
        return mid_rise(x - mean, step, bits) + mean
    safe = jnp.where(step > 0, step, 1.0)
    codes = jnp.round(x / safe)
    codes = jnp.clip(codes, 0, 2**bits - 1) if bounded else codes
    return jnp.where(step > 0, codes * safe, 0.0)


def deviation_weights(
    kernel: Float[Array, "..."], bits: int, table: StepTable = "gaussian"
) -> Float[Array, "..."]:
    """A kernel on levels of the deviation of all its weights, about 0: `MR(w, G sigma)`."""
    return mid_rise(kernel, step_multiplier(bits, table) * jnp.std(kernel, ddof=1), bits)
