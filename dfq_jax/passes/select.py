"""Removes coupled channels from a network, or sets to zero what makes and reads them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, Shaped

from dfq_jax.errors import UsageError
from dfq_jax.graph.coupling import Coupling
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.labels import Axes, Labels
from dfq_jax.graph.ops import (
    Broadcast,
    Conv2d,
    ConvTranspose2d,
    GroupNorm,
    Op,
    Pad,
    Reshape,
    Slice,
)
from dfq_jax.graph.rewrite import replace_nodes, with_params
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.types import Moments

Kept = Bool[np.ndarray, " sets"]
"""For every set of a `Coupling` whether it stays."""
HARMLESS = ("var", "slope", "value")
"""Slots that do nothing to a channel that is zero and not read."""


def select(model: Model, coupled: Coupling, kept: Kept) -> Model:
    """The network with the channels of some sets only.

    Args:
      model: any network.
      coupled: `coupled_channels` of it.
      kept: which sets stay.

    Returns:
      A smaller network that computes what `masked` does. Kernels, biases, norms, constants and
      moments have lost the others' positions, and so have the sizes that operators carry.

    Raises:
      UsageError: if `kept` does not fit, or nothing would be left of a tensor.
    """
    stays = standing(coupled, kept)
    for name, axes in coupled.tensors.items():
        if any(len(labels) and not stays[labels].any() for labels in axes):
            layers = ", ".join(makers_of(coupled, axes))
            raise UsageError(
                f"nothing would be left of {name!r}: keep at least one of the channels made by "
                f"{layers}."
            )
    params = {
        node: {slot: taken(model.params[node][slot], axes, stays) for slot, axes in slots.items()}
        for node, slots in coupled.slots.items()
    }
    moments = {
        name: Moments(*(taken(x, coupled.tensors[name][-1:], stays) for x in known))
        for name, known in model.moments.items()
    }
    nodes = {
        n.name: dataclasses.replace(n, op=narrowed(n, coupled, stays)) for n in model.graph.nodes
    }
    graph = replace_nodes(model.graph, nodes)
    return dataclasses.replace(with_params(model, params), graph=graph, moments=moments)


def masked(model: Model, coupled: Coupling, kept: Kept) -> Model:
    """The network with zeros where `select` removes, so that shapes stay.

    Everything that makes or reads a removed channel is zero there: kernels, biases, scales and
    means of norms, and moments.

    Args:
      model: any network.
      coupled: `coupled_channels` of it.
      kept: which sets stay.

    Raises:
      UsageError: if `kept` does not fit.
    """
    stays = standing(coupled, kept)
    params = {
        node: {slot: axes for slot, axes in slots.items() if slot not in HARMLESS}
        for node, slots in coupled.slots.items()
    }
    given = {node: {s: model.params[node][s] for s in slots} for node, slots in params.items()}
    masks = {
        node: {slot: mask(axes, stays) for slot, axes in slots.items()}
        for node, slots in params.items()
    }
    known = {name: tuple(both) for name, both in model.moments.items()}
    still = {name: (mask(coupled.tensors[name][-1:], stays),) * 2 for name in known}
    params, moments = blanked((given, known), (masks, still))
    moments = {name: Moments(*both) for name, both in moments.items()}
    return dataclasses.replace(with_params(model, params), moments=moments)


def mask(axes: Axes, stays: Bool[np.ndarray, " numbers"]) -> Bool[np.ndarray, "..."]:
    """Whether each position stays, in a shape that broadcasts to the array's."""
    made = np.ones((1,) * len(axes), bool)
    for axis, labels in enumerate(axes):
        if labels.any():
            made = made & stays[labels].reshape(
                [-1 if at == axis else 1 for at in range(len(axes))]
            )
    return made


@jax.jit
def blanked(arrays: PyTree, masks: PyTree) -> PyTree:
    """Zeros where masks are false: one program for all arrays of a network."""
    return jax.tree.map(lambda array, stays: jnp.where(stays, array, 0), arrays, masks)


def standing(coupled: Coupling, kept: Kept) -> Bool[np.ndarray, " numbers"]:
    """For every number of a coupling whether its positions stay; 0 always does.

    Raises:
      UsageError: if there are not as many as sets.
    """
    if len(kept) != len(coupled):
        raise UsageError(f"got {len(kept)} values of `kept`, expected one a set: {len(coupled)}.")
    return np.concatenate([[True], np.asarray(kept, bool)])


def makers_of(coupled: Coupling, axes: Axes) -> tuple[str, ...]:
    """The layers that make what a tensor could lose."""
    numbers = {int(one) for labels in axes for one in labels} - {0}
    return tuple(dict.fromkeys(m for one in sorted(numbers) for m in coupled.makers[one - 1]))


def taken(
    array: Shaped[Array, "..."], axes: Axes, stays: Bool[np.ndarray, " numbers"]
) -> Shaped[Array, "..."]:
    """The positions that stay; on the host, where no shape has to be compiled for."""
    if all(stays[labels].all() for labels in axes):
        return array
    left = np.asarray(array)
    for axis, labels in enumerate(axes):
        left = left.compress(stays[labels], axis)
    return jax.device_put(left)


# Operators that carry sizes


def narrowed(node: Node, coupled: Coupling, stays: Bool[np.ndarray, " numbers"]) -> Op:
    """The operator of a node for tensors that have lost positions."""
    made = coupled.tensors[node.name]
    read = coupled.tensors[node.inputs[0]] if node.inputs else made
    size: Callable[[Labels], int] = lambda labels: int(stays[labels].sum())
    match node.op:
        case Conv2d(groups=groups) | ConvTranspose2d(groups=groups) | Conv3d(groups=groups) if (
            groups > 1
        ):
            each = size(coupled.slots[node.name]["kernel"][-2])
            return dataclasses.replace(node.op, groups=size(read[-1]) // each)
        case GroupNorm(groups):
            groups = groups * size(read[-1]) // len(read[-1])
            return dataclasses.replace(node.op, groups=groups)
        case Reshape(shape) | Broadcast(shape):
            sizes = [s if s == -1 else size(v) for s, v in zip(shape, made[1:], strict=True)]
            return dataclasses.replace(node.op, shape=tuple(sizes))
        case Slice(bounds):
            parts = [slid(b, stays[v]) for b, v in zip(bounds, read, strict=True)]
            return dataclasses.replace(node.op, bounds=tuple(parts))
        case Pad(widths):
            ends = zip(widths, made, strict=True)
            return dataclasses.replace(node.op, widths=tuple(thinner(w, stays[v]) for w, v in ends))
        case _:
            return node.op


def slid(
    bound: tuple[int, int | None, int], stays: Bool[np.ndarray, " size"]
) -> tuple[int, int | None, int]:
    """Bounds of the same part among the positions that stay."""
    if stays.all():
        return bound
    start, stop, step = slice(*bound).indices(len(stays))
    first, last = int(stays[:start].sum()), int(stays[:stop].sum())
    return first, None if bound[1] is None else last, step


def thinner(width: tuple[int, int], stays: Bool[np.ndarray, " size"]) -> tuple[int, int]:
    """Padding without the positions of it that go."""
    before, after = width
    return int(stays[:before].sum()), int(stays[len(stays) - after :].sum())
