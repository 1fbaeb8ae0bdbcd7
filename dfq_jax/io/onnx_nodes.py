"""Every operator as ONNX nodes; the only table from NHWC operators to NCHW ones."""

from collections.abc import Mapping
from typing import assert_never

import numpy as np

from dfq_jax.errors import ExportError
from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import (
    Add,
    AvgPool,
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Pad,
    Pads,
    Relu,
    Slice,
)
from dfq_jax.io.onnx_builder import OnnxBuilder, printable

Order = tuple[int, int, int]
NCHW = (0, 3, 1, 2)
"""Which NHWC axis each NCHW axis is."""
TO_END = {1: np.iinfo(np.int64).max, -1: np.iinfo(np.int64).min}
"""Slice end that stands for "as far as it goes", by sign of the step."""


def kernel_layout(kernel: np.ndarray, rank: int, order: Order | None) -> np.ndarray:
    """A kernel in the layout its ONNX operator reads, output channels first.

    Args:
      kernel: HWIO of a convolution, or (in, out) of a linear layer.
      rank: of the layer's input.
      order: (h, w, c) where the input is a flattened image whose ONNX counterpart runs over
        channels first, so that the kernel's rows have to follow.

    Returns:
      OIHW or (out, in). ONNX Runtime would multiply a float input with integer weights
      laid out (in, out) in 8 bits, approximately; in this layout it computes what is written.
    """
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    if rank == 4:
        return kernel.T[:, :, None, None]
    if order is not None:
        kernel = kernel.reshape(*order, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    return kernel.T


def add_operator(  # noqa: C901 - one case per operator
    b: OnnxBuilder,
    node: Node,
    args: tuple[str, ...],
    output: str,
    slots: Mapping[str, str],
    rank: int,
    keeps_nhwc: bool,
) -> None:
    """Adds the ONNX nodes that compute one node.

    Args:
      b: receives them.
      node: what to compute.
      args: values it reads, in NCHW.
      output: value it defines.
      slots: {slot: value} of its parameters, kernels laid out by `kernel_layout`.
      rank: of its first input.
      keeps_nhwc: whether a `Flatten` of an image has to run in NHWC order.

    Raises:
      ExportError: if ONNX cannot express the node.
    """
    x, name = args[0], printable(node.name)
    match node.op:
        case Conv2d() | Linear():
            add_weighted(b, node, name, x, output, slots, rank)
        case BatchNorm(eps):
            vectors = (slots[s] for s in ("scale", "bias", "mean", "var"))
            b.add("BatchNormalization", name, (x, *vectors), output, epsilon=eps)
        case Relu(None):
            b.add("Relu", name, (x,), output)
        case Relu(ceiling):
            ends = (("min", 0.0), ("max", ceiling))
            values = (b.constant(f"{name}.{k}", np.array(v, np.float32)) for k, v in ends)
            b.add("Clip", name, (x, *values), output)
        case Add():
            b.add("Add", name, args, output)
        case MaxPool() | AvgPool():
            add_pool(b, node.op, name, x, output)
        case GlobalAvgPool():
            pooled = b.fresh(f"{output}.pooled")
            b.add("GlobalAveragePool", name, (x,), pooled)
            axes = b.constant(f"{name}.axes", np.array([2, 3], np.int64))
            b.add("Squeeze", f"{name}.squeeze", (pooled, axes), output)
        case Flatten():
            if keeps_nhwc:
                turned = b.fresh(f"{output}.nhwc")
                x = b.add("Transpose", f"{name}.nhwc", (x,), turned, perm=(0, 2, 3, 1))
            b.add("Flatten", name, (x,), output, axis=1)
        case Slice(bounds):
            add_slice(b, bounds, name, x, output)
        case Pad():
            add_pad(b, node.op, name, x, output)
        case _:
            assert_never(node.op)


def add_weighted(
    b: OnnxBuilder,
    node: Node,
    name: str,
    x: str,
    output: str,
    slots: Mapping[str, str],
    rank: int,
) -> None:
    """Adds a convolution or linear layer; a linear layer over pixels is a 1x1 convolution.

    Raises:
      ExportError: if a linear layer reads neither vectors nor images.
    """
    inputs = [x, slots["kernel"], *([slots["bias"]] if "bias" in slots else [])]
    match node.op:
        case Conv2d(strides, padding, groups, dilation):
            b.add(
                "Conv",
                name,
                inputs,
                output,
                strides=strides,
                pads=as_pads(padding),
                dilations=dilation,
                group=groups,
            )
        case _ if rank == 4:
            b.add("Conv", name, inputs, output)
        case _ if rank == 2:
            b.add("Gemm", name, inputs, output, transB=1)
        case _:
            raise ExportError(
                f"node {node} reads a tensor of rank {rank}; ONNX export knows linear layers over "
                f"vectors (rank 2) and over pixels (rank 4). Flatten its input first."
            )


def add_pool(b: OnnxBuilder, op: MaxPool | AvgPool, name: str, x: str, output: str) -> None:
    """Adds a pooling over windows."""
    windows = {
        "kernel_shape": op.window,
        "strides": op.strides,
        "pads": as_pads(op.padding),
    }
    if isinstance(op, MaxPool):
        b.add("MaxPool", name, (x,), output, **windows)
    else:
        whole = int(op.count_padding)
        b.add("AveragePool", name, (x,), output, count_include_pad=whole, **windows)


def add_pad(b: OnnxBuilder, op: Pad, name: str, x: str, output: str) -> None:
    """Adds constant padding: all widths before, then all widths after."""
    widths = in_nchw(op.widths)
    pads = [before for before, _ in widths] + [after for _, after in widths]
    amounts = b.constant(f"{name}.pads", np.array(pads, np.int64))
    value = b.constant(f"{name}.value", np.array(op.value, np.float32))
    b.add("Pad", name, (x, amounts, value), output)


def add_slice(b: OnnxBuilder, bounds: tuple, name: str, x: str, output: str) -> None:
    """Adds a slice over the axes that it really cuts."""
    axes = [a for a, triple in enumerate(in_nchw(bounds)) if triple != (0, None, 1)]
    if not axes:
        b.add("Identity", name, (x,), output)
        return
    starts, ends, steps = [], [], []
    for start, stop, step in (in_nchw(bounds)[a] for a in axes):
        starts.append(start)
        ends.append(TO_END[1 if step > 0 else -1] if stop is None else stop)
        steps.append(step)
    columns = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    values = (b.constant(f"{name}.{k}", np.array(v, np.int64)) for k, v in columns.items())
    b.add("Slice", name, (x, *values), output)


def in_nchw(per_axis: tuple) -> tuple:
    """One entry per axis, reordered for NCHW where there are four of them."""
    return tuple(per_axis[a] for a in NCHW) if len(per_axis) == 4 else per_axis


def as_pads(padding: Pads) -> list[int]:
    """ONNX order: top, left, bottom, right."""
    (top, bottom), (left, right) = padding
    return [top, left, bottom, right]
