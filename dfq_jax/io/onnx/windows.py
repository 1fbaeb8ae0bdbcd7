"""Pooling and resampling as ONNX nodes; all of it channels first but for global means."""

from collections.abc import Sequence
from typing import Any, assert_never

import numpy as np

from dfq_jax.graph.ops import (
    AdaptiveAvgPool,
    AvgPool,
    GlobalAvgPool,
    MaxPool,
    Pads,
    Pair,
    Pool,
    Resize,
)
from dfq_jax.graph.windows import even_windows, interpolation, nearest_pixels, resized_to
from dfq_jax.io.onnx.builder import Link, OnnxBuilder, WrittenNode
from dfq_jax.io.onnx.layout import FIRST

AXES_AS_INPUT = 18
"""First opset in which the axes of every reduction are an input."""


def add_pooled(b: OnnxBuilder, op: Pool, step: WrittenNode) -> None:
    """Adds a pooling."""
    (x,), name, output = step.args, step.name, step.output
    match op:
        case MaxPool(window, strides, padding, dilation):
            x, padding = cropped(b, name, x, padding)
            x, padding = padded(b, name, x, padding, window, -np.inf)
            how = {"kernel_shape": window, "strides": strides, "pads": as_pads(padding)}
            b.add("MaxPool", name, (x,), output, dilations=dilation, **how)
        case AvgPool(window, strides, padding, count_padding):
            x, padding = cropped(b, name, x, padding)
            if count_padding:
                x, padding = padded(b, name, x, padding, window, 0.0)
            how = {"kernel_shape": window, "strides": strides, "pads": as_pads(padding)}
            b.add("AveragePool", name, (x,), output, count_include_pad=int(count_padding), **how)
        case AdaptiveAvgPool(size):
            add_adaptive(b, size, step)
        case GlobalAvgPool(keepdims):
            add_global(b, keepdims, step)
        case _:
            assert_never(op)


def add_global(b: OnnxBuilder, keepdims: bool, step: WrittenNode) -> None:
    """Adds the mean over all pixels, in whichever layout the image is."""
    (x,), name = step.args, step.name
    if step.layout != FIRST:
        add_mean(b, name, x, (1, 2), keepdims, step.output)
        return
    links = [Link("GlobalAveragePool")]
    if not keepdims:
        links.append(Link("Squeeze", (b.integers(f"{name}.axes", (2, 3)),)))
    b.chain(name, x, links, step.output)


def add_mean(b: OnnxBuilder, name: str, x: str, axes: Pair, keepdims: bool, output: str) -> None:
    """Adds a mean over axes of the file."""
    if b.opset >= AXES_AS_INPUT:
        inputs = (x, b.integers(f"{name}.axes", axes))
        b.add("ReduceMean", name, inputs, output, keepdims=int(keepdims))
    else:
        b.add("ReduceMean", name, (x,), output, keepdims=int(keepdims), axes=axes)


