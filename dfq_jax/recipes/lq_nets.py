"""LQ-Nets without training: kernels and activations on levels fitted to them.

Zhang et al. 2018, "LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural
Networks": its quantizers and their alternating fit (section 3.2), run to the end on folded kernels
and on the activations of synthetic images.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from dfq_jax.errors import PlanError
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.numerics.basis import TURNS, Basis, fit, snap
from dfq_jax.numerics.histogram import Histogram
from dfq_jax.passes.ranges import nonnegative
from dfq_jax.quantize.calibrate import histograms_of
from dfq_jax.quantize.plan import Plan, Site
from dfq_jax.quantize.simulate import LevelledModel, QuantizedModel
from dfq_jax.recipes.dfq import Kernel, Quantized, placed, rounded_kernels

MOST_BITS = 4
"""Longest basis; wider sites keep their uniform grids."""


fit_basis = jax.jit(fit, static_argnames=("n", "kind", "turns"))


class Levelled(NamedTuple):
    """A network on learned levels and the float one it was made from, node for node the same."""

    quantized: LevelledModel
    reference: Model


def lq_nets(
    made: Quantized,
    images: Float[Array, "n h w c"] | None,
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
      ONNX form.

    Raises:
      PlanError: if nothing has 4 bits or fewer.
    """
    plan, reference = made.quantized.plan, made.reference
    bases = fit_kernels(reference, plan, turns)
    if images is not None:
        histograms = histograms_of(reference, plan, images, batch)
        bases |= fit_edges(reference.graph, plan, histograms, turns)
    if not bases:
        raise PlanError(
            f"no kernel or rectified activation of {plan.scheme} has {MOST_BITS} bits or fewer to "
            f"be given learned levels; ask for w4a4 or fewer."
        )
    model = placed_on_levels(made.quantized, reference, bases, correct=correct)
    qparams = {site: a for site, a in made.quantized.qparams.items() if site not in bases}
    return Levelled(LevelledModel(model, plan, qparams, bases), reference)


def fit_kernels(reference: Model, plan: Plan, turns: int) -> dict[Site, Basis]:
    """The bases of all kernels of few bits."""
    fitted = {}
    for node in weighted_nodes(reference.graph):
        site = Site(node.name, "kernel")
        spec = plan.spec(site)
        if spec is not None and spec.grid.bits <= MOST_BITS:
            rows = by_channel(reference.params[node.name]["kernel"])
            fitted[site] = fit_basis(rows, spec.grid.bits, "signs", turns=turns).basis
    return fitted


def fit_edges(
    graph: Graph, plan: Plan, histograms: Mapping[str, Histogram], turns: int
) -> dict[Site, Basis]:
    """The bases of all tensors of few bits without negative values; sites of a group share one."""
    positive, table, fitted = nonnegative(graph), plan.table, {}
    for tensor, sites in plan.groups:
        bits = table[sites[0]].grid.bits
        if bits > MOST_BITS or tensor not in positive:
            continue
        values, counts = histograms[tensor].centres[None], histograms[tensor].counts[None]
        basis = fit_basis(values, bits, "bits", weight=counts, turns=turns).basis
        fitted |= dict.fromkeys(sites, basis)
    return fitted


def by_channel(kernel: Kernel) -> Float[Array, "chan m"]:
    """A row of weights for each output channel."""
    return kernel.reshape(-1, kernel.shape[-1]).T


@partial(jax.jit, static_argnames="correct")
def placed_on_levels(
    quantized: QuantizedModel, reference: Model, bases: Mapping[Site, Basis], *, correct: bool
) -> Model:
    """The float network with kernels on their levels, or grids where they have none."""
    kernels = rounded_kernels(QuantizedModel(reference, quantized.plan, quantized.qparams))
    for name, kernel in kernels.items():
        site = Site(name, "kernel")
        if site in bases:
            exact = reference.params[name]["kernel"]
            kernels[name] = snap(by_channel(exact), bases[site]).T.reshape(kernel.shape)
    return placed(reference, kernels, correct=correct)
