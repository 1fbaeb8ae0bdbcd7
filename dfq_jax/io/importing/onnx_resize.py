"""ONNX's Resize, and Upsample before it: what they become."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Resize
from dfq_jax.io.importing import pools
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.onnx_ops import constant
from dfq_jax.io.importing.values import Value

Ints = Sequence[int]
Position = Literal["half_pixel", "asymmetric", "align_corners"]
ResizeTarget = tuple[dict[int, int], dict[int, float | None]]
"""{axis: its new size}, and {axis: the scale}, None for new size over old size."""
FIRST_WITH_COORDINATES = 11
ANY = (1, 1)


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
    keep_aspect_ratio_policy: str = "stretch",
    antialias: int = 0,
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    opset_version: int = FIRST_WITH_COORDINATES,
) -> Value:
    """Resize of height and width: nearest, linear or cubic."""
    if opset_version < FIRST_WITH_COORDINATES:
        return upsample(b, x, roi, mode)  # there its second input are the scales
    rank = len(x.dims)
    over = [a % rank for a in (range(rank) if axes is None else axes)]
    if scales is not None and scales.size:
        target = by_scales(x, over, constant(scales, "scales"))
    else:
        target = by_sizes(x, over, constant(sizes, "sizes"), keep_aspect_ratio_policy)
    method, place = sampling(x, target[0], mode, coordinate_transformation_mode, nearest_mode)
    cubic, inside, smooth = cubic_coeff_a, bool(exclude_outside), bool(antialias)
    if smooth and (method == "bicubic" or place != "half_pixel"):
        raise UnsupportedModelError(
            f"antialias = {antialias} with mode {mode} and {coordinate_transformation_mode} is not "
            "supported; export it without, or with mode linear and half_pixel."
        )
    inside = inside and (smooth or method == "bicubic")
    return spread(b, x, target, Resize(ANY, (1.0, 1.0), method, place, cubic, inside, smooth))


def upsample(b: Builder, x: Value, scales: Any, mode: str = "nearest") -> Value:
    """Upsample, and Resize before opset 11: pixels begin at their corners."""
    numbers = constant(scales, "scales")
    if mode == "nearest" and any(n < 1 and (1 / n) % 1 for n in numbers.tolist()):
        raise UnsupportedModelError(
            f"nearest pixels at scales {numbers.tolist()} are not told by this opset; export with "
            "opset 11 or newer."
        )
    target = by_scales(x, range(len(x.dims)), numbers)
    method, place = sampling(x, target[0], mode, "asymmetric", "floor")
    return spread(b, x, target, Resize(ANY, (1.0, 1.0), method, place))


def by_scales(x: Value, over: Ints, scales: np.ndarray) -> ResizeTarget:
    """Sizes by multiplication, in float32 as runtimes do it, rounded down."""
    factor = dict.fromkeys(range(len(x.dims)), 1.0)
    factor |= dict(zip(over, map(float, scales), strict=True))
    size = {a: math.floor(np.float32(n) * np.float32(factor[a])) for a, n in enumerate(x.shape)}
    return size, dict(factor)


def by_sizes(x: Value, over: Ints, sizes: np.ndarray, policy: str) -> ResizeTarget:
    """Sizes as stated, or the nearest ones that one scale for all axes gives.

    Raises:
      UnsupportedModelError: for a policy nobody here knows.
    """
    size = dict(enumerate(x.shape)) | dict(zip(over, map(int, sizes), strict=True))
    if policy == "stretch":
        return size, {a: None if size[a] != n else 1.0 for a, n in enumerate(x.shape)}
    if policy not in ("not_larger", "not_smaller"):
        raise UnsupportedModelError(
            f"keep_aspect_ratio_policy = {policy!r} is none of stretch, not_larger, not_smaller."
        )
    ratios = [np.float32(size[a]) / np.float32(x.shape[a]) for a in over]
    scale = float(min(ratios) if policy == "not_larger" else max(ratios))
    kept = {a: math.floor(scale * x.shape[a] + 0.5) if a in over else size[a] for a in size}
    return kept, {a: scale if a in over else 1.0 for a in size}


def spread(b: Builder, x: Value, target: ResizeTarget, op: Resize) -> Value:
    """Height and width resampled as `op` does it, whatever its size and scale.

    Raises:
      UnsupportedModelError: if batch or channels would change, or it is neither image nor line.
    """
    size, factor = target
    rank = len(x.dims)
    if any(size[a] != x.shape[a] for a in range(rank) if a < 2) or rank not in (3, 4):
        raise UnsupportedModelError("only height and width can be resized.")
    space = [1] * (4 - rank) + [size[a] for a in range(2, rank)]
    ratio = [1.0] * (4 - rank) + [factor[a] for a in range(2, rank)]
    return pools.resampled(b, x, space, ratio, op)


def sampling(
    x: Value, size: dict[int, int], mode: str, place: str, nearest: str
) -> tuple[Literal["nearest", "bilinear", "bicubic"], Position]:
    """How pixels are sampled, in our words.

    Raises:
      UnsupportedModelError: for a combination that neither PyTorch nor we know.
    """
    upscale = all(size[a] % x.shape[a] == 0 for a in size)
    several = all(size[a] > 1 for a in size if a >= 2)
    smooth: dict[str, Literal["bilinear", "bicubic"]] = {"linear": "bilinear", "cubic": "bicubic"}
    match mode, place, nearest:
        case "nearest", "asymmetric", "floor":
            return "nearest", "asymmetric"
        case "nearest", "half_pixel" | "pytorch_half_pixel", "round_prefer_ceil":
            return "nearest", "half_pixel"
        case "nearest", "half_pixel", "round_prefer_floor" if upscale:  # no pixel lies half-way
            return "nearest", "half_pixel"
        case "linear" | "cubic", "half_pixel" | "asymmetric" | "align_corners", _:
            return smooth[mode], place
        case "linear" | "cubic", "pytorch_half_pixel", _ if several or upscale:
            return smooth[mode], "half_pixel"
        case _:
            raise UnsupportedModelError(f"resizing with {mode}, {place}, {nearest}.")
