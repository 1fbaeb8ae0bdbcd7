"""LQ-Nets without training: kernels and activations on levels fitted to them.

Zhang et al. 2018, "LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural
Networks": its quantizers and their alternating fit (section 3.2), run to the end on folded kernels
and on the activations of synthetic images.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Shaped

from dfq_jax.errors import PlanError
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.numerics.basis import TURNS, Basis, LearnedLevels, fit_basis
from dfq_jax.numerics.histogram import Histogram
from dfq_jax.passes.ranges import nonnegative
from dfq_jax.quantization.calibrate import histograms_of
from dfq_jax.quantization.plan import Plan, Site, on_other_levels
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.recipes.dfq_biases import placed, rounded_kernels
from dfq_jax.recipes.quantized import Quantized

MOST_BITS = 4
"""Longest basis; wider sites keep their uniform grids."""


fit_at_once = jax.jit(fit_basis, static_argnames=("n", "kind", "turns"))


class Levelled(NamedTuple):
    """A network on learned levels and the float one it was made from, node for node the same."""

    quantized: QuantizedModel
    reference: Model


def lq_nets(
    made: Quantized,
    images: Shaped[Array, "n ..."] | None,
    *,
    turns: int = TURNS,
    correct: bool = True,
    batch: int = 16,
) -> Levelled:
    """Replaces the grids of up to 4 bits by learned levels, as many as the grid had.

    Kernels have a basis of signs for each output channel; tensors without negative values one of
    bits. All else stays on its grid: the ends that presets keep at 8 bits, signed tensors, images.

    Args:
      made: by `dfq`; its plan says what is quantized and to how many bits.
      images: normalised images to fit activations to; None leaves those on their grids.
      turns: of the fit.
      correct: correct biases analytically for what the levels change in kernels; the paper trains
        on instead.
      batch: images per forward pass.

    Returns:
      The network and its float reference. It is simulated and judged like any other; it has no
      ONNX form. Biases of layers on learned levels stay in float, as sums of bit planes do.

    Raises:
      PlanError: if nothing has 4 bits or fewer.
    """
    plan, reference = made.quantized.plan, made.reference
    fitted = fit_kernels(reference, plan, turns)
    if images is not None:
        histograms = histograms_of(reference, plan, images, batch)
        fitted |= fit_edges(reference.graph, plan, histograms, turns)
    if not fitted:
        raise PlanError(
            f"no kernel or rectified activation of {plan.scheme} has {MOST_BITS} bits or fewer to "
            f"be given learned levels; ask for w4a4 or fewer."
        )
    levels = {site: found.levels for site, found in fitted.items()}
    bases = {site: found.basis for site, found in fitted.items()}
    qparams = {**made.quantized.qparams, **bases}
    begun = QuantizedModel(reference, on_other_levels(plan, levels), qparams)
    model = placed_on_levels(begun, correct=correct)
    return Levelled(dataclasses.replace(begun, model=model), reference)


class Fitted(NamedTuple):
    """Learned levels of a site, their static and their traced half."""

    levels: LearnedLevels
    basis: Basis


def fit_kernels(reference: Model, plan: Plan, turns: int) -> dict[Site, Fitted]:
    """The bases of all kernels of few bits."""
    fitted = {}
    for node in weighted_nodes(reference.graph):
        site = Site(node.name)
        spec = plan.spec(site)
        if spec is not None and spec.levels.bits <= MOST_BITS:
            levels = LearnedLevels(spec.levels.bits, "signs", axis=-1)
            rows = levels.rows(reference.params[node.name]["kernel"])
            basis = fit_at_once(rows, levels.bits, "signs", turns=turns).basis
            fitted[site] = Fitted(levels, basis)
    return fitted


def fit_edges(
    graph: Graph, plan: Plan, histograms: Mapping[str, Histogram], turns: int
) -> dict[Site, Fitted]:
    """The bases of all tensors of few bits without negative values; sites of a group share one."""
    positive, table, fitted = nonnegative(graph), plan.table, {}
    for tensor, sites in plan.groups:
        bits = table[sites[0]].levels.bits
        if bits > MOST_BITS or tensor not in positive:
            continue
        values, counts = histograms[tensor].centres[None], histograms[tensor].counts[None]
        basis = fit_at_once(values, bits, "bits", weight=counts, turns=turns).basis
        fitted |= dict.fromkeys(sites, Fitted(LearnedLevels(bits, "bits"), basis))
    return fitted


@partial(jax.jit, static_argnames="correct")
def placed_on_levels(quantized: QuantizedModel, *, correct: bool) -> Model:
    """The float network with its kernels on their levels."""
    return placed(quantized.model, rounded_kernels(quantized), correct=correct)
