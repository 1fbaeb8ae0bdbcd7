"""Integer arithmetic that is exact on every backend.

XLA has no fast int8 convolution on CPU. A float32 product of small integers is exact while its
sums stay below 2^24, so a kernel is split into a high and a low nibble and multiplied twice.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

EXACT = 2**24
"""Integers up to this size, and sums of them up to this size, are exact in float32."""

MOST_TERMS = EXACT // 256
"""How many products of codes a sum may have, so that every partial sum is exact."""

Product = Callable[[Float[Array, "..."], Float[Array, "..."]], Float[Array, "..."]]


def nibbles(q: Int[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(high, low) with `q == 16 * high + low`, -8 <= low <= 7, as float32."""
    low = jnp.bitwise_and(q + 8, 15) - 8
    high = (q - low) // 16
    return high.astype(jnp.float32), low.astype(jnp.float32)


def exact_product(
    x: Int[Array, "..."], w: Int[Array, "..."], product: Product, reduction: int
) -> Int[Array, "..."]:
    """`product(x, w)` in exact integer arithmetic, for a bilinear `product` of float32 arrays.

    Args:
      x: int32 codes less their zero point, |x| <= 255.
      w: int32 codes less their zero point, |w| <= 127; up to 255 for at most 33,025 terms, above
        which the int32 sum itself could overflow.
      product: a convolution or matrix product (highest precision on accelerators).
      reduction: how many terms each output sums.

    Returns:
      int32 sums.

    Raises:
      ValueError: if `reduction` exceeds 65,536 terms, where a partial sum could round.
    """
    if reduction > MOST_TERMS:
        raise ValueError(f"exact_product() sums at most {MOST_TERMS} terms, got {reduction}.")
    high, low = nibbles(w)
    if 255 * 16 * reduction <= EXACT:
        xs = x.astype(jnp.float32)
        return 16 * as_int(product(xs, high)) + as_int(product(xs, low))
    x_high, x_low = nibbles(x)
    middle = as_int(product(x_high, low)) + as_int(product(x_low, high))
    return 256 * as_int(product(x_high, high)) + 16 * middle + as_int(product(x_low, low))


def as_int(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """An exact integer held in float32, as int32."""
    return jnp.round(x).astype(jnp.int32)
