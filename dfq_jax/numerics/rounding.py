"""Learned rounding of kernels: what is trained, what the kernel is meanwhile, and its final codes.

A kernel `w` on a grid of scale `s` lies between two codes, `B = floor(w / s)` and `B + 1`.
AdaRound trains which of the two it becomes, by a soft bit `h(v)` that a penalty drives to 0 or 1;
GENIE-M trains the scale as well, with `B` as it was; FlexRound divides the kernel by what it
trains before rounding to nearest, so that codes may move by more than one; `straight_through`
trains the kernel itself. Once codes are as_learned, scales can still learn (`rescaled`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dfq_jax.numerics.affine import (
    Affine,
    Grid,
    Steps,
    fake_quantize,
    quantize,
    round_ste,
    snapped,
    spread,
    steps_of,
)
from dfq_jax.values import bound

Kernel = Float[Array, "..."]
Leaves = Mapping[str, Array]

STRETCH = (-0.1, 1.1)
"""Ends of the stretched sigmoid; beyond 0 and 1, so that soft bits get there."""
NEARLY = 1 - 1e-6
"""Largest fraction of a code: float32 rounds some fractions up to 1."""
POSITIVE = 1e-8
"""Smallest scale that training may reach."""


class Rounding(NamedTuple):
    """A way to choose the codes of a kernel.

    Attributes:
      name: as in the literature.
      init: (kernel, its scales, grid) -> (what is trained, what stays).
      soft: (trained, fixed, grid) -> the kernel while training; differentiable.
      hard: (trained, fixed, grid) -> scales, and the kernel on its grid.
      undecided: (trained, exponent) -> sum over weights of how far they are from a decision, in
        0..1 each; 0 for a way that decides at once.
    """

    name: str
    init: Callable[[Kernel, Affine, Grid], tuple[Leaves, Leaves]]
    soft: Callable[[Leaves, Leaves, Grid], Kernel]
    hard: Callable[[Leaves, Leaves, Grid], tuple[Affine, Kernel]]
    undecided: Callable[[Leaves, Float[Array, ""]], Float[Array, ""]]


def nearest() -> Rounding:
    """Rounding to nearest: nothing is trained."""
    return Rounding(
        "nearest", rounded_at_once, rounded_kernel, bound(as_learned, rounded_kernel), decided
    )


def rounded_at_once(kernel: Kernel, affine: Affine, grid: Grid) -> tuple[Leaves, Leaves]:
    """Nothing to train, and the kernel on its grid."""
    return {}, {"kernel": fake_quantize(kernel, affine, grid), **affine._asdict()}


def rounded_kernel(trained: Leaves, fixed: Leaves, grid: Grid) -> Kernel:
    """The kernel as it was rounded."""
    return fixed["kernel"]


def rescaled() -> Rounding:
    """Codes stay, those that the kernel rounds to now; their scales are trained.

    Reference:
      Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large Language
      Models", section 3.3 (end-to-end training of quantization parameters).
    """
    return Rounding("rescaled", codes_stay, at_codes, bound(as_learned, at_codes), decided)


def codes_stay(kernel: Kernel, affine: Affine, grid: Grid) -> tuple[Leaves, Leaves]:
    """Scales to train, and codes above zero points."""
    codes = quantize(kernel, affine, grid).astype(jnp.float32)
    zero_point = affine.zero_point
    inside = codes - zero_point.astype(jnp.float32)
    return {"scale": affine.scale}, {"codes": inside, "zero_point": zero_point}


def at_codes(trained: Leaves, fixed: Leaves, grid: Grid) -> Kernel:
    """The kernel at its codes."""
    return fixed["codes"] * scales_of(trained, fixed)


Soft = Callable[[Leaves, Leaves, Grid], Kernel]


def as_learned(soft: Soft, trained: Leaves, fixed: Leaves, grid: Grid) -> tuple[Affine, Kernel]:
    """Scales and kernel of a way whose soft kernel is on its grid at every step."""
    return Affine(scales_of(trained, fixed), fixed["zero_point"]), soft(trained, fixed, grid)


def decided(trained: Leaves, exponent: Float[Array, ""]) -> Float[Array, ""]:
    """No penalty: codes are whole at every step."""
    return jnp.zeros(())


def adaround(*, scale: bool = False) -> Rounding:
    """Learned bits between the two nearest codes; with `scale`, the scales learn too.

    The floor `B` and the zero point stay those of the first scale, so the gradient by the scale is
    `codes - zero_point` and never flips a code.

    Args:
      scale: train the scales (GENIE-M).

    Reference:
      Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization";
      Jeon et al. 2023, "GENIE: Show Me the Data for Quantization", section 3.3 (scales).
    """
    name = "genie_m" if scale else "adaround"
    return Rounding(name, bound(bits_of, scale), with_soft_bits, with_bits, undecided_bits)


def bits_of(scale: bool, kernel: Kernel, affine: Affine, grid: Grid) -> tuple[Leaves, Leaves]:
    """Bits to train, with `scale` scales as well, and the codes below."""
    steps = kernel / affine.scale
    floor = jnp.floor(steps)
    bits = {"bits": logit(jnp.minimum(steps - floor, NEARLY))}
    fixed = {"floor": floor, "zero_point": affine.zero_point}
    scales = {"scale": affine.scale}
    return (bits | scales, fixed) if scale else (bits, fixed | scales)


def placed(steps: Kernel, trained: Leaves, fixed: Leaves, grid: Grid) -> Kernel:
    """The kernel at so many steps of its scales, clipped to the codes of its grid."""
    zero_point = fixed["zero_point"].astype(jnp.float32)
    inside = jnp.clip(steps, grid.qmin - zero_point, grid.qmax - zero_point)
    return inside * scales_of(trained, fixed)


def with_soft_bits(trained: Leaves, fixed: Leaves, grid: Grid) -> Kernel:
    """The kernel between its codes."""
    return placed(fixed["floor"] + soft_bit(trained["bits"]), trained, fixed, grid)


def with_bits(trained: Leaves, fixed: Leaves, grid: Grid) -> tuple[Affine, Kernel]:
    """Scales, and the kernel at the codes its bits lean to."""
    up = (trained["bits"] >= 0).astype(jnp.float32)
    affine = Affine(scales_of(trained, fixed), fixed["zero_point"])
    return affine, placed(fixed["floor"] + up, trained, fixed, grid)


def undecided_bits(trained: Leaves, exponent: Float[Array, ""]) -> Float[Array, ""]:
    """How far bits are from 0 and 1, summed."""
    return jnp.sum(indecision(soft_bit(trained["bits"]), exponent))


def scales_of(trained: Leaves, fixed: Leaves) -> Float[Array, "..."]:
    """The scales, wherever they are, positive."""
    return jnp.maximum(trained["scale"], POSITIVE) if "scale" in trained else fixed["scale"]


def soft_bit(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """`h(v) = clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1)` (AdaRound)."""
    low, high = STRETCH
    return jnp.clip(jax.nn.sigmoid(v) * (high - low) + low, 0.0, 1.0)


def logit(fraction: Float[Array, "..."]) -> Float[Array, "..."]:
    """The `v` with `h(v) = fraction`, for fractions in [0, 1)."""
    low, high = STRETCH
    return -jnp.log((high - low) / (fraction - low) - 1)


def indecision(h: Float[Array, "..."], exponent: Float[Array, ""]) -> Float[Array, "..."]:
    """`1 - |2 h - 1|^beta` (AdaRound): 1 halfway, 0 at either end."""
    return 1 - jnp.abs(2 * h - 1) ** exponent


def flexround() -> Rounding:
    """Rounding to nearest of a kernel divided by learned factors, with learned scales.

    `w^ = s (clip(round(w / (s exp(theta))) + z) - z)`, with `theta` the sum of one number for each
    weight, output and input channel, 0 at first. A weight's gradient grows with its size, so large
    weights move more easily.

    Reference:
      Lee et al. 2023, "FlexRound: Learnable Rounding based on Element-wise Division for
      Post-Training Quantization".
    """
    return Rounding("flexround", divisors_of, divided, bound(as_learned, divided), decided)


def divisors_of(kernel: Kernel, affine: Affine, grid: Grid) -> tuple[Leaves, Leaves]:
    """Logarithms of divisors and scales to train, and the kernel."""
    chans = (1,) * (kernel.ndim - 1) + kernel.shape[-1:]
    inputs = (1,) * (kernel.ndim - 2) + (kernel.shape[-2], 1)
    shapes = {"divisor": kernel.shape, "divisor_out": chans, "divisor_in": inputs}
    zeros = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    return zeros | {"scale": affine.scale}, {"kernel": kernel, "zero_point": affine.zero_point}


def divided(trained: Leaves, fixed: Leaves, grid: Grid) -> Kernel:
    """The kernel divided and rounded to nearest."""
    divisor = jnp.exp(trained["divisor"] + trained["divisor_out"] + trained["divisor_in"])
    scale, zero_point = scales_of(trained, fixed), fixed["zero_point"].astype(jnp.float32)
    steps = round_ste(fixed["kernel"] / (scale * divisor))
    return jnp.clip(steps, grid.qmin - zero_point, grid.qmax - zero_point) * scale


def straight_through() -> Rounding:
    """Rounding to nearest of a kernel that learns itself, in units of its codes, and its scales.

    `w^ = s (clip(round(v) + z) - z)`, with `v = w / s` at first; rounding has the gradient of the
    identity. In units of codes one learning rate suits every layer.

    Reference:
      Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for
      Conditional Computation", section 3 (straight-through); Esser et al. 2020, "Learned Step Size
      Quantization", at values that are codes: the gradient by the scale is the code.
    """
    return Rounding(
        "straight_through",
        own_codes,
        at_nearest_codes,
        bound(as_learned, at_nearest_codes),
        decided,
    )


def own_codes(kernel: Kernel, affine: Affine, grid: Grid) -> tuple[Leaves, Leaves]:
    """The kernel in units of its codes, and scales: both train."""
    codes = {"codes": kernel / affine.scale, "scale": affine.scale}
    return codes, {"zero_point": affine.zero_point}


def at_nearest_codes(trained: Leaves, fixed: Leaves, grid: Grid) -> Kernel:
    """The kernel at the nearest codes."""
    zero_point = fixed["zero_point"].astype(jnp.float32)
    whole = Steps(jnp.ones_like(zero_point), grid.qmin - zero_point, grid.qmax - zero_point)
    return snapped(trained["codes"], whole) * scales_of(trained, fixed)


def rounded_at_random(
    w: Float[Array, "..."], affine: Affine, grid: Grid, key: Key[Array, ""]
) -> Float[Array, "..."]:
    """Values of a grid on either side of `w`, the nearer the likelier; `w` in the mean.

    Args:
      w: any finite values; beyond the grid they are its ends.
      affine: scale and zero point.
      grid: the integers.
      key: of the draws.

    Reference:
      Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3.
    """
    scale, low, high = steps_of(spread(affine, w.shape, grid), grid)
    codes = jnp.floor(w / scale + jax.random.uniform(key, w.shape))
    return jnp.clip(codes, low, high) * scale
