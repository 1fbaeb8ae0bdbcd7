"""Chooses scales and zero points: kernels from themselves, activations from images or moments."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from dfq_jax.errors import PlanError
from dfq_jax.graph.evaluate import Tensor, evaluate
from dfq_jax.graph.graph import Edge, Model
from dfq_jax.graph.ops import Constant
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.numerics.affine import (
    Affine,
    Grid,
    NumpyOrJax,
    Steps,
    covers,
    from_range,
    guard_bias_overflow,
    spread,
    steps_of,
)
from dfq_jax.numerics.basis import LearnedLevels
from dfq_jax.numerics.basis import fit_basis as fit_basis
from dfq_jax.numerics.histogram import Histogram, empty, extend
from dfq_jax.numerics.levels import Parameters, affine_of, scales_of, with_scales
from dfq_jax.numerics.ranges import (
    MinMax,
    Statistics,
    activation_affine,
    averages,
    extremes,
    merged_ranges,
    unseen,
    weight_affine,
)
from dfq_jax.numerics.signs import Signs, best_alpha
from dfq_jax.quantization.columns import fit_side_by_side, in_columns
from dfq_jax.quantization.plan import Plan, Site, Spec
from dfq_jax.quantization.simulate import QParams, QuantizedModel

Ranges = Mapping[str, tuple[Float[NumpyOrJax, ""], Float[NumpyOrJax, ""]]]


def calibrate(
    model: Model,
    plan: Plan,
    images: Shaped[Array, "n ..."] | None,
    *,
    expected: Ranges | None = None,
    settled: Ranges | None = None,
    widen: bool = True,
    batch: int = 16,
) -> QuantizedModel:
    """Fits every grid of a plan.

    Two passes over the images: extremes first, then histograms between them, so memory holds one
    batch of one network whatever the number of images.

    Args:
      model: folded float network.
      plan: what to quantize.
      images: normalised calibration images; None to rely on `expected` alone.
      expected: ranges known without images, used where there are no images, and where the
        observer is `Statistics`.
      settled: ranges that are taken as they are.
      widen: let grids of 8 bits cover what is expected in addition to what the images show: a
        wide 8-bit range costs little, a clipped one much.
      batch: images per forward pass.

    Returns:
      The network with its scales and zero points; kernels are not rounded yet.

    Raises:
      PlanError: if a tensor has neither images nor an expected range, and is no constant.
    """
    histograms = None if images is None else histograms_of(model, plan, images, batch)
    edges = fit_edges(model, plan, histograms, expected or {}, settled=settled, widen=widen)
    return QuantizedModel(model, plan, {**fit_kernels(model, plan, edges), **edges})


def histograms_of(
    model: Model, plan: Plan, images: Shaped[Array, "n ..."], batch: int
) -> Mapping[str, Histogram]:
    """{tensor: histogram of its values over all images}."""
    if images.shape[0] == 0:
        raise PlanError("calibrate() needs at least one image.")
    batch, plan = min(batch, images.shape[0]), looking(plan)
    ranges, count = unseen_ranges(plan), images.shape[0]
    for index, x in enumerate(batches(images, batch)):
        known = index * batch
        shown = BatchShown(index + 1, min(batch, count - known), min(known + batch, count))
        ranges = observe_ranges(model, plan, x, ranges, shown.traced())
    histograms: Mapping[str, Histogram] = {t: empty(*found) for t, found in ranges.items()}
    for x in batches(images, batch):
        histograms = observe_histograms(model, plan, x, ranges, histograms)
    return histograms


def looking(plan: Plan) -> Plan:
    """The plan by what its observers do while images pass: all but averages keep extremes.

    Plans that differ only in what they make of a histogram share programs so.
    """
    entries = tuple(
        (site, spec if averages(spec.observer) else dataclasses.replace(spec, observer=MinMax()))
        for site, spec in plan.entries
    )
    return dataclasses.replace(plan, entries=entries)


def batches(images: Shaped[Array, "n ..."], size: int):
    """Consecutive batches of one static size; the last one overlaps its predecessor if need be."""
    count = images.shape[0]
    for start in range(0, count, size):
        first = min(start, count - size)
        yield images[first : first + size]


class BatchShown(NamedTuple):
    """Which batch of images is shown.

    Attributes:
      number: from 1.
      fresh: images of it that no earlier batch had; they are its last.
      so_far: all images so far, these included.
    """

    number: Any
    fresh: Any
    so_far: Any

    def traced(self) -> "BatchShown":
        """The same as floats that one program takes."""
        return BatchShown(*map(jnp.float32, self))


def unseen_ranges(plan: Plan) -> Ranges:
    """{tensor: the range of no batch}, for `observe_ranges` to begin from."""
    return {tensor: unseen(plan.table[sites[0]].observer) for tensor, sites in plan.groups}


def capture(model: Model, plan: Plan, x: Tensor) -> dict[str, Tensor]:
    """{tensor: its float values}, one entry per group of sites."""
    wanted = {Edge(sites[0].node, sites[0].argument or 0): tensor for tensor, sites in plan.groups}
    _, found = evaluate(model, x, taps=wanted)
    return {wanted[edge]: value for edge, value in found.items()}


@partial(jax.jit, static_argnames="plan")
def observe_ranges(
    model: Model, plan: Plan, x: Tensor, before: Ranges, shown: BatchShown
) -> Ranges:
    """{tensor: range} over `x` and everything observed before."""
    observers = {tensor: plan.table[sites[0]].observer for tensor, sites in plan.groups}
    found = capture(model, plan, x)
    new = {t: extremes(v, shown.fresh, observers[t]) for t, v in found.items()}
    share = shown.fresh / shown.so_far
    return {t: merged_ranges(before[t], new[t], shown.number, observers[t], share) for t in new}


@partial(jax.jit, static_argnames="plan")
def observe_histograms(
    model: Model, plan: Plan, x: Tensor, ranges: Ranges, before: Mapping[str, Histogram]
) -> Mapping[str, Histogram]:
    """{tensor: histogram} over `x` and everything observed before."""
    return {t: extend(before[t], v, *ranges[t]) for t, v in capture(model, plan, x).items()}


def fit_edges(
    model: Model,
    plan: Plan,
    histograms: Mapping[str, Histogram] | None,
    expected: Ranges,
    *,
    settled: Ranges | None = None,
    widen: bool = True,
) -> dict[Site, Affine]:
    """Scales of every edge; sites of one group share theirs.

    The range of an image needs no estimate: its pixels are 0..255 and the contract says the rest.
    Nor does that of a constant: its values are there.
    """
    table, fitted = plan.table, {}
    constants = {n.name for n in model.graph.nodes if isinstance(n.op, Constant)}
    for tensor, sites in plan.groups:
        spec = table[sites[0]]
        if tensor in model.graph.inputs:
            lo, hi = model.input.value_range
            affine = from_range(np.float32(lo), np.float32(hi), spec.grid)
        elif tensor in constants:
            values = np.asarray(model.params[tensor]["value"])
            affine = from_range(values.min(), values.max(), spec.grid)
        elif settled is not None and tensor in settled:
            affine = from_range(*settled[tensor], spec.grid)
        elif tensor in expected and isinstance(spec.observer, Statistics):
            affine = from_range(*expected[tensor], spec.grid)
        elif histograms is None:
            if tensor not in expected:
                raise PlanError(
                    f"no batch-norm statistics predict the range of {tensor!r}; "
                    "calibrate it with images."
                )
            affine = from_range(*expected[tensor], spec.grid)
        else:
            affine = fit_activation(histograms[tensor], spec)
            if widen and tensor in expected and spec.levels.bits == 8:
                affine = widened(affine, expected[tensor], spec)
        fitted |= dict.fromkeys(sites, jax.device_put(affine))
    return fitted


def widened(
    affine: Affine, expected: tuple[Float[NumpyOrJax, ""], Float[NumpyOrJax, ""]], spec: Spec
) -> Affine:
    """The grid extended to cover an expected range as well."""
    lo, hi = covers(jax.device_get(affine), spec.grid)
    low, high = jax.device_get(expected)
    return from_range(np.minimum(lo, low), np.maximum(hi, high), spec.grid)


@partial(jax.jit, static_argnames="spec")
def fit_activation(histogram: Histogram, spec: Spec) -> Affine:
    """Scale and zero point of one activation tensor."""
    return activation_affine(histogram, spec.grid, spec.observer)


@partial(jax.jit, static_argnames="spec")
def fit_kernel(kernel: Tensor, spec: Spec) -> Parameters:
    """The parameters of one kernel's levels: of a grid as its observer says, else the best ones."""
    match spec.levels:
        case Grid():
            return weight_affine(kernel, spec.levels, spec.observer)
        case Signs():
            return best_alpha(kernel, spec.levels)
        case LearnedLevels(bits, kind):
            return fit_basis(spec.levels.rows(kernel), bits, kind).basis


