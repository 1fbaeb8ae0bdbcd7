"""Values moved, dropped, repeated or put beside others, as ONNX nodes."""

from typing import assert_never

import numpy as np

from dfq_jax.graph.ops import (
    Arrange,
    Broadcast,
    Concat,
    Flatten,
    Pad,
    Reshape,
    Slice,
    Transpose,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.io.onnx.builder import OnnxBuilder, WrittenNode
from dfq_jax.io.onnx.layout import file_axis, in_layout, still, turned

TO_END = {1: np.iinfo(np.int64).max, -1: np.iinfo(np.int64).min}
"""Slice end that stands for "as far as it goes", by sign of the step."""


def add_arranged(b: OnnxBuilder, op: Arrange, step: WrittenNode) -> None:
    """Adds a rearrangement."""
    name, output = step.name, step.output
    match op:
        case Flatten():
            b.add("Flatten", name, step.args, output, axis=1)
        case Reshape(shape):
            sizes = in_layout((0, *shape), step.gives)
            b.add("Reshape", name, (*step.args, b.integers(f"{name}.shape", sizes)), output)
        case Transpose(order):
            if still(order, step.layout) is None:
                perm = turned(order, step.layout, step.gives)
                b.add("Transpose", name, step.args, output, perm=perm)
        case Slice():
            add_slice(b, op, step)
        case Concat():
            add_concat(b, op, step)
        case Broadcast(shape):
            sizes = (1, *(1 if n == -1 else n for n in shape))
            sizes = in_layout(sizes, step.layout) if len(sizes) == step.rank else list(sizes)
            b.add("Expand", name, (*step.args, b.integers(f"{name}.shape", sizes)), output)
        case Pad():
            add_pad(b, op, step)
        case DepthToSpace(block, inner):
            mode = "CRD" if inner else "DCR"
            b.add("DepthToSpace", name, step.args, output, blocksize=block, mode=mode)
        case _:
            assert_never(op)


def add_slice(b: OnnxBuilder, op: Slice, step: WrittenNode) -> None:
    """Adds a slice over the axes that it really cuts."""
    bounds = in_layout(op.bounds, step.layout)
    axes = [a for a, triple in enumerate(bounds) if tuple(triple) != (0, None, 1)]
    if not axes:
        b.add("Identity", step.name, step.args, step.output)
        return
    starts, ends, steps = [], [], []
    for start, stop, stride in (bounds[a] for a in axes):
        starts.append(start)
        ends.append(TO_END[1 if stride > 0 else -1] if stop is None else stop)
        steps.append(stride)
    columns = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    values = (b.integers(f"{step.name}.{k}", v) for k, v in columns.items())
    b.add("Slice", step.name, (*step.args, *values), step.output)


def add_concat(b: OnnxBuilder, op: Concat, step: WrittenNode) -> None:
    """Adds a concatenation; what has one row is repeated for every image first."""
    rows = step.result[0]
    parts = [
        x if shape[0] == rows else b.expanded(x, in_layout(shape, step.layout)[1:])
        for x, shape in zip(step.args, step.shapes, strict=True)
    ]
    axis = file_axis(op.axis, step.rank, step.layout)
    b.add("Concat", step.name, parts, step.output, axis=axis)


def add_pad(b: OnnxBuilder, op: Pad, step: WrittenNode) -> None:
    """Adds padding: all widths before, then all widths after."""
    widths = in_layout(op.widths, step.layout)
    pads = [before for before, _ in widths] + [after for _, after in widths]
    inputs = [*step.args, b.integers(f"{step.name}.pads", pads)]
    if op.mode == "constant":
        inputs.append(b.number(f"{step.name}.value", op.value))
    b.add("Pad", step.name, inputs, step.output, mode=op.mode)
