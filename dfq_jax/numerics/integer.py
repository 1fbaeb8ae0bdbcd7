"""Integer arithmetic that is exact on every backend.

XLA has no fast int8 convolution on CPU. A float32 product of small integers is exact while its
sums stay below 2^24, so a kernel is split into a high and a low nibble and multiplied twice.
"""

from collections.abc import Callable
from functools import reduce

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dfq_jax.numerics.affine import NumpyOrJax

EXACT = 2**24
"""Integers up to this size, and sums of them up to this size, are exact in float32."""

MOST_TERMS = EXACT // 256
"""How many products of codes may be summed at once, so that every partial sum is exact."""

LARGEST_SUM = 2**31 - 1
"""What sums of products may come to: kernels add them up in int32, and so does `exact_product`."""

Product = Callable[[Float[NumpyOrJax, "..."], Float[NumpyOrJax, "..."]], Float[NumpyOrJax, "..."]]


def nibbles(q: Int[NumpyOrJax, "..."]) -> tuple[Float[NumpyOrJax, "..."], Float[NumpyOrJax, "..."]]:
    """(high, low) with `q == 16 * high + low`, -8 <= low <= 7, as float32."""
    low = ((q + 8) & 15) - 8
    high = (q - low) // 16
    return high.astype(jnp.float32), low.astype(jnp.float32)


def exact_product(
    x: Int[NumpyOrJax, "..."], w: Int[NumpyOrJax, "..."], product: Product, reduction: int
) -> Int[NumpyOrJax, "..."]:
    """`product(x, w)` in exact integer arithmetic, for a bilinear `product` of float32 arrays.

    Sums of more than 65,536 terms are made of pieces: the same product with all but some rows of
    `w` set to zero.

    Args:
      x: int32 codes less their zero point, |x| <= 255.
      w: int32 codes less their zero point, |w| <= 255; what is summed runs over its last axes but
        one.
      product: a convolution or matrix product (highest precision on accelerators).
      reduction: how many terms each output sums.

    Returns:
      int32 sums; as in the kernels of a runtime, those beyond `LARGEST_SUM` wrap around
      (`quantization/sums.py` foretells them).
    """
    if reduction <= MOST_TERMS:
        return product_at_once(x, w, product, reduction)
    rows = np.arange(w.size // w.shape[-1]).reshape(*w.shape[:-1], 1) % reduction // MOST_TERMS
    pieces = range(-(-reduction // MOST_TERMS))
    parts = [
        product_at_once(x, w * (rows == i).astype(w.dtype), product, MOST_TERMS) for i in pieces
    ]
    return reduce(lambda a, b: a + b, parts)


def product_at_once(
    x: Int[NumpyOrJax, "..."], w: Int[NumpyOrJax, "..."], product: Product, terms: int
) -> Int[NumpyOrJax, "..."]:
    """`exact_product` where at most `MOST_TERMS` terms of a sum are not zero."""
    high, low = nibbles(w)
    if 255 * 16 * terms <= EXACT:
        xs = x.astype(jnp.float32)
        return 16 * as_int(product(xs, high)) + as_int(product(xs, low))
    x_high, x_low = nibbles(x)
    middle = as_int(product(x_high, low)) + as_int(product(x_low, high))
    return 256 * as_int(product(x_high, high)) + 16 * middle + as_int(product(x_low, low))


def as_int(x: Float[NumpyOrJax, "..."]) -> Int[NumpyOrJax, "..."]:
    """An exact integer held in float32, as int32."""
    return x.round().astype(jnp.int32)
