"""ONNX's pooling, reductions, resampling and padding: what each becomes."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Reduction
from dfq_jax.io.importing import pools
from dfq_jax.io.importing.arrange import padded
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.onnx_ops import constant, window
from dfq_jax.io.importing.values import Value

Ints = Sequence[int]


def max_pool(
    b: Builder, x: Value, kernel_shape: Ints, ceil_mode: int = 0, **named: Any
) -> tuple[Value, None]:
    """MaxPool; nobody may read the indices."""
    given = window(x, kernel_shape, named)
    return pools.max_pool(b, x, *given, ceil=bool(ceil_mode)), None


def average_pool(
    b: Builder,
    x: Value,
    kernel_shape: Ints,
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    **named: Any,
) -> Value:
    """AveragePool."""
    size, strides, padding, dilation = window(x, kernel_shape, named)
    if dilation != (1, 1):
        raise UnsupportedModelError("dilated average pooling.")
    counted, up = bool(count_include_pad), bool(ceil_mode)
    return pools.avg_pool(b, x, size, strides, padding, ceil=up, count_padding=counted)


def global_pool(kind: Reduction, b: Builder, x: Value, **_: Any) -> Value:
    """GlobalAveragePool, GlobalMaxPool."""
    return pools.reduced(b, x, kind, range(2, len(x.dims)), keepdims=True)


def reduction(
    kind: Reduction,
    b: Builder,
    x: Value,
    given: Any = None,
    axes: Ints | None = None,
    keepdims: int = 1,
    **_: Any,
) -> Value:
    """ReduceMean, ReduceSum, ReduceMax, ReduceL2; axes as an attribute or an input."""
    chosen = axes if given is None else tuple(int(a) for a in constant(given, "axes"))
    if not chosen:
        raise UnsupportedModelError("a reduction over all axes, the batch among them.")
    return pools.reduced(b, x, kind, chosen, keepdims=bool(keepdims))


def resize(
    b: Builder,
    x: Value,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    axes: Ints | None = None,
    **_: Any,
) -> Value:
    """Resize of height and width, nearest or linear."""
    rank = len(x.dims)
    over = [a % rank for a in (range(rank) if axes is None else axes)]
    factor: dict[int, float | None] = dict.fromkeys(range(rank), 1.0)
    size = dict(enumerate(x.shape))
    if scales is not None and scales.size:
        factor |= dict(zip(over, map(float, scales), strict=True))
        size = {a: int(np.floor(n * (factor[a] or 1.0))) for a, n in size.items()}
    elif sizes is not None:
        size |= dict(zip(over, map(int, sizes), strict=True))
        factor = {a: None if size[a] != n else 1.0 for a, n in enumerate(x.shape)}
    if any(size[a] != x.shape[a] for a in range(rank) if a < 2) or rank not in (3, 4):
        raise UnsupportedModelError("only height and width can be resized.")
    method, place = sampling(x, size, mode, coordinate_transformation_mode, nearest_mode)
    space = [1] * (4 - rank) + [size[a] for a in range(2, rank)]
    ratio = [1.0] * (4 - rank) + [factor[a] for a in range(2, rank)]
    return pools.resized(b, x, space, ratio, method, place)


def sampling(
    x: Value, size: dict[int, int], mode: str, place: str, nearest: str
) -> tuple[Literal["nearest", "bilinear"], Literal["half_pixel", "asymmetric", "align_corners"]]:
    """How pixels are sampled, in our words.

    Raises:
      UnsupportedModelError: for a combination that neither PyTorch nor we know.
    """
    upscale = all(size[a] % x.shape[a] == 0 for a in size)
    match mode, place, nearest:
        case "nearest", "asymmetric", "floor":
            return "nearest", "asymmetric"
        case "nearest", "half_pixel" | "pytorch_half_pixel", "round_prefer_ceil":
            return "nearest", "half_pixel"
        case "nearest", "half_pixel", "round_prefer_floor" if upscale:  # no pixel lies half-way
            return "nearest", "half_pixel"
        case "linear", "half_pixel" | "asymmetric" | "align_corners", _:
            return "bilinear", place
        case "linear", "pytorch_half_pixel", _ if min(size.values()) > 1 or upscale:
            return "bilinear", "half_pixel"
        case _:
            raise UnsupportedModelError(f"resizing with {mode}, {place}, {nearest}.")


def pad(
    b: Builder,
    x: Value,
    pads: Any,
    value: Any = None,
    axes: Any = None,
    mode: str = "constant",
    **_: Any,
) -> Value:
    """Pad."""
    amounts = [int(p) for p in constant(pads, "padding")]
    over = range(len(x.dims)) if axes is None else [int(a) for a in constant(axes, "axes")]
    half = len(amounts) // 2
    rank = len(x.dims)
    widths = {a % rank: (amounts[i], amounts[half + i]) for i, a in enumerate(over)}
    fill = 0.0 if value is None or value.size == 0 else float(constant(value, "value").reshape(()))
    return padded(b, x, {a: w for a, w in widths.items() if w != (0, 0)}, fill, mode)
