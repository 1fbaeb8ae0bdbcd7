"""Ranges of DFQ: from statistics, from images, or from both, whichever is nearer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from dfq_jax.graph.graph import Model
from dfq_jax.numerics.levels import scales_of
from dfq_jax.passes.channel_split import runs, split_channels
from dfq_jax.passes.thrifty_ranges import thrifty_ranges
from dfq_jax.quantization.calibrate import Ranges, calibrate
from dfq_jax.quantization.narrowing import with_narrowed_ranges
from dfq_jax.quantization.plan import Plan, Site
from dfq_jax.quantization.simulate import QuantizedModel


class RangeEvidence(NamedTuple):
    """What ranges are taken from.

    Attributes:
      images: normalised; None for statistics alone.
      sigmas: standard deviations that recorded statistics stand for; None to leave them aside.
      spare: leave images aside where statistics predict every range, of 8 bits each.
      settled: ranges that are taken as they are.
    """

    images: Shaped[Array, "n ..."] | None
    sigmas: float | None
    spare: bool
    settled: Ranges


def ranged(
    whole: Model, reference: Model, plan: Plan, seen: RangeEvidence, split: float, *, widen: bool
) -> tuple[QuantizedModel, bool]:
    """The network on grids, and whether images were looked at.

    Args:
      whole: before its channels were split.
      reference: the float network.
      plan: what is quantized.
      seen: what ranges are taken from.
      split: share of channels split.
      widen: whether 8-bit grids cover predicted ranges too.
    """
    expected = {} if seen.sigmas is None else thrifty_ranges(reference, sigmas=seen.sigmas)
    spared = seen.spare and suffices(plan, {*expected, *whole.graph.inputs})
    images = None if spared else seen.images
    quantized = calibrate(
        reference, plan, images, expected=expected, settled=seen.settled, widen=widen
    )
    if images is not None and widen and seen.sigmas is not None:
        quantized = with_narrowed_ranges(quantized, expected, images)
    return on_grids(quantized, whole, split), images is not None


splitting = jax.jit(split_channels, static_argnames="ratio")


def coarse_tensors(plan: Plan) -> tuple[str, ...]:
    """The tensors of a plan on grids of fewer than 8 bits."""
    table = plan.table
    return tuple(tensor for tensor, sites in plan.groups if table[sites[0]].levels.bits < 8)


def on_grids(quantized: QuantizedModel, whole: Model, ratio: float) -> QuantizedModel:
    """The network with channels split so that the codes of copies sum to that of the whole.

    Args:
      quantized: made from `whole` by splitting channels into equal halves.
      whole: before its channels were split.
      ratio: share of channels split.
    """
    if ratio == 0:
        return quantized
    scales = {
        site.node: scales_of(a) for site, a in quantized.qparams.items() if site.argument is None
    }
    nothing = jnp.zeros(())
    steps = {run.layer: scales.get(run.layer, nothing) for run in runs(whole)}
    model = splitting(whole, ratio, steps=steps)
    return QuantizedModel(model, quantized.plan, quantized.qparams)


def suffices(plan: Plan, known: set[str]) -> bool:
    """Whether no image is needed to find the ranges of a plan."""
    return all(predicted(plan, tensor, sites, known) for tensor, sites in plan.groups)


def predicted(plan: Plan, tensor: str, sites: tuple[Site, ...], known: set[str]) -> bool:
    """Whether a tensor's range is known and wide enough a grid to take it as it is."""
    spec = plan.spec(sites[0])
    return tensor in known and (spec is None or spec.levels.bits == 8)
