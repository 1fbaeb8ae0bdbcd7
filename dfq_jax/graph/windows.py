"""Pooling and resampling: operators that read neighbourhoods of pixels."""

import math
from collections.abc import Callable
from typing import assert_never

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from dfq_jax.graph.maxpool import maximum_by_shifts
from dfq_jax.graph.ops import (
    AdaptiveAvgPool,
    AvgPool,
    GlobalAvgPool,
    MaxPool,
    Pair,
    Pool,
    Resize,
)

MOST_SHIFTS = 25
"""Entries of a window up to which shifts pay on a CPU."""
Images = Shaped[Array, "n h w c"]
Smaller = Shaped[Array, "n oh ow c"]


def pooled(op: Pool, x: Images) -> Shaped[Array, "n ..."]:
    """The pooling `op` of `x`."""
    match op:
        case MaxPool():
            return max_pool(op, x)
        case AvgPool():
            return average_pool(op, x)
        case AdaptiveAvgPool((height, width)):
            rows, columns = (
                jnp.asarray(even_windows(size, out), x.dtype)
                for size, out in zip(x.shape[1:3], (height, width), strict=True)
            )
            return jnp.einsum("nhwc,ih,jw->nijc", x, rows, columns)
        case GlobalAvgPool(keepdims):
            return jnp.mean(x, axis=(1, 2), keepdims=keepdims)
        case _:
            assert_never(op)


def over_windows(
    op: MaxPool | AvgPool, x: Images, start: float, combine: Callable[[Array, Array], Array]
) -> Smaller:
    """Reduction over the spatial windows of an operator."""
    dilation = op.dilation if isinstance(op, MaxPool) else (1, 1)
    return lax.reduce_window(
        x,
        start,
        combine,
        (1, *op.window, 1),
        (1, *op.strides, 1),
        ((0, 0), *op.padding, (0, 0)),
        window_dilation=(1, *dilation, 1),
    )


def max_pool(op: MaxPool, x: Images) -> Smaller:
    """Maximum over windows."""
    native = lambda x: over_windows(op, x, -jnp.inf, lax.max)
    if not shiftable(op) or not jnp.issubdtype(x.dtype, jnp.floating):
        return native(x)
    by_shifts = lambda x: maximum_by_shifts(x, op, (x.shape[1], x.shape[2]))
    return lax.platform_dependent(x, cpu=by_shifts, default=native)


def shiftable(op: MaxPool) -> bool:
    """Whether shifts serve a maximum over windows on a CPU."""
    few = op.window[0] * op.window[1] <= MOST_SHIFTS
    return few and min(min(pads) for pads in op.padding) >= 0


def average_pool(op: AvgPool, x: Images) -> Smaller:
    """Mean over windows, dividing by the window or by the pixels actually covered."""
    total = over_windows(op, x, 0.0, lax.add)
    if op.count_padding:
        return total / (op.window[0] * op.window[1])
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / over_windows(op, ones, 0.0, lax.add)


def even_windows(size: int, out: int) -> Float[np.ndarray, "out size"]:
    """The averaging matrix of adaptive pooling: window i is floor(i s / o) .. ceil((i + 1) s / o).

    Args:
      size: pixels along the axis.
      out: windows along it.

    Returns:
      Weights, rows summing to 1.
    """
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        first, last = i * size // out, -(-(i + 1) * size // out)
        matrix[i, first:last] = 1 / (last - first)
    return matrix


def resized(op: Resize, x: Images) -> Smaller:
    """`x` resampled to the size of `resized_to`."""
    target = resized_to(op, (x.shape[1], x.shape[2]))
    for axis in (1, 2):
        size, out, scale = x.shape[axis], target[axis - 1], op.scale[axis - 1]
        if op.method == "nearest":
            x = jnp.take(x, nearest_pixels(op, size, out, scale), axis=axis)
            continue
        if op.method == "bicubic" or op.smooth:
            mixed = jnp.asarray(interpolation(op, size, out, scale), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(mixed, x, (1, axis)), 0, axis)
            continue
        low, weight = neighbours(op, size, out, scale)
        share = jnp.asarray(weight, x.dtype).reshape(-1, *(1,) * (3 - axis))
        below = jnp.take(x, low, axis=axis)
        above = jnp.take(x, np.minimum(low + 1, size - 1), axis=axis)
        x = below * (1 - share) + above * share
    return x