def fit_kernels(model: Model, plan: Plan, edges: QParams) -> dict[Site, Parameters]:
    """Scales of every kernel, raised where a bias would overflow int32."""
    layers = {Site(node.name): node for node in weighted_nodes(model.graph)}
    table, params = plan.table, model.params
    kernels = {s: (params[s.node][s.slot], table[s]) for s in layers if s in table}
    together = fit_side_by_side({s: each for s, each in kernels.items() if in_columns(*each)})
    fitted: dict[Site, Parameters] = {}
    for site, each in kernels.items():
        slots, data = params[site.node], Site(site.node, 0)
        parameters = together[site] if site in together else fit_kernel(*each)
        if "bias" in slots and plan.multiplies(layers[site]):
            parameters = guarded(parameters, scales_of(edges[data]), slots["bias"])
        fitted[site] = parameters
    return fitted


def steps_by_site(model: Model, plan: Plan, qparams: QParams) -> dict[Site, Steps]:
    """The grids of all sites, those of groups spread over the inputs of their kernels.

    Raises:
      PlanError: if a site has other levels than a grid.
    """
    found = {}
    for site, spec in plan.entries:
        shape = () if site.argument is not None else model.params[site.node][site.slot].shape
        found[site] = steps_of(spread(affine_of(qparams[site]), shape, spec.grid), spec.grid)
    return found


def guarded(kernel: Parameters, scale: Tensor, bias: Tensor) -> Parameters:
    """Kernel scales raised where a bias would overflow; the largest bias decides a single scale."""
    scales, own, wanted = (np.asarray(x) for x in (scales_of(kernel), scale, bias))
    if scales.size == 1:
        wanted = abs(wanted).max(keepdims=True)
    return with_scales(kernel, jax.device_put(guard_bias_overflow(scales, own, wanted)))


def guard_biases(quantized: QuantizedModel) -> QuantizedModel:
    """The same network with kernel scales raised where a new bias would overflow int32."""
    qparams = dict(quantized.qparams)
    for node in weighted_nodes(quantized.model.graph):
        kernel, data = Site(node.name), Site(node.name, 0)
        slots = quantized.model.params[node.name]
        if "bias" in slots and quantized.plan.multiplies(node):
            scale = scales_of(qparams[data])
            qparams[kernel] = guarded(qparams[kernel], scale, slots["bias"])
    return QuantizedModel(quantized.model, quantized.plan, qparams)
