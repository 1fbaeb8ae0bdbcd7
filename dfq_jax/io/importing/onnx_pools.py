"""ONNX's pooling, reductions, resampling and padding: what each becomes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Activation, Power, Reduction
from dfq_jax.io.importing import pointwise, pools, volumes
from dfq_jax.io.importing.arrange import padded_value
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.onnx_ops import constant, window
from dfq_jax.io.importing.values import Value

Ints = Sequence[int]


def max_pool(
    b: Builder,
    x: Value,
    kernel_shape: Ints,
    ceil_mode: int = 0,
    strides: Ints | None = None,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    auto_pad: str = "NOTSET",
) -> tuple[Value, None]:
    """MaxPool; nobody may read the indices."""
    if len(x.dims) == 5:
        whole = volumes.volume_window(x, kernel_shape, strides, dilations, pads, auto_pad)
        return volumes.max_volumes(b, x, *whole, ceil=bool(ceil_mode)), None
    given = window(x, kernel_shape, strides, dilations, pads, auto_pad)
    return pools.max_pool(b, x, *given, ceil=bool(ceil_mode)), None


def average_pool(
    b: Builder,
    x: Value,
    kernel_shape: Ints,
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    strides: Ints | None = None,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    auto_pad: str = "NOTSET",
) -> Value:
    """AveragePool."""
    counted, up = bool(count_include_pad), bool(ceil_mode)
    if any(d != 1 for d in dilations or ()):
        raise UnsupportedModelError("dilated average pooling.")
    if len(x.dims) == 5:
        whole = volumes.volume_window(x, kernel_shape, strides, dilations, pads, auto_pad)
        return volumes.mean_volumes(b, x, *whole[:3], ceil=up, count_padding=counted)
    size, steps, padding, _ = window(x, kernel_shape, strides, dilations, pads, auto_pad)
    return pools.avg_pool(b, x, size, steps, padding, ceil=up, count_padding=counted)


def lp_pool(
    b: Builder,
    x: Value,
    kernel_shape: Ints,
    p: int = 2,
    ceil_mode: int = 0,
    strides: Ints | None = None,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    auto_pad: str = "NOTSET",
) -> Value:
    """LpPool: the norm over windows, out of powers and their mean."""
    size, steps, padding, dilation = window(x, kernel_shape, strides, dilations, pads, auto_pad)
    if dilation != (1, 1) or p < 1:
        raise UnsupportedModelError(
            f"dilations = {dilations}, p = {p}; only norms of undilated windows are supported."
        )
    y = pointwise.mapped(b, Activation("abs"), x) if p % 2 else x
    y = y if p == 1 else pointwise.mapped(b, Power(float(p)), y)
    y = pools.avg_pool(b, y, size, steps, padding, ceil=bool(ceil_mode), divisor=1)
    return y if p == 1 else pointwise.mapped(b, Power(1 / p), y)


def global_pool(kind: Reduction, b: Builder, x: Value) -> Value:
    """GlobalAveragePool, GlobalMaxPool."""
    return pools.reduced(b, x, kind, range(2, len(x.dims)), keepdims=True)


def reduction(
    kind: Reduction,
    b: Builder,
    x: Value,
    given: Any = None,
    axes: Ints | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Value:
    """ReduceMean, ReduceSum, ReduceMax, ReduceL2; axes as an attribute or an input."""
    chosen = axes if given is None else tuple(int(a) for a in constant(given, "axes"))
    if not chosen and noop_with_empty_axes:
        return pointwise.mapped(b, Activation("abs"), x) if kind == "l2" else x
    if not chosen:
        raise UnsupportedModelError("a reduction over all axes, the batch among them.")
    return pools.reduced(b, x, kind, chosen, keepdims=bool(keepdims))


def least(
    b: Builder,
    x: Value,
    given: Any = None,
    axes: Ints | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Value:
    """ReduceMin: the greatest of the negatives."""
    negative = pointwise.affine(b, x, -1.0)
    greatest = reduction("max", b, negative, given, axes, keepdims, noop_with_empty_axes)
    return pointwise.affine(b, greatest, -1.0)


def pad(
    b: Builder,
    x: Value,
    pads: Any,
    value: Any = None,
    axes: Any = None,
    mode: str = "constant",
) -> Value:
    """Pad, by attributes before opset 11."""
    amounts = [int(p) for p in (pads if isinstance(pads, tuple) else constant(pads, "padding"))]
    over = range(len(x.dims)) if axes is None else [int(a) for a in constant(axes, "axes")]
    half = len(amounts) // 2
    rank = len(x.dims)
    widths = {a % rank: (amounts[i], amounts[half + i]) for i, a in enumerate(over)}
    fill = 0.0 if value is None or np.size(value) == 0 else number(value)
    return padded_value(b, x, {a: w for a, w in widths.items() if w != (0, 0)}, fill, mode)


def number(given: Any) -> float:
    """A number from an input or an attribute."""
    return given if isinstance(given, float) else float(constant(given, "value").reshape(()))
