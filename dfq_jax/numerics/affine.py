"""Uniform ("affine") grids: codes `q`, scale `s`, zero point `z`, value `s (q - z)`.

Formulas: Krishnamoorthi 2018, "Quantizing deep convolutional networks", section 2; rounding half to
even and saturation are those of ONNX QuantizeLinear. An array of scales has the rank of the tensor
it quantizes, with size 1 along every axis that shares a scale; a kernel in groups of input channels
has one scale for each group along its last axis but one.

What computes codes and scales takes arrays of NumPy too and stays in NumPy then, bit by bit the
same: kernels of many shapes need no program each.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

NumpyOrJax = Any
"""An array of JAX or of NumPy."""
SMALLEST_SCALE = 1e-12
"""Below this a float32 scale and its reciprocal stop being safe to multiply."""

DEAD_SCALE = 1e-6
"""Scale given to a channel whose values are all zero: any positive number represents it exactly."""

BIAS_LIMIT = 2.0**30
"""Largest bias code allowed; the other half of int32 is left to the accumulated products."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The static half of a quantizer: which integers exist.

    Attributes:
      bits: 2..8, or 16.
      symmetric: True: zero point 0 and signed codes -(2^(b-1)-1)..2^(b-1)-1 (the narrow range).
        False: unsigned codes 0..2^b-1 with a zero point.
      axis: the axis with one scale per index (`-1` for output channels), None for one scale.
      group: so many input channels (the last axis but one) share each scale of an output channel,
        the last group what is left; None for all. Only beside `axis=-1`.
    """

    bits: int
    symmetric: bool = False
    axis: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for other bits, and for groups that are none."""
        if not (2 <= self.bits <= 8 or self.bits == 16):
            raise ValueError(
                f"a grid needs 2 <= bits <= 8, got {self.bits}; the only wider one has 16."
            )
        if self.group is not None and (self.group < 1 or self.axis != -1):
            raise ValueError(
                f"a grid in groups needs groups of at least 1 and axis -1, got groups of "
                f"{self.group} and axis {self.axis}."
            )

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1) - 1) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def dtype(self) -> np.dtype:
        """Storage type of codes and zero points."""
        if self.bits > 8:
            return np.dtype(np.int16 if self.symmetric else np.uint16)
        return np.dtype(np.int8 if self.symmetric else np.uint8)

    def reduced_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of an `ndim`-dimensional tensor that share one scale."""
        return tuple(i for i in range(ndim) if self.axis is None or i != self.axis % ndim)


class Affine(NamedTuple):
    """The traced half of a quantizer.

    Attributes:
      scale: float32, positive; rank of the tensor or 0.
      zero_point: in the storage dtype of the grid; shape of `scale`.
    """

    scale: Float[NumpyOrJax, "..."]
    zero_point: Integer[NumpyOrJax, "..."]


def namespace(*arrays: NumpyOrJax) -> Any:
    """`numpy` where all arrays are NumPy's, so that nothing is compiled; else `jax.numpy`."""
    return np if all(isinstance(x, np.ndarray | np.generic) for x in arrays) else jnp


