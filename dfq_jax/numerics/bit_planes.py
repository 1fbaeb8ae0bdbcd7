"""Codes of which the lowest bits may be left out: vertical layers.

A code of `B` bits is its `b` highest bits and planes of one bit below them. Cutting is a shift, so
cuts compose, where rounding to nearest would not:

    q_b = q_B >> (B - b),   w_b = t_b (q_b + 1/2)

The half puts a value in the middle of what its code has been cut from; without it every cut would
draw weights down (mid-rise).

Reference:
  Wu et al. 2022, "Vertical Layering of Quantized Neural Networks for Heterogeneous Inference"; its
  formulas are not public, these are ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Integer, UInt8

from dfq_jax.numerics.affine import NumpyOrJax

TOP = 8
"""Bits of whole codes."""


def without_lowest_bits(codes: Integer[NumpyOrJax, "..."], bits: int) -> Integer[NumpyOrJax, "..."]:
    """The highest bits of codes of 8, as codes of their own: shifted, rounded down."""
    return codes >> (TOP - bits)


def doubled_and_one(codes: Integer[np.ndarray, "..."], bits: int) -> Int8[np.ndarray, "..."]:
    """`2 q_b + 1` of codes of 8 bits: odd integers in `(-2**b, 2**b)`, whose step is `t_b / 2`."""
    return (2 * without_lowest_bits(np.asarray(codes, np.int16), bits) + 1).astype(np.int8)


def on_cut_codes(
    x: Float[Array, "..."],
    unit: Float[Array, "..."],
    step: Float[Array, "..."],
    merged: float | Float[Array, ""],
) -> Float[Array, "..."]:
    """Weights on the levels of a cut: `t_b (q_b + 1/2)`.

    The slope by weights is 1 within the range of whole codes, else 0; by steps it is the code and a
    half.

    Args:
      x: weights.
      unit: step of whole codes, broadcasting to them.
      step: t_b.
      merged: how many whole codes become one, `2**(B - b)`; may be traced, so that one program
        serves every width.
    """
    most = 2 ** (TOP - 1) - 1
    whole = jnp.clip(jnp.round(x / unit), -most, most)
    middle = jax.lax.stop_gradient(jnp.floor(whole / merged) + 0.5)
    inside = jnp.clip(x, -most * unit, most * unit)
    return step * middle + (inside - jax.lax.stop_gradient(inside))


def planes_from(codes: Int8[np.ndarray, "..."]) -> tuple[UInt8[np.ndarray, " bytes"], ...]:
    """Codes of 8 bits as planes of one bit, the sign first, eight codes a byte."""
    raw = np.asarray(codes, np.int8).reshape(-1).view(np.uint8)
    return tuple(np.packbits(raw >> place & 1) for place in range(TOP - 1, -1, -1))


def cut_from_planes(
    planes: tuple[UInt8[np.ndarray, " bytes"], ...], shape: tuple[int, ...]
) -> Int8[np.ndarray, "..."]:
    """Codes of as many bits as planes are given: the first ones suffice for a cut.

    Args:
      planes: the first of `planes_from`, at least one.
      shape: of the codes.
    """
    count = int(np.prod(shape))
    codes = np.zeros(count, np.int16)
    for number, plane in enumerate(planes):
        bit = np.unpackbits(plane, count=count).astype(np.int16)
        codes = -bit if number == 0 else 2 * codes + bit
    return codes.reshape(shape).astype(np.int8)