def add_adaptive(b: OnnxBuilder, size: Pair, step: WrittenNode) -> None:
    """Adds an adaptive pooling: equal windows where they are equal, else two matrix products."""
    image = (step.shapes[0][1], step.shapes[0][2])
    if size == (1, 1):
        b.add("GlobalAveragePool", step.name, step.args, step.output)
    elif image[0] % size[0] == 0 and image[1] % size[1] == 0:
        window = (image[0] // size[0], image[1] // size[1])
        args, output = step.args, step.output
        b.add("AveragePool", step.name, args, output, kernel_shape=window, strides=window)
    else:
        rows, columns = even_windows(image[0], size[0]), even_windows(image[1], size[1])
        add_mixed(b, rows, columns, step)


def add_mixed(b: OnnxBuilder, rows: np.ndarray, columns: np.ndarray, step: WrittenNode) -> None:
    """Adds linear maps along height and width, each a matrix (out, in)."""
    (x,), name = step.args, step.name
    right = b.constant(f"{name}.columns", np.ascontiguousarray(columns.T))
    x = b.part("MatMul", f"{step.output}.columns", (x, right))
    b.add("MatMul", name, (b.constant(f"{name}.rows", rows), x), step.output)


def add_resized(b: OnnxBuilder, op: Resize, step: WrittenNode) -> None:
    """Adds a resampling: a `Resize` where ONNX's means the same, else the map written out."""
    sizes, name = step.shapes[0][1:3], step.name
    target = resized_to(op, (sizes[0], sizes[1]))
    form = resize_form(op, (sizes[0], sizes[1]))
    if form is None and op.method == "nearest":
        links = []
        for axis, size, out, scale in zip((2, 3), sizes, target, op.scale, strict=True):
            index = b.integers(f"{name}.pixels", nearest_pixels(op, size, out, scale).tolist())
            links.append(Link("Gather", (index,), {"axis": axis}))
        b.chain(name, step.args[0], links, step.output)
        return
    if form is None:
        rows, columns = (
            interpolation(op, *along) for along in zip(sizes, target, op.scale, strict=True)
        )
        add_mixed(b, rows, columns, step)
        return
    how = resize_attributes(op)
    if form == "scales":
        scales = b.constant(f"{name}.scales", np.array((1, 1, *op.scale), np.float32))
        inputs = (*step.args, "", scales)
    else:
        channels = b.integers(f"{name}.channels", (step.result[3],))
        whole = (b.batch(), channels, b.integers(f"{name}.size", target))
        inputs = (*step.args, "", "", b.part("Concat", f"{name}.sizes", whole, axis=0))
    b.add("Resize", name, inputs, step.output, **how)


def resize_attributes(op: Resize) -> dict[str, Any]:
    """How ONNX's `Resize` is told the method."""
    how: dict[str, Any] = {"coordinate_transformation_mode": op.coordinates}
    match op.method:
        case "nearest":
            below = op.coordinates == "asymmetric"
            how |= {"mode": "nearest", "nearest_mode": "floor" if below else "round_prefer_ceil"}
        case "bilinear":
            how |= {"mode": "linear"}
        case "bicubic":
            how |= {"mode": "cubic", "cubic_coeff_a": op.cubic, "exclude_outside": int(op.inside)}
        case _:
            assert_never(op.method)
    return how


def resize_form(op: Resize, image: Pair) -> str | None:
    """`scales` or `sizes`, whichever ONNX computes the same from; None if from neither."""
    if op.smooth:
        return None  # opset 18 has it, older ones do not
    target = resized_to(op, image)
    if image == target or (op.coordinates == "align_corners" and op.method == "nearest"):
        return None  # runtimes copy an image of the right size; corners meet with other rounding
    found = [floor_of(size, scale) for size, scale in zip(image, op.scale, strict=True)]
    if found == list(target):
        return "scales"
    ratios = [np.float32(o) / np.float32(i) for i, o in zip(image, target, strict=True)]
    near = ratios == [np.float32(s) for s in op.scale]
    return "sizes" if near or op.coordinates == "align_corners" else None


def floor_of(size: int, scale: float) -> int | None:
    """How many pixels a runtime makes of `size`; None if that depends on its precision."""
    single = np.float32(scale)
    found = {int(size * scale), int(size * float(single)), int(np.float32(size) * single)}
    return found.pop() if len(found) == 1 else None


def cropped(b: OnnxBuilder, name: str, x: str, padding: Pads) -> tuple[str, Pads]:
    """An image less the pixels that negative padding removes, and the padding that is left."""
    (top, bottom), (left, right) = padding
    if min(top, bottom, left, right) >= 0:
        return x, padding
    ends = np.iinfo(np.int64).max
    columns = {
        "starts": [max(-top, 0), max(-left, 0)],
        "ends": [min(bottom, 0) or ends, min(right, 0) or ends],
        "axes": [2, 3],
    }
    values = [b.integers(f"{name}.{k}", v) for k, v in columns.items()]
    x = b.part("Slice", f"{name}.cropped", (x, *values))
    return x, ((max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0)))


def padded(
    b: OnnxBuilder, name: str, x: str, padding: Pads, window: Pair, value: float
) -> tuple[str, Pads]:
    """An image padded where the padding reaches a whole window, which runtimes refuse to do."""
    if all(max(pads) < size for pads, size in zip(padding, window, strict=True)):
        return x, padding
    top, left, bottom, right = as_pads(padding)
    amounts = b.integers(f"{name}.pads", (0, 0, top, left, 0, 0, bottom, right))
    inputs = (x, amounts, b.number(f"{name}.fill", value))
    return b.part("Pad", f"{name}.padded", inputs), ((0, 0), (0, 0))


def as_pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """ONNX order: all beginnings (top, left), then all ends (bottom, right)."""
    return [low for low, _ in padding] + [high for _, high in padding]
