"""Channels that hang together: tensors whose channels can only be rescaled all at once.

A factor for each channel, s > 0, taken out of the layers that make a tensor can be put into those
that read it, as long as all between commutes with it. A sum ties the tensors it adds together: all
of them take the same factors.
"""

from typing import NamedTuple

from dfq_jax.graph.coupling import channel_flows
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import WEIGHTED, Conv2d, ConvTranspose2d, Op
from dfq_jax.graph.query import consumers, only_consumer, output_shapes, weighted_nodes
from dfq_jax.graph.volume_ops import Conv3d


class ChannelGroup(NamedTuple):
    """Tensors whose channels take the same factors.

    Attributes:
      tensors: in execution order.
      producers: layers that make them.
      consumers: layers that read them.
    """

    tensors: tuple[str, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


def channel_groups(model: Model) -> tuple[ChannelGroup, ...]:
    """The groups of a network whose channels may be rescaled without changing its function.

    Args:
      model: any network.

    Returns:
      Groups with at least one layer on each side, in execution order. What the network reads or
      returns, and what an operator touches that does not commute with factors, is in none.
    """
    graph, shapes = model.graph, output_shapes(model)
    flows, _ = channel_flows(model, shapes)
    tied = {name: name for name in shapes}
    fixed = {*graph.inputs, *graph.outputs}

    def root(name: str) -> str:
        while tied[name] != name:
            name = tied[name]
        return name

    for node in graph.nodes:
        read = [shapes[i] for i in node.inputs]
        if isinstance(node.op, WEIGHTED):
            continue
        if flows[node.name].factors and same_width(shapes[node.name], read):
            tied |= {root(i): root(node.name) for i in node.inputs}
        else:
            fixed |= {node.name, *node.inputs}
    fixed = {root(name) for name in fixed}
    kept = dict.fromkeys(root(n.name) for n in weighted_nodes(graph) if root(n.name) not in fixed)
    found = (gathered(graph, [t for t in shapes if root(t) == one]) for one in kept)
    return tuple(group for group in found if group.consumers)


def gathered(graph: Graph, tensors: list[str]) -> ChannelGroup:
    """A group with the layers around it."""
    layers = weighted_nodes(graph)
    producers = tuple(n.name for n in layers if n.name in tensors)
    return ChannelGroup(
        tuple(tensors), producers, tuple(n.name for n in layers if n.inputs[0] in tensors)
    )


def same_width(made: tuple[int, ...], read: list[tuple[int, ...]]) -> bool:
    """Whether all tensors have as many channels, the last axis."""
    return all(shape[-1:] == made[-1:] for shape in read)


class Joint(NamedTuple):
    """Two layers with one path between them, through at most one other operator.

    Attributes:
      first: the layer that makes what the other reads.
      between: the operator in the middle, if there is one.
      second: the layer that reads.
    """

    first: Node
    between: Node | None
    second: Node


def joints(graph: Graph) -> tuple[Joint, ...]:
    """Every two layers joined by nothing, or by one operator that nothing else reads."""
    readers, found = consumers(graph), []
    for node in weighted_nodes(graph):
        between, second = None, only_consumer(graph, readers, node.name)
        if second is not None and not isinstance(second.op, WEIGHTED):
            between, second = second, only_consumer(graph, readers, second.name)
        if second is not None and isinstance(second.op, WEIGHTED):
            found.append(Joint(node, between, second))
    return tuple(found)


def groups_of(op: Op) -> int:
    """Groups of channels that do not mix: those of a convolution, 1 for a linear layer."""
    return op.groups if isinstance(op, Conv2d | ConvTranspose2d | Conv3d) else 1


def is_depthwise(node: Node, kernel: tuple[int, ...]) -> bool:
    """Whether each output channel of a layer reads the input channel of the same number alone."""
    groups = groups_of(node.op)
    return groups > 1 and kernel[-2] == 1 and kernel[-1] == groups
