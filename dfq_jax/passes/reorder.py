"""Channels of a network in another order, so that it computes the same."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Int

from dfq_jax.graph.coupling import Coupling
from dfq_jax.graph.graph import Model
from dfq_jax.graph.labels import Axes, Labels
from dfq_jax.graph.rewrite import with_params
from dfq_jax.types import Moments

Source = Int[np.ndarray, " sets"]
"""For every set of a `Coupling` which one moves to its place."""
Signature = tuple[tuple[str, int, int], ...]


def exchangeable(coupled: Coupling) -> tuple[tuple[int, ...], ...]:
    """Sets, counted from 0, that may change places: each touches the same axes as often.

    Halves of a tensor that is split, say, are read by different layers and stay apart.
    """
    every = {
        f"{name} of {node}": axes for node, v in coupled.slots.items() for name, axes in v.items()
    }
    touched: list[list[tuple[str, int, int]]] = [[] for _ in coupled.makers]
    for name, axes in {**coupled.tensors, **every}.items():
        for axis, numbers in enumerate(axes):
            counts = np.bincount(numbers, minlength=len(coupled) + 1)[1:]
            for one in np.flatnonzero(counts):
                touched[one].append((name, axis, int(counts[one])))
    found: dict[Signature, list[int]] = {}
    for one, signature in enumerate(touched):
        found.setdefault(tuple(signature), []).append(one)
    return tuple(map(tuple, found.values()))


def reordered(model: Model, coupled: Coupling, source: Source) -> Model:
    """The network with sets of channels in other places, all that makes and reads them too.

    Args:
      model: any network.
      coupled: `coupled_channels` of it.
      source: which set comes to the places of each; sets change places within those that
        `exchangeable` says.
    """
    params = {
        node: {
            slot: moved_along(model.params[node][slot], axes, source) for slot, axes in v.items()
        }
        for node, v in coupled.slots.items()
    }
    moments = {
        name: Moments(*(moved_along(x, coupled.tensors[name][-1:], source) for x in known))
        for name, known in model.moments.items()
    }
    return dataclasses.replace(with_params(model, params), moments=moments)


def moved_along(array: jax.Array, axes: Axes, source: Source) -> jax.Array:
    """A parameter with its positions in their new order along each axis."""
    found = np.asarray(array)
    for axis, numbers in enumerate(axes):
        found = found.take(places(numbers, source), axis)
    return jax.device_put(found)


def places(numbers: Labels, source: Source) -> Int[np.ndarray, " n"]:
    """For each position of an axis the one whose content moves there."""
    found = np.arange(len(numbers))
    for one in np.unique(numbers[numbers > 0]) - 1:
        if source[one] != one:
            found[numbers == one + 1] = np.flatnonzero(numbers == source[one] + 1)
    return found
