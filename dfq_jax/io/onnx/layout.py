"""In which order of axes the file holds every tensor: images channels first, all else as here.

Operators that read pixels need channels first; operators that mix axes need them as stored here;
elementwise ones keep what they find. A residual network so needs no transposition at all, and
neither does one that splits, shuffles and joins the channels of its images.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, assert_never

import numpy as np

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    BatchNorm,
    Broadcast,
    Clip,
    Compare,
    Concat,
    Constant,
    Conv2d,
    ConvTranspose2d,
    Div,
    Elu,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    LayerNorm,
    LeakyRelu,
    Linear,
    LocalNorm,
    LogSoftmax,
    MatMul,
    Maximum,
    MaxPool,
    Minimum,
    Mul,
    Pad,
    Power,
    PRelu,
    Recurrent,
    Reduce,
    Relu,
    Reshape,
    Resize,
    Scale,
    Select,
    Slice,
    Softmax,
    Sub,
    Transpose,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.query import consumers
from dfq_jax.graph.token_ops import Column, Embed, Leading, Present, RmsNorm, Rotary
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.types import NCHW

Shape = tuple[int, ...]
AxisOrder = tuple[int, int, int]
Layout = Literal["stored", "first"] | AxisOrder
"""As the library stores it; or with height and width last, of rank 4 and above; or flattened from
such an image of (h, w, c)."""
STORED: Literal["stored"] = "stored"
FIRST: Literal["first"] = "first"
VOLUMES = 5
"""Axes of a tensor of volumes, which operators turn channels first one by one."""


class Layouts(NamedTuple):
    """Where the file departs from the library's order of axes.

    Attributes:
      held: {tensor: its layout in the file}.
      read: {node: the layout in which it reads its arguments of rank 4 and above}.
    """

    held: dict[str, Layout]
    read: dict[str, Layout]


class LayoutSite(NamedTuple):
    """What decides the layout of one node.

    Attributes:
      held: layout of each argument, None for a constant nobody has read yet.
      shapes: of the arguments, as stored.
      result: shape of the output, as stored.
      permutable: whether only linear layers read the output, whose rows can follow any order.
    """

    held: tuple[Layout | None, ...]
    shapes: tuple[Shape, ...]
    result: Shape
    permutable: bool

    @property
    def main(self) -> Layout:
        """Layout of the largest argument that has one."""
        best: Layout = STORED
        size = 0
        for held, shape in zip(self.held, self.shapes, strict=True):
            if held is not None and math.prod(shape) > size:
                best, size = held, math.prod(shape)
        return best


def find_layouts(graph: Graph, shapes: dict[str, Shape]) -> Layouts:
    """The layout of every tensor.

    Args:
      graph: the network.
      shapes: of its tensors, as stored.

    Returns:
      What is held and read how; constants lie as their first reader wants them.
    """
    readers, read = consumers(graph), {}
    held: dict[str, Layout] = {i: FIRST if len(shapes[i]) == 4 else STORED for i in graph.inputs}
    for node in graph.nodes:
        if isinstance(node.op, Constant):
            continue
        followers = [r for r, _ in readers[node.name]]
        site = LayoutSite(
            tuple(held.get(i) for i in node.inputs),
            tuple(shapes[i] for i in node.inputs),
            shapes[node.name],
            node.name not in graph.outputs and all(isinstance(r.op, Linear) for r in followers),
        )
        read[node.name], held[node.name] = placed(node, site)
        for i in node.inputs:
            held.setdefault(i, read[node.name] if len(shapes[i]) >= 4 else STORED)
    for node in graph.nodes:
        held.setdefault(node.name, STORED)
    return Layouts(held, read)


def placed(node: Node, site: LayoutSite) -> tuple[Layout, Layout]:  # noqa: C901 - one case per family
    """The layout in which a node reads arguments of rank 4 and above, and that of its output."""
    x, image = site.main, len(site.result) == 4
    pixels: Layout = x if image else STORED
    match node.op:
        case Conv2d() | ConvTranspose2d() | MaxPool() | AvgPool() | AdaptiveAvgPool() | Resize():
            return FIRST, FIRST
        case LocalNorm() | DepthToSpace():
            return FIRST, FIRST
        case GroupNorm():
            return (FIRST, FIRST) if image else (STORED, STORED)
        case Linear():
            return (x, STORED) if isinstance(x, tuple) else (pixels, pixels)
        case MatMul() | LayerNorm() | RmsNorm() | Constant() | Recurrent() | Conv3d():
            return STORED, STORED
        case Column() | Leading() | Embed() | Present() | Rotary():
            return STORED, STORED
        case BatchNorm():
            return pixels, pixels
        case Relu() | LeakyRelu() | PRelu() | Clip() | Elu() | Activation() | Scale() | Power():
            return x, x
        case Softmax() | LogSoftmax() | Slice() | Pad():
            return x, x
        case Concat() | Broadcast() | Compare() | Select():
            return together(x, site)
        case Add() | Sub() | Mul() | Div() | Maximum() | Minimum():
            return together(x, site)
        case GlobalAvgPool(keepdims):
            return x, x if keepdims else STORED
        case Reduce():
            return reduced(node.op, x, site)
        case Flatten():
            return flattened(x, site)
        case Reshape():
            return reshaped(x, site)
        case Transpose(order):
            found = still(order, x)
            kept = x if order[1:3] == (1, 2) else STORED
            return x, kept if found is None else found
        case _:
            assert_never(node.op)


def together(x: Layout, site: LayoutSite) -> tuple[Layout, Layout]:
    """Layouts of what broadcasts: as its main argument has it, where all have as many axes."""
    alike = all(len(s) == len(site.result) for s in site.shapes)
    return (x, x) if alike else (STORED, STORED)


def reduced(op: Reduce, x: Layout, site: LayoutSite) -> tuple[Layout, Layout]:
    """Layouts of a reduction: channels first where what is left needs no reordering."""
    if op.keepdims or x != FIRST:
        return x, x
    rank = len(site.shapes[0])
    left = [a for a in first_order(rank) if a not in {b % rank for b in op.axes}]
    return (FIRST if left == sorted(left) else STORED), STORED


def reshaped(x: Layout, site: LayoutSite) -> tuple[Layout, Layout]:
    """Layouts of a reshape: an image stays one where only its channels are split or joined."""
    before, after = site.shapes[0][1:3], site.result[1:3]
    if x == FIRST and len(site.result) >= 4 and before == after:
        return FIRST, FIRST
    vector = len(site.result) == 4 and after == (1, 1)
    return FIRST if x == FIRST and before == (1, 1) else STORED, FIRST if vector else STORED


def flattened(x: Layout, site: LayoutSite) -> tuple[Layout, Layout]:
    """Layouts of a flattening: an image may stay as it is where its readers can follow."""
    if x != FIRST or len(site.shapes[0]) > 4:
        return STORED, STORED
    h, w, c = (site.shapes[0][axis] for axis in (1, 2, 3))
    if (h, w) == (1, 1):
        return FIRST, STORED
    return (FIRST, (h, w, c)) if site.permutable else (STORED, STORED)


def filed(rank: int, layout: str) -> Layout:
    """How the inputs and outputs of a file lie in it, whose images are `NCHW` or `NHWC`."""
    return FIRST if rank == 4 and layout == NCHW else STORED


def first_order(rank: int) -> tuple[int, ...]:
    """Which stored axis each axis of the file is, channels first: (0, 3, 1, 2) of an image."""
    return (0, *range(3, rank), 1, 2)


def still(order: tuple[int, ...], held: Layout) -> Layout | None:
    """The layout in which a transposed tensor lies in the file already; None if in neither."""
    unchanged = tuple(range(len(order)))
    if turned(order, held, STORED) == unchanged:
        return STORED
    if len(order) >= 4 and turned(order, held, FIRST) == unchanged:
        return FIRST
    return None


def turned(order: tuple[int, ...], held: Layout, gives: Layout) -> tuple[int, ...]:
    """The transposition in the file that stands for `order` between two layouts."""
    first = first_order(len(order))
    wanted = [order[a] for a in first] if gives == FIRST else order
    return tuple(first.index(a) for a in wanted) if held == FIRST else tuple(wanted)


def in_layout(per_axis: Sequence, layout: Layout) -> list:
    """One entry per stored axis, in the file's order of axes."""
    return [per_axis[a] for a in first_order(len(per_axis))] if layout == FIRST else list(per_axis)


def file_axis(axis: int, rank: int, layout: Layout) -> int:
    """A stored axis (it may count from the end) as an axis in the file."""
    return first_order(rank).index(axis % rank) if layout == FIRST else axis % rank


def as_stored(array: np.ndarray, layout: Layout) -> np.ndarray:
    """A value of the file in the library's order."""
    match layout:
        case "stored":
            return array
        case "first":
            return np.moveaxis(array, (-2, -1), (1, 2))
        case (h, w, c):
            image = array.reshape(-1, c, h, w)
            return image.transpose(0, 2, 3, 1).reshape(array.shape)
        case _:
            assert_never(layout)


def as_filed(array: np.ndarray, layout: Layout) -> np.ndarray:
    """A stored constant as the file holds it: the inverse of `as_stored` for images."""
    return array.transpose(first_order(array.ndim)) if layout == FIRST else array
