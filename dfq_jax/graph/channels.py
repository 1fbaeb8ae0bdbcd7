"""Channels that hang together: tensors whose channels can only be rescaled all at once.

A factor for each channel, s > 0, taken out of the layers that make a tensor can be put into those
that read it, as long as all between commutes with it (`graph/factors.py`). A sum ties the tensors
it adds together: all of them take the same factors.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.graph.factors import ChannelFactors, channel_factors, families
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import WEIGHTED, Conv2d, ConvTranspose2d, Op
from dfq_jax.graph.query import consumers, only_consumer, weighted_nodes
from dfq_jax.graph.volume_ops import Conv3d


class ChannelGroup(NamedTuple):
    """Tensors whose channels take the same factors.

    Attributes:
      tensors: in execution order.
      producers: layers that make them.
      consumers: layers that read them.
      places: {tensor: which of the group's factors, counted from 1, its channels take}; a tensor
        that is not there has them all, in order.
    """

    tensors: tuple[str, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    places: Mapping[str, ChannelFactors] = {}

    def spread(self, tensor: str, s: Float[Array, " f"]) -> Float[Array, " c"]:
        """What each channel of a tensor is divided by."""
        if tensor not in self.places:
            return s
        numbers, powers = self.places[tensor]
        return jnp.concatenate([jnp.ones(1, s.dtype), s])[numbers] ** jnp.asarray(powers, s.dtype)

    def widest(self, tensor: str, widths: Float[Array, " c"]) -> Float[Array, " f"]:
        """For each factor the largest of its channels' widths, in units of that factor; else 0."""
        if tensor not in self.places:
            return widths
        numbers, powers = self.places[tensor]
        own = widths ** jnp.asarray(1 / powers, widths.dtype)
        return jnp.zeros(1 + self.size, widths.dtype).at[numbers].max(own)[1:]

    @property
    def size(self) -> int:
        """How many factors there are, where any tensor does not have them all."""
        return max((int(p.numbers.max(initial=0)) for p in self.places.values()), default=0)


def channel_groups(model: Model) -> tuple[ChannelGroup, ...]:
    """The groups of a network whose channels may be rescaled without changing its function.

    Args:
      model: any network.

    Returns:
      Groups with at least one layer on each side, in execution order. What the network reads or
      returns, and what an operator touches that does not commute with factors, is in none.
    """
    found = channel_factors(model)
    groups = (gathered(model.graph, found, numbers) for numbers in families(found))
    return tuple(group for group in groups if group.producers and group.consumers)


def gathered(
    graph: Graph, found: Mapping[str, ChannelFactors], numbers: tuple[int, ...]
) -> ChannelGroup:
    """A group of the factors with these numbers, with the layers around it."""
    places = {}
    for tensor, powers in found.items():
        inside = np.isin(powers.numbers, numbers)
        if inside.any():
            own = np.where(inside, 1 + np.searchsorted(numbers, powers.numbers), 0)
            places[tensor] = ChannelFactors(own, powers.powers)
    layers = weighted_nodes(graph)
    producers = tuple(n.name for n in layers if n.name in places)
    consumers = tuple(n.name for n in layers if n.inputs[0] in places)
    return ChannelGroup(tuple(places), producers, consumers, places)


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
