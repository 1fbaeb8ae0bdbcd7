"""Scores hidden by adding a large negative number, as the choice that this is.

Exporters write masks as numbers to be added to scores: 0 where a token is looked at, and -10000 or
the least float where it is not. No grid of 8 bits holds such numbers beside scores; a choice keeps
them out of all ranges, and a softmax behind it is the same.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    Add,
    Broadcast,
    Clip,
    Constant,
    Flatten,
    Mul,
    Op,
    Reshape,
    Scale,
    Select,
    Slice,
    Transpose,
)
from dfq_jax.io.importing.builder import HostSlots
from dfq_jax.io.importing.choices import holds_truths
from dfq_jax.io.importing.pointwise import HIDES, LOWEST


def chosen_where_hidden(
    graph: Graph, params: Mapping[str, HostSlots]
) -> tuple[Graph, dict[str, HostSlots]]:
    """The network with a choice in place of every sum of scores and a mask."""
    found = _Masks(graph, params)
    nodes: list[Node] = []
    for node in graph.nodes:
        better = found.better(node)
        nodes += [*found.taken(), node if better is None else better]
    return dataclasses.replace(graph, nodes=tuple(nodes)), found.params


class _Masks:
    """Finds what hides scores, and writes down where it does not; lives during one pass.

    Attributes:
      params: of the network, those of new nodes among them.
    """

    def __init__(self, graph: Graph, params: Mapping[str, HostSlots]) -> None:
        self.params = dict(params)
        self._nodes = dict(graph.by_name)
        self._truths: dict[str, str | None] = {}
        self._new: list[Node] = []

    def taken(self) -> list[Node]:
        """The nodes that were made since the last call."""
        made, self._new = self._new, []
        return made

    def better(self, node: Node) -> Node | None:
        """What stands for a sum with a mask, or a choice by a repeated one; None for all else."""
        match node.op:
            case Add():
                return self.chosen(node)
            case Select() if any(map(self.is_hiding, node.inputs[1:])):
                which = self.unrepeated(node.inputs[0])
                return dataclasses.replace(node, inputs=(which, *node.inputs[1:]))
            case _:
                return None

    def chosen(self, node: Node) -> Node | None:
        """The choice that a sum is; None if it is none."""
        for scores, mask in (node.inputs, node.inputs[::-1]):
            if self.shown(scores) is None and (shown := self.shown(mask)) is not None:
                shown = self.unrepeated(shown)
                lowest = self.constant(f"{node.name}.lowest", np.full((1,), LOWEST))
                return Node(node.name, Select(), (shown, scores, lowest))
        return None

    def shown(self, name: str) -> str | None:
        """The tensor that is 1 where a mask is 0, and 0 where it hides; None if it is no mask."""
        if name not in self._truths:
            self._truths[name] = self.told(name)
        return self._truths[name]

    def told(self, name: str) -> str | None:
        """See `shown`; of a tensor not looked at before."""
        node = self._nodes.get(name)
        if node is None:
            return None
        match node.op:
            case Constant():
                value = self.params[name]["value"]
                hides = value <= HIDES
                plain = hides.any() and (hides | (value == 0)).all()
                return self.constant(f"{name}.shown", ~hides) if plain else None
            case Scale(factor, offset) if self.is_truth(node.inputs[0]):
                return self.scaled(node, factor, offset)
            case Select():
                return self.selected(node)
            case Add():
                parts = [self.shown(i) for i in node.inputs]
                if None in parts:
                    return None
                return self.add(f"{name}.shown", Mul(), *(p for p in parts if p is not None))
            case Clip(low, None) if low is not None and low <= HIDES:
                return self.shown(node.inputs[0])
            case Broadcast() | Flatten() | Reshape() | Transpose() | Slice():
                return self.moved(node)
            case _:
                return None

    def moved(self, node: Node) -> str | None:
        """What a mask shows whose axes are put elsewhere."""
        source = self.shown(node.inputs[0])
        if source is None:
            return None
        return self.spread(node, source) or self.add(f"{node.name}.shown", node.op, source)

    def scaled(self, node: Node, factor: float, offset: float) -> str | None:
        """What a multiple of a truth shows."""
        if offset <= HIDES and abs(factor + offset) <= 1e-6 * abs(offset):
            return node.inputs[0]
        return self.opposite(node.inputs[0]) if offset == 0 and factor <= HIDES else None

    def selected(self, node: Node) -> str | None:
        """What a choice between 0 and a number that hides shows; `which` is 0 where y is chosen."""
        which, x, y = node.inputs
        if not self.is_truth(which):
            return None
        if self.is_hiding(y):
            return which if self.is_zero(x) else self.shown_by_both(node, which, x)
        if not self.is_hiding(x):
            return None
        kept = self.opposite(which)
        return kept if self.is_zero(y) or y == which else self.shown_by_both(node, kept, y)

    def shown_by_both(self, node: Node, truth: str, mask: str) -> str | None:
        """What a truth and another mask show; None if that is no mask."""
        shown = self.shown(mask)
        if shown is None:
            return None
        return self.add(f"{node.name}.shown", Mul(), truth, self.unrepeated(shown))

    def spread(self, node: Node, source: str) -> str | None:
        """A product of truths whose factors get the axes of size 1 of a reshape; None of others."""
        product = self._nodes.get(source)
        if product is None or not isinstance(product.op, Mul) or not isinstance(node.op, Reshape):
            return None
        sizes = [self.sizes(factor) for factor in product.inputs]
        if None in sizes or len({len(x) for x in sizes if x is not None}) != 1:
            return None
        known = [x for x in sizes if x is not None]
        whole = tuple(map(max, *known))
        shapes = [with_ones_of(node.op.shape, whole, x) for x in known]
        if None in shapes:
            return None
        pairs = zip(product.inputs, shapes, strict=True)
        factors = [self.reshaped(factor, x) for factor, x in pairs if x is not None]
        return self.add(f"{node.name}.shown", Mul(), *factors)

    def sizes(self, name: str) -> tuple[int, ...] | None:
        """The shape of a constant, or of what was reshaped, without the batch; None of others."""
        node = self._nodes.get(name)
        if node is not None and isinstance(node.op, Constant):
            return self.params[name]["value"].shape[1:]
        return node.op.shape if node is not None and isinstance(node.op, Reshape) else None

    def reshaped(self, name: str, shape: tuple[int, ...]) -> str:
        """A constant, or what was reshaped, in another shape."""
        node = self._nodes[name]
        if isinstance(node.op, Constant):
            return self.constant(f"{name}.wide", self.params[name]["value"].reshape(1, *shape))
        return self.add(f"{name}.wide", Reshape(shape), *node.inputs)

    def opposite(self, name: str) -> str:
        """Where a truth does not hold."""
        node = self._nodes.get(name)
        if node is not None and node.op == Scale(-1.0, 1.0):
            return node.inputs[0]
        if node is not None and isinstance(node.op, Constant):
            return self.constant(f"{name}.not", 1 - self.params[name]["value"])
        return self.add(f"{name}.not", Scale(-1.0, 1.0), name)

    def unrepeated(self, name: str) -> str:
        """A truth before it was repeated: scores have all positions themselves."""
        node = self._nodes.get(name)
        if node is not None and isinstance(node.op, Broadcast):
            return self.unrepeated(node.inputs[0])
        if node is None or not isinstance(node.op, Reshape):
            return name
        wide = self._nodes.get(node.inputs[0])
        if wide is None or not isinstance(wide.op, Broadcast):
            return name
        narrow = self._nodes.get(wide.inputs[0])
        if narrow is None or not isinstance(narrow.op, Reshape):
            return name
        shape = with_ones_of(node.op.shape, wide.op.shape, narrow.op.shape)
        if shape is None:
            return name
        return self.add(f"{name}.narrow", Reshape(shape), narrow.inputs[0])

    def is_zero(self, name: str) -> bool:
        """Whether a tensor is 0 everywhere."""
        value = self.params.get(name, {}).get("value")
        return value is not None and not value.any()

    def is_hiding(self, name: str) -> bool:
        """Whether a tensor hides everything."""
        value = self.params.get(name, {}).get("value")
        return value is not None and bool((value <= HIDES).all())

    def is_truth(self, name: str) -> bool:
        """Whether a tensor is known to hold zeros and ones."""
        return holds_truths(self._nodes.get, self.params, name)

    def constant(self, name: str, value: np.ndarray) -> str:
        """Adds a tensor of its own."""
        made = self.add(name, Constant())
        self.params[made] = {"value": value.astype(np.float32)}
        return made

    def add(self, name: str, op: Op, *inputs: str) -> str:
        """Adds a node; a name that is taken is numbered."""
        free, count = name, 1
        while free in self._nodes:
            count += 1
            free = f"{name}_{count}"
        self._nodes[free] = Node(free, op, inputs)
        self._new.append(self._nodes[free])
        return free


def with_ones_of(
    shape: tuple[int, ...], wide: tuple[int, ...], narrow: tuple[int, ...]
) -> tuple[int, ...] | None:
    """A shape that has axes of size 1 other than `wide` has, for what is not repeated yet.

    Args:
      shape: of what was repeated to `wide`, less or more some axes of size 1.
      wide: after it was repeated.
      narrow: before.

    Returns:
      `shape` with the sizes of `narrow`; None if it differs from `wide` otherwise.
    """
    large = [n for n in wide if n != 1]
    if len(narrow) != len(wide) or [n for n in shape if n != 1] != large:
        return None
    sizes = iter([n for n, repeated in zip(narrow, wide, strict=True) if repeated != 1])
    return tuple(1 if n == 1 else next(sizes) for n in shape)
