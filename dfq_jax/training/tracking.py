"""Ranges of activations that follow the images of a training's first steps, and then stay."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.numerics.affine import covers, from_range
from dfq_jax.numerics.levels import Parameters, affine_of
from dfq_jax.quantization.plan import Plan, Spec
from dfq_jax.quantization.simulate import QParams
from dfq_jax.quantization.sites import Site

BYTE = 8
"""Grids of so many bits do not learn from images that are not real."""
TrackedRanges = Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]]
"""{tensor: its extremes, averaged over steps}."""


class Tracking(NamedTuple):
    """Ranges of activations that follow the images of the first steps, and then stay.

        r <- momentum r + (1 - momentum) extremes of the batch
        r <- extremes of r and of the batch, where momentum is None

    GDFQ's released code divides by `1 - momentum^t` in place, which makes ranges thousands of times
    too wide for a while; this does not.

    Attributes:
      steps: in which they follow.
      momentum: weight of the past, at the first step there is none; None for ranges that widen to
        all that was seen.
    """

    steps: int
    momentum: float | None = 0.9


def grouped(plan: Plan) -> dict[str, tuple[Site, ...]]:
    """{name of a tensor on one grid: the sites that read it so}; apart for each grid of it."""
    return {f"{number}:{tensor}": sites for number, (tensor, sites) in enumerate(plan.groups)}


def spec_of(plan: Plan, sites: tuple[Site, ...]) -> Spec:
    """How sites of one grid are quantized."""
    return plan.table[sites[0]]


def ranged_parameters(
    spec: Spec, name: str, given: Parameters, ranges: TrackedRanges
) -> Parameters:
    """The parameters of an activation: of its tracked range, if there is one."""
    return from_range(*ranges[name], spec.grid) if name in ranges else given


def tracked_at_first(
    tracking: Tracking | None, plan: Plan, qparams: QParams, inputs: tuple[str, ...]
) -> TrackedRanges:
    """Ranges before the first step, of the tensors that are tracked.

    Args:
      tracking: how; None for no ranges.
      plan: what is quantized.
      qparams: scales and zero points as calibrated.
      inputs: of the network, which are not tracked.
    """
    if tracking is None:
        return {}
    low = {
        f"{number}:{tensor}": (qparams[sites[0]], spec_of(plan, sites).grid)
        for number, (tensor, sites) in enumerate(plan.groups)
        if tensor not in inputs and spec_of(plan, sites).levels.bits < BYTE
    }
    return {name: covers(affine_of(given), grid) for name, (given, grid) in low.items()}


def tensors_of(ranges: TrackedRanges) -> tuple[str, ...]:
    """The tensors of a graph whose ranges are tracked."""
    return tuple(dict.fromkeys(name.split(":", 1)[1] for name in ranges))


def tracked(
    tracking: Tracking | None, ranges: TrackedRanges, extremes: TrackedRanges, step: Array
) -> TrackedRanges:
    """Ranges a step later.

    Args:
      tracking: how; None for ranges that stay.
      ranges: so far.
      extremes: {tensor of the graph: its extremes in this batch, before it is rounded}.
      step: steps taken so far.
    """
    if tracking is None:
        return ranges
    steps, momentum = tracking
    new = {name: extremes[name.split(":", 1)[1]] for name in ranges}
    if momentum is None:
        wider = {name: widened(ranges[name], new[name]) for name in ranges}
        new = jax.tree.map(lambda wide, v: jnp.where(step == 0, v, wide), wider, new)
    past = jnp.where(step == 0, 0.0, momentum or 0.0)

    def follow(before: Array, new: Array) -> Array:
        return jnp.where(step < steps, past * before + (1 - past) * new, before)

    return jax.tree.map(follow, dict(ranges), new)


def widened(before: tuple[Array, Array], new: tuple[Array, Array]) -> tuple[Array, Array]:
    """The range that holds two."""
    return jnp.minimum(before[0], new[0]), jnp.maximum(before[1], new[1])
