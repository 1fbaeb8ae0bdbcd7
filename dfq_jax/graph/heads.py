"""What the outputs of a network say: class scores, probabilities or plain values, part by part.

An output is followed back through operators that only move values (reshapes, transpositions,
slices) and through concatenations, each of whose inputs is a part of its own. So the answer does
not depend on the order of axes in which an output leaves the network.

* Where a softmax made a part, its classes are the axis that the softmax reads.
* Where a sigmoid made it, a vector (k values an image) has k classes; anything larger has one
  decision for each value, whether its probability exceeds one half.
* A part without either is plain values if some other part of the network has a softmax or sigmoid,
  or if it shares its output with other parts. So is what the graph shows to be a state or a
  direction: behind a tanh, a recurrent layer or a layer norm, or divided by its own length. And so
  is a single number at each place: a regression, as far as anything tells.
* What is left are several numbers at each place, of which nothing tells scores from values. They
  count as scores along their last axis (channels of an image).

What is looked at is the tensor before the softmax or sigmoid: behind it small errors of a sure
network vanish and everything looks exact.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    Activation,
    Add,
    AvgPool,
    Broadcast,
    Clip,
    Concat,
    Div,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Maximum,
    MaxPool,
    Mul,
    Op,
    Power,
    Recurrent,
    Reduce,
    Reshape,
    Resize,
    Scale,
    Slice,
    Softmax,
    Transpose,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.query import constants, output_shapes
from dfq_jax.graph.semantics import apply_op
from dfq_jax.graph.token_ops import RmsNorm

Kind = Literal["classes", "signs", "values"]
"""One decision among the classes along an axis, one for each value, or none."""
FinalCurve = Literal["softmax", "sigmoid"]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Values of an output that come from one tensor.

    Attributes:
      output: name of the graph's output.
      name: of the part: the output, and which tensor where it has several.
      tensor: where to look at it in the graph, before a final softmax or sigmoid.
      curve: what follows `tensor` on the way to the output.
      kind: whether it decides between classes, signs, or nothing.
      axis: of the classes among those of `where`, counted without the batch; None unless `classes`.
      certain: whether the graph says so itself, by a softmax or by being one vector an image.
      where: position of every value in the flattened output of one image.
      source: position of every value in the flattened tensor of one image; shape of `where`.
    """

    output: str
    name: str
    tensor: str
    curve: FinalCurve | None
    kind: Kind
    axis: int | None
    certain: bool
    where: Int[np.ndarray, "..."]
    source: Int[np.ndarray, "..."]

    def of_output(self, values: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, "n ..."]:
        """The part's values out of its output, in the shape of `where`, batch first."""
        return values.reshape(len(values), -1)[:, self.where]

    def of_tensor(self, values: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, "n ..."]:
        """The same values before softmax or sigmoid, out of `tensor`."""
        return values.reshape(len(values), -1)[:, self.source]


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """One output of a network and the parts it consists of, in the order they are joined."""

    output: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor whose values reach an output, through a curve or not.

    Attributes:
      tensor: its name.
      curve: what it passes on its way.
      axis: of a softmax, counted without the batch.
      made: the tensor behind the curve, or itself: how people know the part.
    """

    tensor: str
    curve: FinalCurve | None
    axis: int | None
    made: str


def heads_of(model: Model) -> tuple[Head, ...]:
    """The heads of a network, in the order of its outputs; an output named twice counts once."""
    return heads(model.graph, output_shapes(model))


def heads(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Head, ...]:
    """What every output consists of.

    Args:
      graph: the network.
      shapes: of its tensors, batch (of one) first, as `output_shapes` finds them.

    Returns:
      One head for each output. Parts that do not depend on the input are left out.
    """
    fixed, found = constants(graph), {}
    for output in dict.fromkeys(graph.outputs):
        leaves: dict[Leaf, int] = {}
        ids = followed(graph.by_name, shapes, leaves, output, None)
        found[output] = {
            leaf: np.asarray(ids).reshape(-1) - offset
            for leaf, offset in leaves.items()
            if leaf.tensor not in fixed
        }
    told = any(leaf.curve for parts in found.values() for leaf in parts)
    return tuple(
        Head(output, tuple(parts_of(output, parts, shapes, told, graph.by_name)))
        for output, parts in found.items()
    )


def moves(op: Op) -> bool:
    """Whether an operator only puts values elsewhere, drops or joins some."""
    return isinstance(op, Flatten | Reshape | Transpose | Slice | Broadcast | Concat | DepthToSpace)


def followed(
    nodes: Mapping[str, Node],
    shapes: Mapping[str, tuple[int, ...]],
    leaves: dict[Leaf, int],
    tensor: str,
    behind: str | None,
) -> Int[np.ndarray, "..."]:
    """For every element of a tensor, which element of which leaf it is, as one number.

    Args:
      nodes: of the graph, by name.
      shapes: of its tensors.
      leaves: {leaf: number of its first element}; those found are added.
      tensor: to follow back.
      behind: the sigmoid that was passed on the way, if one was.
    """
    node = nodes.get(tensor)
    op = None if node is None else node.op
    if node is not None and op is not None and moves(op):
        args = [jnp.asarray(followed(nodes, shapes, leaves, i, behind)) for i in node.inputs]
        return np.asarray(apply_op(op, {}, *args))
    if node is not None and behind is None and op == Activation("sigmoid"):
        return followed(nodes, shapes, leaves, node.inputs[0], tensor)
    leaf = Leaf(tensor, "sigmoid" if behind else None, None, behind or tensor)
    if node is not None and behind is None and isinstance(op, Softmax):
        leaf = Leaf(node.inputs[0], "softmax", op.axis % len(shapes[tensor]) - 1, tensor)
    size = lambda x: int(np.prod(shapes[x.tensor]))
    offset = leaves.setdefault(leaf, sum(map(size, leaves)))
    return (offset + np.arange(size(leaf), dtype=np.int32)).reshape(shapes[leaf.tensor])


def parts_of(
    output: str,
    leaves: Mapping[Leaf, Int[np.ndarray, " values"]],
    shapes: Mapping[str, tuple[int, ...]],
    told: bool,
    nodes: Mapping[str, Node],
) -> list[Part]:
    """The parts of an output, from {leaf: which of its elements each value of the output is}."""
    found, made_there = [], Counter(leaf.made for leaf in leaves)
    for leaf, ids in leaves.items():
        shape = shapes[leaf.tensor][1:]
        where = kept(ids, shape)
        if where.size == 0:
            continue
        place = leaf.made if made_there[leaf.made] == 1 else f"{leaf.made} of {leaf.tensor}"
        name = output if len(leaves) == 1 else f"{output}: {place}"
        if cut(leaf, shape, where.shape):
            leaf = Leaf(leaf.made, None, None, leaf.made)
        alone = len(leaves) == 1 and not told and not is_state(nodes, leaf.tensor)
        kind, axis, certain = kind_of(leaf, where.shape, alone)
        made = (leaf.tensor, leaf.curve, kind, axis, certain)
        found.append(Part(output, name, *made, where, ids[where]))
    return found


def is_state(nodes: Mapping[str, Node], tensor: str) -> bool:
    """Whether the last operators of a tensor show a state or a direction rather than scores.

    Nobody ends scores in a tanh or a norm: they would be as large for all that is read.
    """
    node = nodes.get(tensor)
    if node is None:
        return False
    match node.op:
        case Recurrent() | LayerNorm() | RmsNorm() | Activation("tanh" | "erf"):
            return True
        case Div() | Mul():
            return is_direction(nodes, tensor)
        case Scale() | MaxPool() | AvgPool() | GlobalAvgPool() | Resize() | Reduce("mean" | "max"):
            return is_state(nodes, node.inputs[0])
        case _:
            return False


def is_direction(nodes: Mapping[str, Node], tensor: str) -> bool:
    """Whether a tensor is divided by its own Euclidean length, or by one."""
    node = nodes.get(tensor)
    match None if node is None else node.op:
        case Div() if node is not None:
            return is_length(nodes, node.inputs[1], 0.5)
        case Mul() if node is not None:
            return any(is_length(nodes, name, -0.5) for name in node.inputs)
        case _:
            return False


def is_length(nodes: Mapping[str, Node], tensor: str, power: float) -> bool:
    """Whether a tensor is a sum of squares to this power, kept from zero or not."""
    node = nodes.get(tensor)
    if node is None:
        return False
    back = lambda before: any(is_length(nodes, name, before) for name in node.inputs)
    match node.op:
        case Reduce("l2"):
            return power == 0.5
        case Reduce("sum"):
            squares = nodes.get(node.inputs[0])
            return power == 1 and squares is not None and is_square(squares)
        case Reshape() | Broadcast() | Clip() | Scale() | Add() | Maximum():
            return back(power)
        case Power(exponent) if exponent:
            return back(power / exponent)
        case Activation("sqrt"):
            return back(2 * power)
        case _:
            return False


def is_square(node: Node) -> bool:
    """Whether a node multiplies values by themselves."""
    return node.op == Power(2.0) or (isinstance(node.op, Mul) and len(set(node.inputs)) == 1)


def cut(leaf: Leaf, shape: tuple[int, ...], left: tuple[int, ...]) -> bool:
    """Whether some classes of a softmax do not reach the output."""
    if leaf.axis is None:
        return False
    return len(left) != len(shape) or left[leaf.axis] != shape[leaf.axis]


def kept(ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Where in the output each element of a leaf went: of the box that got there, or flat."""
    size = int(np.prod(shape))
    mine = np.flatnonzero((ids >= 0) & (ids < size))
    where = np.full(size, -1, np.int32)
    where[ids[mine]] = mine
    where = where.reshape(shape)
    there = where >= 0
    axes = range(where.ndim)
    spans = [np.flatnonzero(there.any(tuple(b for b in axes if b != a))) for a in axes]
    box = where[np.ix_(*spans)] if shape else where
    return box if (box >= 0).all() else where[there]


def kind_of(leaf: Leaf, shape: tuple[int, ...], alone: bool) -> tuple[Kind, int | None, bool]:
    """(kind, axis of classes, whether that is certain) of a part of this shape, without batch."""
    vector = bool(shape) and int(np.prod(shape)) == shape[-1]
    several = bool(shape) and shape[-1] > 1
    match leaf.curve:
        case "softmax":
            several = leaf.axis is not None and shape[leaf.axis] > 1
            return ("classes", leaf.axis, True) if several else ("values", None, True)
        case "sigmoid":
            last = len(shape) - 1
            return ("classes", last, True) if vector and several else ("signs", None, True)
        case _ if alone and several:
            return "classes", len(shape) - 1, vector
        case _:
            return "values", None, False
