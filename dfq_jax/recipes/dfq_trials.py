"""Ranges of DFQ where nothing tells how to find them: tried, and chosen by outputs."""

import dataclasses
from collections.abc import Iterable

from jaxtyping import Array, Shaped

from dfq_jax.graph.graph import Model
from dfq_jax.numerics.ranges import MinMax, Observer, Percentile
from dfq_jax.quantization.narrowing import activation_gap
from dfq_jax.quantization.observers import DEFAULT_OBSERVER, Observers
from dfq_jax.quantization.plan import Plan
from dfq_jax.quantization.simulate import QuantizedModel

BLIND: dict[Observer, float] = {DEFAULT_OBSERVER: 1.0, MinMax(): 1.0, Percentile(): 1.25}
"""How 8-bit ranges are found where images are noise and nothing else tells: as outputs like it.
Their errors are taken so many times: photographs reach further than noise does, and what clips all
tensors alike has to gain a decibel by it."""


def observed(plan: Plan, observers: Observers | None, peaks: bool, blind: bool) -> list[Plan]:
    """The plan with what its 8-bit ranges are found by; several where outputs are to choose."""
    if peaks:
        return [observing(plan, MinMax())]
    if blind and observers is None:
        return [observing(plan, each) for each in BLIND]
    return [plan]


def nearest_network(
    tried: Iterable[tuple[QuantizedModel, bool]],
    reference: Model,
    images: Shaped[Array, "n ..."] | None,
    counted: Iterable[float] = BLIND.values(),
) -> tuple[QuantizedModel, bool]:
    """Of networks on several grids the one whose outputs are nearest to the float network's.

    Args:
      tried: networks, and whether images were looked at.
      reference: the float network.
      images: normalised; a few of them decide.
      counted: how many times the error of each is taken.
    """
    first, *others = tried
    if images is None or not others:
        return first
    gaps = [
        times * activation_gap(quantized, reference, images)
        for (quantized, _), times in zip([first, *others], counted, strict=False)
    ]
    return [first, *others][gaps.index(min(gaps))]


def observing(plan: Plan, observer: Observer) -> Plan:
    """The plan with another way to find the ranges of its 8-bit edges."""
    edge = lambda site, spec: site.argument is not None and spec.levels.bits == 8
    entries = tuple(
        (site, dataclasses.replace(spec, observer=observer) if edge(site, spec) else spec)
        for site, spec in plan.entries
    )
    return dataclasses.replace(plan, entries=entries)