def resized_to(op: Resize, image: Pair) -> Pair:
    """Height and width of what a resampling makes of an image of this height and width."""
    if op.size is not None:
        return op.size
    return int(image[0] * op.scale[0]), int(image[1] * op.scale[1])


def nearest_pixels(op: Resize, size: int, out: int, scale: float) -> Int[np.ndarray, " out"]:
    """The input pixel each output pixel copies."""
    at = coordinates(op, size, out, scale)
    index = np.floor(at if op.coordinates == "asymmetric" else at + np.float32(0.5))
    return np.clip(index, 0, size - 1).astype(np.int32)


def neighbours(
    op: Resize, size: int, out: int, scale: float
) -> tuple[Int[np.ndarray, " out"], Float[np.ndarray, " out"]]:
    """The input pixel below each output pixel, and the share of the one above it."""
    at = np.clip(coordinates(op, size, out, scale), 0, size - 1)
    low = np.floor(at)
    return low.astype(np.int32), (at - low).astype(np.float32)


def interpolation(op: Resize, size: int, out: int, scale: float) -> Float[np.ndarray, "out size"]:
    """The matrix of a resampling along one axis, of any method but `nearest`; rows sum to 1."""
    if op.method == "bicubic" or op.smooth:
        return kernel_matrix(op, size, out, scale)
    low, share = neighbours(op, size, out, scale)
    matrix = np.zeros((out, size), np.float32)
    np.add.at(matrix, (np.arange(out), low), 1 - share)
    np.add.at(matrix, (np.arange(out), np.minimum(low + 1, size - 1)), share)
    return matrix


def kernel_matrix(op: Resize, size: int, out: int, scale: float) -> Float[np.ndarray, "out size"]:
    """The matrix of a resampling by a kernel that reaches further than the next pixel."""
    at = coordinates(op, size, out, scale).astype(np.float64)
    wide = max(1.0, 1 / scale) if op.smooth else 2.0
    first = np.floor(at - wide).astype(np.int64)
    matrix = np.zeros((out, size))
    for pixel in (first + step for step in range(2 * math.ceil(wide) + 2)):
        distance = np.abs(at - pixel)
        weight = keys(distance, op.cubic) if op.method == "bicubic" else 1 - distance / wide
        counts = distance < wide
        if op.inside:
            counts &= (pixel >= 0) & (pixel < size)
        np.add.at(
            matrix, (np.arange(out), np.clip(pixel, 0, size - 1)), np.where(counts, weight, 0)
        )
    beyond = np.flatnonzero(matrix.sum(1) == 0)  # no pixel within reach: the one at the border
    matrix[beyond, np.clip(first[beyond], 0, size - 1)] = 1
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def keys(distance: Float[np.ndarray, " n"], a: float) -> Float[np.ndarray, " n"]:
    """The cubic convolution kernel at distances below 2.

    Reference:
      Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing".
    """
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance <= 1, near, far)


def coordinates(op: Resize, size: int, out: int, scale: float) -> Float[np.ndarray, " out"]:
    """Where each output pixel lies in the input, in float32 as runtimes compute it."""
    i = np.arange(out, dtype=np.float32)
    match op.coordinates:
        case "half_pixel":
            return ((i + np.float32(0.5)) / np.float32(scale) - np.float32(0.5)).astype(np.float32)
        case "asymmetric":
            return (i / np.float32(scale)).astype(np.float32)
        case "align_corners":
            return (i * np.float32((size - 1) / max(out - 1, 1))).astype(np.float32)
        case _:
            assert_never(op.coordinates)
