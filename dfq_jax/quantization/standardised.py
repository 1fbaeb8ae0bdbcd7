"""Norms that a network spells out in elementary operators, wherever their axes are."""

from collections.abc import Iterator

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Clip,
    Constant,
    Div,
    Maximum,
    Mul,
    Power,
    Reduce,
    Relu,
    Scale,
    Sub,
)
from dfq_jax.graph.query import consumers, keeps_values

BEFORE = (Add, Clip, Maximum, Mul, Relu, Scale, Sub)
"""What stands between means and the root of a deviation."""


def standardising(graph: Graph) -> frozenset[str]:
    """Operators of norms that are spelled out: from squares and means to what is divided by them.

    `x` less its mean, times a scale and divided by the root of the mean of `x^2` less the square of
    that mean, plus a shift; with the parts in any order, and some of them left out.
    """
    found = _Deviations(graph)
    return frozenset(found.all_operators())


class _Deviations:
    """Follows roots to both sides; lives during one call."""

    def __init__(self, graph: Graph) -> None:
        self._nodes = graph.by_name
        self._readers = {
            name: [reader for reader, _ in found] for name, found in consumers(graph).items()
        }
        self._inputs = frozenset(graph.inputs)

    def all_operators(self) -> Iterator[str]:
        """The operators of every deviation, and of what is divided by it."""
        for node in self._nodes.values():
            if node.op in (Activation("sqrt"), Power(0.5), Power(-0.5)):
                before = self.before(node)
                if before:
                    yield from (node.name, *before, *self.behind(node))

    def before(self, root: Node) -> set[str]:
        """What a root is made of, up to squares and sums; nothing if it is no deviation."""
        found, squares, queue = set[str](), False, [*root.inputs]
        while queue:
            name = queue.pop()
            node = self._nodes.get(name)
            if name in self._inputs or node is None:
                return set()
            if name in found or isinstance(node.op, Constant):
                continue
            found.add(name)
            if isinstance(node.op, Reduce):
                squared = self.square(node)
                found |= squared
                squares |= bool(squared)
            elif isinstance(node.op, BEFORE) or keeps_values(node.op):
                queue.extend(node.inputs)
            else:
                return set()
        return found if squares else set()

    def square(self, total: Node) -> set[str]:
        """The squares that a sum is of, and what moves them; nothing if it is of something else."""
        moves = set[str]()
        node = self._nodes.get(total.inputs[0])
        while node is not None and keeps_values(node.op) and node.inputs:
            moves.add(node.name)
            node = self._nodes.get(node.inputs[0])
        if node is None:
            return set()
        twice = isinstance(node.op, Mul) and len({*node.inputs}) == 1
        return {node.name, *moves} if twice or node.op == Power(2.0) else set()

    def behind(self, root: Node) -> Iterator[str]:
        """From a root to what is divided by it, and what that is scaled and shifted by."""
        node, divided = root, False
        while (after := self.only_reader(node)) is not None:
            other = next((n for n in after.inputs if n != node.name), None)
            constant = other is not None and isinstance(self.op(other), Constant)
            match after.op:
                case Power() | Scale():
                    pass
                case Mul() | Div() | Add() | Sub() if constant:
                    pass
                case Mul() | Div() if other is not None and not divided:
                    divided = True
                    if isinstance(self.op(other), Sub) and len(self._readers[other]) == 1:
                        yield other
                case op:
                    if not keeps_values(op):
                        return
            yield after.name
            node = after

    def only_reader(self, node: Node) -> Node | None:
        """The one operator that reads a tensor, None for several or none."""
        readers = self._readers[node.name]
        return readers[0] if len(readers) == 1 else None

    def op(self, name: str) -> object:
        """The operator that makes a tensor; None for an input."""
        node = self._nodes.get(name)
        return None if node is None else node.op
