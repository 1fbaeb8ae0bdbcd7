"""Channels that can be removed only together, found by following every operator of a network."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from dfq_jax.graph.channel_flow import channel_flow
from dfq_jax.graph.graph import Model
from dfq_jax.graph.labels import Axes, Flow, Labels, Read, Tied, fixed, labelled, stay
from dfq_jax.graph.query import output_shapes, weighted_nodes


class Coupled(NamedTuple):
    """One set of channels that can be removed only together, and all that goes with it.

    Attributes:
      makers: layers that compute them, in execution order.
      tensors: (tensor, axis, index) of every value.
      slots: (node, slot, axis, index) of every parameter.
    """

    makers: tuple[str, ...]
    tensors: tuple[tuple[str, int, int], ...]
    slots: tuple[tuple[str, str, int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Coupling:
    """All channels of a network that can be removed, as numbered sets.

    Every axis of a tensor or parameter has an array of numbers: that of the set to which each
    position belongs, counted from 1 in execution order, and 0 for positions that stay. So a score
    of every set is a sum over equal numbers.

    Attributes:
      tensors: {tensor: numbers along each axis}.
      slots: {node: {slot: numbers along each axis}}, of parameters that lose positions.
      makers: for each set the layers that compute it.
    """

    tensors: Mapping[str, Axes]
    slots: Mapping[str, Mapping[str, Axes]]
    makers: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        """How many sets there are."""
        return len(self.makers)

    def groups(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """{layers: the sets that these layers compute together, counted from 0}."""
        found: dict[tuple[str, ...], list[int]] = {}
        for number, makers in enumerate(self.makers):
            found.setdefault(makers, []).append(number)
        return {makers: tuple(numbers) for makers, numbers in found.items()}

    def sets(self) -> tuple[Coupled, ...]:
        """Each set with all it touches."""
        tensors: list[list[tuple[str, int, int]]] = [[] for _ in self.makers]
        slots: list[list[tuple[str, str, int, int]]] = [[] for _ in self.makers]
        for name, axes in self.tensors.items():
            for axis, index, number in positions(axes):
                tensors[number - 1].append((name, axis, index))
        for name, arrays in self.slots.items():
            for slot, axes in arrays.items():
                for axis, index, number in positions(axes):
                    slots[number - 1].append((name, slot, axis, index))
        parts = zip(self.makers, map(tuple, tensors), map(tuple, slots), strict=True)
        return tuple(Coupled(*part) for part in parts)


def positions(axes: Axes) -> Iterator[tuple[int, int, int]]:
    """(axis, index, number) of every position of a set."""
    for axis, numbers in enumerate(axes):
        for index in np.flatnonzero(numbers).tolist():
            yield axis, index, int(numbers[index])


def coupled_channels(model: Model) -> Coupling:
    """Everything that can be removed from a network so that what is left computes the rest.

    What the network reads and returns stays, and so does what an operator mixes with other channels
    in a way that a missing one would change, such as what a layer norm reads.

    Args:
      model: any network; only shapes of its parameters are looked at.

    Returns:
      The sets. A network from which the positions of some sets are cut (`passes/select.py`)
      computes what it did with their parameters at zero.
    """
    shapes = output_shapes(model)
    flows, tied = channel_flows(model, shapes)
    makers: dict[int, list[str]] = {}
    for node in weighted_nodes(model.graph):
        for root in dict.fromkeys(tied.resolved(flows[node.name].axes[-1]).tolist()):
            if root:
                makers.setdefault(root, []).append(node.name)
    number = {root: count for count, root in enumerate(makers, start=1)}

    def numbered(labels: Labels) -> Labels:
        found = [number.get(root, 0) for root in tied.resolved(labels).tolist()]
        return np.array(found, np.int64) if labels.any() else labels

    numbers = lambda axes: tuple(map(numbered, axes))
    inputs = {name: still(shapes[name]) for name in model.graph.inputs}
    return Coupling(
        inputs | {name: numbers(flow.axes) for name, flow in flows.items()},
        {
            name: {slot: numbers(axes) for slot, axes in flow.slots.items()}
            for name, flow in flows.items()
            if flow.slots
        },
        tuple(map(tuple, makers.values())),
    )


def channel_flows(
    model: Model, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Flow], Tied]:
    """What every operator of a network does to channels.

    Args:
      model: the network.
      shapes: of its tensors, inputs included (`output_shapes`).

    Returns:
      {node: its flow}, and which labels all of them together have made the same.
    """
    tied, first = Tied(), 1
    env = {name: Read(still(shapes[name]), True) for name in model.graph.inputs}
    flows: dict[str, Flow] = {}
    for node in model.graph.nodes:
        slots = {slot: x.shape for slot, x in model.params.get(node.name, {}).items()}
        xs = tuple(as_read(env[name], tied) for name in node.inputs)
        flow = channel_flow(node.op, xs, slots, shapes[node.name], first)
        tied.tie(flow.ties)
        first = max(first, *(1 + int(labels.max(initial=0)) for labels in flow.axes))
        flows[node.name], env[node.name] = flow, Read(flow.axes, flow.silent)
    for name in model.graph.outputs:
        tied.tie(fixed(*env[name].axes))
    return flows, tied


def still(shape: tuple[int, ...]) -> Axes:
    """Labels of a tensor that stays as it is."""
    return tuple(map(stay, shape))


def as_read(made: Read, tied: Tied) -> Read:
    """A tensor by what is known of its labels now; one without any has nothing to lose."""
    axes = tuple(map(tied.resolved, made.axes))
    return Read(axes, made.silent or not labelled(axes))
