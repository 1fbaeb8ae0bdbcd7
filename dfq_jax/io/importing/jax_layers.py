"""Norms of JAX as `jax_norms` found them."""

from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.importing import layers
from dfq_jax.io.importing.arrange import permuted
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.values import Value, extent

Array = np.ndarray


def batch_norm(
    b: Builder, x: Value, like: Any, mean: Any, var: Array, scale: Any, bias: Any, eps: float
) -> Value:
    """Batch norm; `like` varies along the axis of channels.

    Raises:
      UnsupportedModelError: if its vectors do not have as many values as that axis.
    """
    size, rank = var.size, len(x.dims)
    axis = channel_axis(like, size, rank)
    if extent(x.dims[axis]) != size:
        raise UnsupportedModelError(
            f"a batch norm of {size} channels reads shape {x.shape}, axis {axis}."
        )
    turned = permuted(x, (0, axis, *(i for i in range(1, rank) if i != axis)))
    factor, shift, centre = (evaluated(terms, size) for terms in (scale, bias, mean))
    spread = var.reshape(-1).astype(np.float32)
    y = layers.batch_norm(b, turned, factor, shift, centre, spread, eps)
    back = [0, *range(2, rank)]
    back.insert(axis, 1)
    return permuted(y, back)


def channel_axis(like: Array, size: int, rank: int) -> int:
    """The axis along which a constant of a value's rank has `size` values; else the last one."""
    strides = zip(like.shape, like.strides, strict=True)
    axes = [i for i, (n, stride) in enumerate(strides) if n == size and stride]
    at = axes[-1] if axes else like.ndim - 1
    return at + rank - like.ndim


def evaluated(terms: tuple[Any, ...], size: int) -> Array:
    """A sum of products of constant vectors: (number, ((vector, power), ...)) each."""
    total = np.zeros(size, np.float64)
    for number, factors in terms:
        product = np.full(size, number, np.float64)
        for vector, power_of in factors:
            product *= vector.reshape(-1).astype(np.float64) ** power_of
        total += product
    return total.astype(np.float32)
