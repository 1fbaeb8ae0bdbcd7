"""Pooling, reductions and resampling, with the size rules of their source."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    AvgPool,
    GlobalAvgPool,
    MaxPool,
    Op,
    Pads,
    Pair,
    Reduce,
    Reduction,
    Resize,
)
from dfq_jax.io.importing.arrange import apart, padded_value
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.layers import check_pixels, extent_of, from_image, image
from dfq_jax.io.importing.pointwise import affine, mapped
from dfq_jax.io.importing.values import Value

NO_PADS: Pads = ((0, 0), (0, 0))


def window_op(b: Builder, op: Op, x: Value, size: Sequence[int]) -> Value:
    """An image operator that keeps channels and makes `size` pixels."""
    check_pixels(size)
    return from_image(x, b.add(op, (image(b, x),)), size, x.dims[1])


def output_size(
    x: Value, window: Pair, strides: Pair, padding: Pads, dilation: Pair, ceil: bool
) -> tuple[list[int], Pads]:
    """Size of a pooled image, and padding with which whole windows give that size.

    With `ceil` a last, partial window counts if it starts inside the image or its first padding
    (PyTorch's rule, and ONNX's since opset 19): the padding grows to complete it.
    """
    size, wide = [], []
    for axis in (0, 1):
        have, (low, high) = extent_of(x, axis), padding[axis]
        k, s = dilation[axis] * (window[axis] - 1) + 1, strides[axis]
        room = have + low + high - k
        out = (-(-room // s) if ceil else room // s) + 1
        if ceil and (out - 1) * s >= have + low:
            out -= 1
        size.append(out)
        wide.append((low, max(high, (out - 1) * s + k - have - low)))
    return size, (wide[0], wide[1])


def max_pool(
    b: Builder,
    x: Value,
    window: Pair,
    strides: Pair,
    padding: Pads,
    dilation: Pair = (1, 1),
    ceil: bool = False,
) -> Value:
    """Maximum over windows."""
    size, wide = output_size(x, window, strides, padding, dilation, ceil)
    return window_op(b, MaxPool(window, strides, wide, dilation), x, size)


def avg_pool(
    b: Builder,
    x: Value,
    window: Pair,
    strides: Pair,
    padding: Pads,
    *,
    ceil: bool = False,
    count_padding: bool = True,
    divisor: int | None = None,
) -> Value:
    """Mean over windows.

    A partial window of `ceil` counts its pixels and, with `count_padding`, the padding proper, but
    nothing beyond: then the padding becomes pixels, and what is beyond is not counted.
    """
    size, wide = output_size(x, window, strides, padding, (1, 1), ceil)
    if divisor is not None:
        y = window_op(b, AvgPool(window, strides, wide), x, size)
        return affine(b, y, window[0] * window[1] / divisor)
    if wide == padding:
        counted = count_padding or padding == NO_PADS
        return window_op(b, AvgPool(window, strides, padding, counted), x, size)
    if count_padding and padding != NO_PADS:
        beyond = [(0, w[1] - p[1]) for w, p in zip(wide, padding, strict=True)]
        first = 4 - len(x.dims)  # lines have no height
        x = padded_value(b, x, {2 + i - first: padding[i] for i in range(first, 2)})
        wide = beyond[0], beyond[1]
    return window_op(b, AvgPool(window, strides, wide, count_padding=False), x, size)


def adaptive_avg_pool(b: Builder, x: Value, size: Sequence[int | None]) -> Value:
    """Mean over as many windows as asked for; None keeps a size."""
    have = [extent_of(x, axis) for axis in (0, 1)]
    wanted = ([None] if len(size) == 1 else []) + list(size)
    out = [h if w is None else w for h, w in zip(have, wanted, strict=True)]
    if out == have:
        return x
    if out == [1, 1]:
        return reduced(b, x, "mean", range(2, len(x.dims)), keepdims=True)
    if all(h % o == 0 for h, o in zip(have, out, strict=True)):
        window = have[0] // out[0], have[1] // out[1]
        return window_op(b, AvgPool(window, window), x, out)
    return window_op(b, AdaptiveAvgPool((out[0], out[1])), x, out)


def adaptive_max_pool(b: Builder, x: Value, size: Sequence[int | None]) -> Value:
    """Maximum over windows that divide the image."""
    have = [extent_of(x, axis) for axis in (0, 1)]
    wanted = ([None] if len(size) == 1 else []) + list(size)
    out = [h if w is None else w for h, w in zip(have, wanted, strict=True)]
    if any(h % o for h, o in zip(have, out, strict=True)):
        raise UnsupportedModelError(
            f"adaptive max pooling from {have} to {out} pixels: windows would differ in size."
        )
    window = have[0] // out[0], have[1] // out[1]
    return x if out == have else window_op(b, MaxPool(window, window), x, out)


def reduced(
    b: Builder, x: Value, kind: Reduction, axes: Sequence[int], *, keepdims: bool = False
) -> Value:
    """Mean, sum, maximum or Euclidean norm over source axes; none means all but the batch."""
    rank = len(x.dims)
    chosen = sorted({a % rank for a in axes} or set(range(1, rank)))
    large = [a for a in chosen if x.shape[a] > 1]
    if not large:
        y = mapped(b, Activation("abs"), x) if kind == "l2" else x
    else:
        x, at = apart(b, x, large)
        stored = tuple(sorted(at))
        pool = kind == "mean" and stored == (1, 2) and len(x.axes) == 3
        keeps = keepdims and not pool  # global pooling: see `tidy.kept_dimensions`
        name = b.add(GlobalAvgPool() if pool else Reduce(kind, stored, keeps), (x.name,))
        left = tuple(() if i in stored else d for i, d in enumerate(x.axes, 1))
        left = left if keeps else tuple(d for i, d in enumerate(left, 1) if i not in stored)
        dims = tuple(() if i in large else d for i, d in enumerate(x.dims))
        y = Value(name, left, dims)
    if keepdims:
        return y
    return Value(y.name, y.axes, tuple(d for i, d in enumerate(y.dims) if i not in chosen))


def resized(
    b: Builder,
    x: Value,
    size: Sequence[int],
    scale: Sequence[float | None],
    method: Literal["nearest", "bilinear", "bicubic"],
    coordinates: Literal["half_pixel", "asymmetric", "align_corners"],
) -> Value:
    """Height and width resampled; a scale of None is size over size."""
    return resampled(b, x, size, scale, Resize((1, 1), (1.0, 1.0), method, coordinates))


def resampled(
    b: Builder, x: Value, size: Sequence[int], scale: Sequence[float | None], op: Resize
) -> Value:
    """Height and width resampled as `op` does it, but to this size and by this scale."""
    have = [extent_of(x, axis) for axis in (0, 1)]
    if list(size) == have and all(s in (None, 1) for s in scale):
        return x
    exact = [
        float(np.float32(o / h)) if s is None else float(s)
        for o, h, s in zip(size, have, scale, strict=True)
    ]
    op = dataclasses.replace(op, size=(size[0], size[1]), scale=(exact[0], exact[1]))
    return window_op(b, op, x, size)