def round_ste(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds half to even; the gradient passes as if it were the identity."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def from_range(lo: Float[NumpyOrJax, "..."], hi: Float[NumpyOrJax, "..."], grid: Grid) -> Affine:
    """The affine parameters that cover [lo, hi].

    Args:
      lo: lower ends, any finite value; extended to include 0.
      hi: upper ends, same shape; extended to include 0.
      grid: the integers to use.

    Returns:
      Scales and zero points in the shape of `lo`. Empty and denormal ranges get `DEAD_SCALE`, so a
      scale is always finite and positive.
    """
    xp = namespace(lo, hi)
    lo, hi = xp.minimum(lo, 0.0), xp.maximum(hi, 0.0)
    scale = (xp.maximum(-lo, hi) if grid.symmetric else hi - lo) / grid.qmax
    scale = xp.where(scale > SMALLEST_SCALE, scale, DEAD_SCALE).astype(xp.float32)
    zero_point = xp.zeros_like(scale)
    if not grid.symmetric:
        zero_point = (-lo / scale).round().clip(grid.qmin, grid.qmax)
    return Affine(scale, whole(zero_point, grid.dtype))


def spread(affine: Affine, shape: tuple[int, ...], grid: Grid) -> Affine:
    """Parameters that broadcast against a tensor of `shape`: those of groups, repeated over them.

    Args:
      affine: as fitted; grids without groups have theirs as they are.
      shape: of the tensor.
      grid: the integers.

    Returns:
      Parameters with size 1 or that of the tensor along every axis.
    """
    if grid.group is None:
        return affine
    return Affine(*(over_groups(part, shape[-2], grid.group) for part in affine))


def over_groups(per_group: NumpyOrJax, inputs: int, group: int) -> NumpyOrJax:
    """One value for each group, repeated for each of the input channels; differentiable."""
    return per_group.repeat(group, axis=-2)[..., :inputs, :]


def covers(affine: Affine, grid: Grid) -> tuple[Float[NumpyOrJax, "..."], Float[NumpyOrJax, "..."]]:
    """The smallest and largest representable values, in the units of the tensor."""
    zero_point = affine.zero_point.astype(jnp.float32)
    return (grid.qmin - zero_point) * affine.scale, (grid.qmax - zero_point) * affine.scale


def quantize(x: Float[NumpyOrJax, "..."], affine: Affine, grid: Grid) -> Integer[NumpyOrJax, "..."]:
    """Codes of `x` in the storage dtype: `clip(round(x / s) + z, qmin, qmax)`."""
    affine = spread(affine, x.shape, grid)
    zero_point = affine.zero_point.astype(jnp.float32)
    q = over(x, affine.scale).round() + zero_point
    return whole(q.clip(grid.qmin, grid.qmax), grid.dtype)


def whole(q: Float[NumpyOrJax, "..."], dtype: Any) -> Integer[NumpyOrJax, "..."]:
    """Whole numbers as integers; what is no number is 0, as XLA has it."""
    return (q if isinstance(q, Array) else np.nan_to_num(q, nan=0.0)).astype(dtype)


def dequantize(q: Integer[NumpyOrJax, "..."], affine: Affine) -> Float[NumpyOrJax, "..."]:
    """Values of codes: `(q - z) s`; parameters of groups are `spread` before."""
    zero_point = affine.zero_point.astype(jnp.float32)
    return (q.astype(jnp.float32) - zero_point) * affine.scale


def fake_quantize(x: Float[Array, "..."], affine: Affine, grid: Grid) -> Float[Array, "..."]:
    """`dequantize(quantize(x))` in floats, differentiable.

    Args:
      x: any shape that `affine.scale` broadcasts against, once spread over groups.
      affine: scale and zero point.
      grid: the integers to use.

    Returns:
      Same shape. The gradient is 1 inside the range and 0 outside (clipped straight-through);
      with respect to `scale` it is that of LSQ (Esser et al. 2020).
    """
    return snapped(x, steps_of(spread(affine, x.shape, grid), grid))


class Steps(NamedTuple):
    """A grid whose every part is traced, so that one program serves any number of bits.

    Attributes:
      scale: positive.
      low: smallest code less the zero point, a whole number.
      high: largest.
    """

    scale: Float[NumpyOrJax, "..."]
    low: Float[NumpyOrJax, "..."]
    high: Float[NumpyOrJax, "..."]


def steps_of(affine: Affine, grid: Grid) -> Steps:
    """The traced form of a grid; all parts in the shape of the scale."""
    zero_point = affine.zero_point.astype(jnp.float32)
    return Steps(affine.scale, grid.qmin - zero_point, grid.qmax - zero_point)


@jax.custom_vjp
def snapped(x: Float[Array, "..."], steps: Steps) -> Float[Array, "..."]:
    """`fake_quantize` for a traced grid; differentiable in reverse mode, in few passes over `x`."""
    return nearest_values(x, steps)


def over(x: Float[NumpyOrJax, "..."], scale: Float[NumpyOrJax, "..."]) -> Float[NumpyOrJax, "..."]:
    """`x / scale` as a product with the reciprocal.

    XLA divides in one program and multiplies by the reciprocal in the next, which near a tie
    rounds to another code: where it cannot choose, every program and NumPy have the same.
    """
    return x * (np.float32(1) / scale)


def nearest_values(x: Float[NumpyOrJax, "..."], steps: Steps) -> Float[NumpyOrJax, "..."]:
    """The values of a grid nearest to `x`."""
    return over(x, steps.scale).round().clip(steps.low, steps.high) * steps.scale


def snapped_forward(x: Float[Array, "..."], steps: Steps):
    """Values on the grid, and what the gradient needs."""
    return snapped(x, steps), (x, steps)


def snapped_backward(
    saved: tuple[Float[Array, "..."], Steps], g: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Steps]:
    """Gradients by the values, the scale, and the ends of the grid."""
    x, steps = saved
    wanted = over(x, steps.scale)
    below, above = wanted < steps.low, wanted > steps.high
    inside = ~(below | above)
    rounded = jnp.clip(jnp.round(wanted), steps.low, steps.high)
    by_scale = g * (rounded - jnp.where(inside, wanted, 0.0))
    end = lambda outside, v: summed(jnp.where(outside, g * steps.scale, 0.0), v)
    slopes = Steps(summed(by_scale, steps.scale), end(below, steps.low), end(above, steps.high))
    return jnp.where(inside, g, 0.0), slopes


snapped.defvjp(snapped_forward, snapped_backward)


def summed(slopes: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """Slopes summed over the axes along which a scale is broadcast."""
    return jax.vjp(lambda v: jnp.broadcast_to(v, slopes.shape), like)[1](slopes)[0]


def bias_scale(
    input_scale: Float[NumpyOrJax, ""], kernel_scale: Float[NumpyOrJax, "..."]
) -> Float[NumpyOrJax, " chan"]:
    """Scale of an int32 bias: exactly the float32 product `x_scale * w_scale`, per channel."""
    return (input_scale * kernel_scale).reshape(-1)


def guard_bias_overflow(
    kernel_scale: Float[NumpyOrJax, "..."],
    input_scale: Float[NumpyOrJax, ""],
    bias: Float[NumpyOrJax, " chan"],
) -> Float[NumpyOrJax, "..."]:
    """Raises kernel scales until every bias code fits into half of int32.

    A channel of tiny weights with a large bias would otherwise overflow int32 at run time.

    Args:
      kernel_scale: scales of the kernel, channels last.
      input_scale: scale of the layer's input.
      bias: float bias, one per channel.

    Returns:
      Scales `>= |bias| / (input_scale * 2**30)`; unchanged where that held already.
    """
    least = over(abs(bias), input_scale * BIAS_LIMIT).reshape(
        (1,) * (kernel_scale.ndim - 1) + (-1,)
    )
    return kernel_scale.clip(least)


def quantize_bias(
    bias: Float[NumpyOrJax, " chan"],
    input_scale: Float[NumpyOrJax, ""],
    kernel_scale: Float[NumpyOrJax, "..."],
) -> Int[NumpyOrJax, " chan"]:
    """int32 codes of a bias at scale `input_scale * kernel_scale`, zero point 0."""
    q = over(bias, bias_scale(input_scale, kernel_scale)).round()
    return whole(q.clip(-BIAS_LIMIT, BIAS_LIMIT), jnp.int32)
