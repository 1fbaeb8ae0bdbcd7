"""Norms of JAX as `jax_norms` and `jax_statistics` found them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.importing import layers
from dfq_jax.io.importing.arrange import permuted
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.jax_ops import compact
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
    turned = channels_second(x, axis)
    factor, shift, centre = (evaluated(terms, size) for terms in (scale, bias, mean))
    spread = var.reshape(-1).astype(np.float32)
    y = layers.batch_norm(b, turned, factor, shift, centre, spread, eps)
    return channels_back(y, axis)


def channels_second(x: Value, axis: int) -> Value:
    """A value with one of its axes right behind the batch."""
    return permuted(x, (0, axis, *(i for i in range(1, len(x.dims)) if i != axis)))


def channels_back(x: Value, axis: int) -> Value:
    """A value whose second axis goes to where it was."""
    order = [0, *range(2, len(x.dims))]
    order.insert(axis, 1)
    return permuted(x, order)


def layer_norm(b: Builder, x: Value, scale: Any, bias: Any, count: int, eps: float) -> Value:
    """Normalisation over the last `count` axes."""
    shape = x.shape[len(x.dims) - count :]
    vectors = [None if v is None else along(v, x.shape, range(count)) for v in (scale, bias)]
    factor, shift = (None if v is None else np.broadcast_to(v, shape) for v in vectors)
    return layers.layer_norm(b, x, count, factor, shift, eps)


def group_norm(
    b: Builder, x: Value, scale: Any, bias: Any, groups: int, axis: int, eps: float
) -> Value:
    """Normalisation over positions and groups of channels, which are one axis."""
    behind = len(x.dims) - 1 - axis
    given = [None if v is None else along(v, x.shape, [behind]) for v in (scale, bias)]
    factor, shift = (None if v is None else np.broadcast_to(v, x.shape[axis]) for v in given)
    y = layers.group_norm(b, channels_second(x, axis), groups, factor, shift, eps)
    return channels_back(y, axis)


def along(vector: Any, shape: Sequence[int], axes: Iterable[int]) -> Array:
    """A constant that varies along some axes only, counted from the last, without the others.

    Raises:
      UnsupportedModelError: if it varies along others too.
    """
    found = np.asarray(compact(vector), np.float32)
    found = found.reshape((1,) * (len(shape) - found.ndim) + found.shape)
    others = tuple(i for i in range(len(shape)) if len(shape) - 1 - i not in axes)
    if any(found.shape[i] != 1 for i in others):
        raise UnsupportedModelError(f"a norm with parameters of shape {np.shape(vector)}.")
    return found.reshape([n for i, n in enumerate(found.shape) if i not in others])


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
