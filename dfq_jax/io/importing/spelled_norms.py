"""Layer and RMS norms that exporters spell out, as the operators they are.

Files of ONNX before opset 17 have no layer norm, and no opset before 23 an RMS norm: they take
means of squares, add, take roots and divide. Only a norm with a scale for each value is found, as
its shape says that it runs over the last axis.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Constant,
    Div,
    LayerNorm,
    Mul,
    Power,
    Reduce,
    Scale,
    Sub,
)
from dfq_jax.graph.query import consumers
from dfq_jax.graph.token_ops import RmsNorm
from dfq_jax.io.importing.builder import HostSlots


class Standardised(NamedTuple):
    """A tensor divided by its deviation, or by the root of the mean of its squares.

    Attributes:
      source: the tensor.
      axis: along which it is.
      eps: added to the mean of squares.
      centred: whether its mean was taken away first.
    """

    source: str
    axis: int
    eps: float
    centred: bool


def spelled_norms(
    graph: Graph, params: Mapping[str, HostSlots]
) -> tuple[Graph, dict[str, HostSlots]]:
    """The network with a norm in place of every one that is spelled out and scaled."""
    found = _Norms(graph, params)
    made, params = dict(found.all_norms()), dict(params)
    nodes = []
    for node in graph.nodes:
        if node.name in made:
            node, params[node.name] = made[node.name]
        nodes.append(node)
    return dataclasses.replace(graph, nodes=tuple(nodes)), params


class _Norms:
    """Follows norms back from their scales; lives during one pass."""

    def __init__(self, graph: Graph, params: Mapping[str, HostSlots]) -> None:
        self._graph, self._params = graph, params
        self._nodes, self._readers = graph.by_name, consumers(graph)

    def all_norms(self) -> Iterator[tuple[str, tuple[Node, HostSlots]]]:
        """(node that a norm replaces, (the norm, its parameters)), in order."""
        for node in self._graph.nodes:
            for x, other in self.sides(node, Mul):
                scale, norm = self.vector(other), self.standardised(x)
                if scale is None or norm is None or scale.ndim - 1 != norm.axis:
                    continue
                slots = {"scale": scale.reshape(-1)}
                if not norm.centred:
                    yield node.name, (Node(node.name, RmsNorm(norm.eps), (norm.source,)), slots)
                    break
                last, bias = self.shifted(node, scale.shape)
                slots |= {} if bias is None else {"bias": bias}
                yield last, (Node(last, LayerNorm(norm.eps), (norm.source,)), slots)
                break

    def shifted(self, node: Node, shape: tuple[int, ...]) -> tuple[str, np.ndarray | None]:
        """The sum with a constant for each value that alone reads a scaled norm, and that."""
        readers = [reader for reader, _ in self._readers[node.name]]
        if len(readers) == 1 and node.name not in self._graph.outputs:
            for x, other in self.sides(readers[0], Add):
                bias = self.vector(other)
                if x == node.name and bias is not None and bias.shape == shape:
                    return readers[0].name, bias.reshape(-1)
        return node.name, None

    def sides(self, node: Node | None, kind: type) -> Iterator[tuple[str, str]]:
        """Both orders of what an operator of that kind reads; nothing of any other."""
        if node is not None and isinstance(node.op, kind):
            yield node.inputs[0], node.inputs[1]
            yield node.inputs[1], node.inputs[0]

    def vector(self, name: str) -> np.ndarray | None:
        """A constant that varies along its last axis alone."""
        node = self._nodes.get(name)
        if node is None or not isinstance(node.op, Constant):
            return None
        value = self._params[name]["value"]
        return value if value.ndim > 1 and value.size == value.shape[-1] > 1 else None

    def standardised(self, name: str) -> Standardised | None:
        """The standardised tensor called so, None if it is none."""
        node = self._nodes.get(name)
        pairs: list[tuple[str, str | None]] = []
        if node is not None and isinstance(node.op, Div):
            pairs = [(node.inputs[0], self.under_root(node.inputs[1]))]
        pairs += [(x, self.under_inverse_root(y)) for x, y in self.sides(node, Mul)]
        for x, power in pairs:
            shifted = self._nodes.get(power or "")
            if shifted is None or not isinstance(shifted.op, Scale) or shifted.op.factor != 1:
                continue
            axis = self.mean_axis(shifted.inputs[0])
            if axis is None or self.squared(self.only(shifted.inputs[0])) != x:
                continue
            source = self.centred(x, axis)
            return Standardised(source or x, axis, shifted.op.offset, source is not None)
        return None

    def under_root(self, name: str) -> str | None:
        """What a tensor is the root of."""
        node = self._nodes.get(name)
        rooted = node is not None and node.op in (Activation("sqrt"), Power(0.5))
        return node.inputs[0] if node is not None and rooted else None

    def under_inverse_root(self, name: str) -> str | None:
        """What a tensor is the inverse of the root of."""
        node = self._nodes.get(name)
        if node is None:
            return None
        if node.op == Power(-0.5):
            return node.inputs[0]
        return self.under_root(node.inputs[0]) if node.op == Power(-1.0) else None

    def mean_axis(self, name: str) -> int | None:
        """The one axis along which a tensor is a mean that keeps its axes."""
        node = self._nodes.get(name)
        if node is None or not isinstance(node.op, Reduce):
            return None
        plain = node.op.kind == "mean" and node.op.keepdims and len(node.op.axes) == 1
        return node.op.axes[0] if plain else None

    def only(self, name: str) -> str:
        """What the node called so reads first."""
        return self._nodes[name].inputs[0]

    def squared(self, name: str) -> str | None:
        """What a tensor is the square of."""
        node = self._nodes.get(name)
        if node is None:
            return None
        square = node.op == Power(2.0) or (isinstance(node.op, Mul) and len({*node.inputs}) == 1)
        return node.inputs[0] if square else None

    def centred(self, name: str, axis: int) -> str | None:
        """What a tensor is less its mean along an axis."""
        node = self._nodes.get(name)
        if node is None or not isinstance(node.op, Sub):
            return None
        source, mean = node.inputs
        fits = self.mean_axis(mean) == axis and self.only(mean) == source
        return source if fits else None
