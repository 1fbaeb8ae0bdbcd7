"""Channels of a tensor brought to one width, so that one grid serves all of them.

Kernels have a scale for each output channel, activations have one for all: at few bits a channel
that is a tenth as wide as the widest has a tenth of the codes. A factor for each channel moves from
the layers that make a tensor, whose scales absorb it, to those that read it. Cross-layer
equalization (`passes/equalize.py`) does so for kernels that share a scale; this is for activations.
"""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph.channels import ChannelGroup, channel_groups
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import Clip, Relu
from dfq_jax.passes.equalize import capped, uncapped, with_tensors_divided
from dfq_jax.passes.moments import expected_moments
from dfq_jax.types import Moments

LEVEL = 4.0
"""Deviations that make up the width of a channel."""
LEAST = 1 / 64
"""The narrowest a channel is taken for, in units of the widest of its tensor."""


def level_channels(
    model: Model, sigmas: float = LEVEL, *, only: Iterable[str] | None = None
) -> tuple[Model, dict[str, Float[Array, ""]]]:
    """The network with all channels of a tensor as wide as its widest one.

    The width of a channel is its mean and so many deviations as batch-norm statistics predict them,
    behind a ReLU6 at most 6. A ReLU6 between layers loses its ceiling, since it would be another
    one for every channel; the grid that ends where the widest channel did takes its place. Other
    than that the function stays the same.

    Args:
      model: folded network with moments.
      sigmas: deviations that count.
      only: tensors, of which a group has to hold one; None for all.

    Returns:
      The network, and {tensor that had a ceiling: where its grid ends}.
    """
    ceilings = {n.name: ceiling_of(n.op) for n in model.graph.nodes if capped(n.op)}
    wanted = None if only is None else set(only)
    groups = [
        group
        for group in channel_groups(uncapped(model, ceilings))
        if wanted is None or wanted & set(group.tensors)
    ]
    levelled = uncapped(model, [t for g in groups for t in g.tensors if t in ceilings])
    known, ends = expected_moments(model), {}
    for group in groups:
        width = width_of(model, group, known, sigmas)
        if width is not None:
            widest = jnp.max(width)
            share = jnp.where(width > 0, jnp.maximum(width / widest, LEAST), 1.0)
            levelled = with_tensors_divided(levelled, group, share)
            ends |= {t: widest for t in group.tensors if t in ceilings}
    return levelled, ends


def ceiling_of(op: object) -> float:
    """Where a ReLU6 or its kind ends."""
    match op:
        case Relu(ceiling) | Clip(_, ceiling) if ceiling is not None:
            return ceiling
        case _:
            return float("inf")


def width_of(
    model: Model, group: ChannelGroup, known: Mapping[str, Moments], sigmas: float
) -> Float[Array, " c"] | None:
    """The largest magnitude expected of each channel in what the layers of a group read.

    None where statistics say nothing of it.
    """
    read = dict.fromkeys(model.graph[name].inputs[0] for name in group.consumers)
    widths = {tensor: reach(model, tensor, known, sigmas) for tensor in read}
    found = [group.widest(t, width) for t, width in widths.items() if width is not None]
    return jnp.max(jnp.stack(found), axis=0) if found else None


def reach(
    model: Model, tensor: str, known: Mapping[str, Moments], sigmas: float
) -> Float[Array, " c"] | None:
    """How far each channel of a tensor goes; behind a ReLU only upwards, to its ceiling at most."""
    node = model.graph.by_name.get(tensor)
    rectified = node is not None and (isinstance(node.op, Relu) or capped(node.op))
    moments = known.get(node.inputs[0] if rectified and node is not None else tensor)
    if moments is None:
        return None
    deviations = sigmas * jnp.sqrt(moments.var)
    if not rectified or node is None:
        return jnp.abs(moments.mean) + deviations
    return jnp.clip(moments.mean + deviations, 0.0, ceiling_of(node.op))
