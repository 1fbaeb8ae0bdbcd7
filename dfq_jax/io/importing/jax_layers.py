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
EPSILON = 1e-5
"""Of batch norms of which only the statistics are known: their scale makes up for it."""


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


def named_batch_norm(
    b: Builder, x: Value, steps: tuple[Any, ...], mean: Array, spread: Array, spread_is: str
) -> Value:
    """A batch norm by the statistics it has and by what it does, step after step.

    Args:
      b: the graph.
      x: what it reads.
      steps: (operator, constant or None, whether the constant comes first) each.
      mean: of each channel.
      spread: of each channel.
      spread_is: `var`, `std` or `inv_std`.

    Raises:
      UnsupportedModelError: if its vectors do not have as many values as an axis, or a step is none
        that a factor and a shift can do.
    """
    size, rank = mean.size, len(x.dims)
    wide = [c for _, c, _ in steps if isinstance(c, np.ndarray) and c.ndim]
    axis = next((at for c in wide if (at := widest(c, size, rank)) is not None), rank - 1)
    if extent(x.dims[axis]) != size or spread.size != size:
        raise UnsupportedModelError(
            f"a batch norm of {size} channels reads shape {x.shape}, axis {axis}."
        )
    factor, shift = np.ones(size), np.zeros(size)
    for kind, constant, first in steps:
        value = 0.0 if constant is None else along(constant, x.shape, [rank - 1 - axis])
        factor, shift = stepped(kind, factor, shift, np.asarray(value, np.float64), first)
    centre, wide_as = (v.reshape(-1).astype(np.float64) for v in (mean, spread))
    variance = {"var": wide_as, "std": wide_as**2}.get(spread_is, 1 / wide_as**2)
    scale, bias = factor * np.sqrt(variance + EPSILON), shift + factor * centre
    scale, bias, centre, variance = np.asarray([scale, bias, centre, variance], np.float32)
    turned = channels_second(x, axis)
    return channels_back(layers.batch_norm(b, turned, scale, bias, centre, variance, EPSILON), axis)


def widest(constant: Array, size: int, rank: int) -> int | None:
    """The axis of a value of that rank along which a constant has `size` values of its own."""
    own = np.asarray(compact(constant))
    places = [rank - own.ndim + i for i, n in enumerate(own.shape) if n == size and n > 1]
    return places[-1] if places else None


def stepped(
    kind: str, factor: Array, shift: Array, value: Array, first: bool
) -> tuple[Array, Array]:
    """Factor and shift after one more step."""
    match kind:
        case "add":
            return factor, shift + value
        case "sub":
            return (-factor, value - shift) if first else (factor, shift - value)
        case "mul":
            return factor * value, shift * value
        case "div" if not first:
            return factor / value, shift / value
        case "neg":
            return -factor, -shift
        case "div":
            raise UnsupportedModelError("a batch norm that divides by what it normalises.")
        case _:  # copies and casts
            return factor, shift


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
