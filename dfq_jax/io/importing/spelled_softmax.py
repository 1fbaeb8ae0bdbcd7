"""Softmax that exporters of JAX and TensorFlow spell out, as the operator it is."""

import dataclasses
from collections.abc import Mapping

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import Activation, Div, Flatten, Reduce, Reshape, Softmax, Sub


def spelled_softmax(graph: Graph) -> Graph:
    """exp(x - max x) / sum exp(x - max x) along one axis, or without the maximum, as one node."""
    by_name = graph.by_name
    made = {node.name: found for node in graph.nodes if (found := softmax(node, by_name))}
    nodes = tuple(made.get(node.name, node) for node in graph.nodes)
    return dataclasses.replace(graph, nodes=nodes)


def softmax(node: Node, by_name: Mapping[str, Node]) -> Node | None:
    """The softmax that a quotient is, None if it is another one."""
    shares = by_name.get(node.inputs[0]) if isinstance(node.op, Div) else None
    if shares is None or shares.op != Activation("exp"):
        return None
    axis = axis_of("sum", node.inputs[1], shares.name, by_name)
    if axis is None:
        return None
    (source,) = shares.inputs
    less = by_name.get(source)
    if less is not None and isinstance(less.op, Sub):
        x, largest = less.inputs
        source = x if axis_of("max", largest, x, by_name) == axis else source
    return Node(node.name, Softmax(axis), (source,))


def axis_of(kind: str, name: str, source: str, by_name: Mapping[str, Node]) -> int | None:
    """The one axis along which a tensor is the sum or maximum of `source`, and of size 1."""
    node, shape = by_name.get(name), None
    if node is not None and isinstance(node.op, Reshape | Flatten):
        shape = node.op.shape if isinstance(node.op, Reshape) else (1,)
        node = by_name.get(node.inputs[0])
    if node is None or not isinstance(node.op, Reduce):
        return None
    op = node.op
    if op.kind != kind or len(op.axes) != 1 or op.axes[0] < 1 or node.inputs != (source,):
        return None
    (axis,) = op.axes
    kept = op.keepdims if shape is None else len(shape) >= axis and shape[axis - 1] == 1
    return axis if kept else None
