"""One program for every way to quantize a network in part: each site float, as it is, or at 8 bits.

Which of the three a site has is a traced number, so that the error of each layer alone, and what
each remedy would do, are runs of one compiled program.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from dfq_jax.allocation.costs import with_biases_of
from dfq_jax.graph.evaluate import Hook, Slots, Tensor, evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import WEIGHTED
from dfq_jax.numerics.affine import BIAS_LIMIT, Steps, snapped
from dfq_jax.quantization.calibrate import (
    Ranges,
    fit_edges,
    fit_kernels,
    histograms_of,
    steps_by_site,
)
from dfq_jax.quantization.plan import Plan, Spec, sharing_in, weight_spec
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sites import Site, products

FLOAT, AS_IS, FINE = range(3)
"""The levels of a site: not quantized, as the network has it, on a grid of 8 bits."""

FINE_BITS = 8
BATCH = 8

LevelNumbers = Mapping[Site, int]
Outputs = tuple[np.ndarray, ...]
"""The outputs of a network for all images, float32."""


class Judged(NamedTuple):
    """How near a network comes to the float one.

    Attributes:
      sqnr_db: of the output that suffers most.
      agreement: share of images, or positions, that are given the float network's class.
    """

    sqnr_db: float
    agreement: float


Judge = Callable[[Outputs, Outputs], Judged]
"""Outputs of the float network and of another one to what is thought of that one."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["reference", "model", "base", "fine"],
    meta_fields=["sites", "sums"],
)
@dataclasses.dataclass(frozen=True)
class Candidates:
    """A network whose every site has three levels.

    Attributes:
      reference: folded float network, with a bias wherever the quantized one has one.
      model: the quantized network's parameters, node for node the same graph.
      base: its grids.
      fine: grids of 8 bits for the same sites.
      sites: in the order in which a program is told their levels.
      sums: layers that sum products of integers, biases included.
    """

    reference: Model
    model: Model
    base: Mapping[Site, Steps]
    fine: Mapping[Site, Steps]
    sites: tuple[Site, ...]
    sums: tuple[str, ...]


def candidates(
    reference: Model,
    quantized: QuantizedModel,
    images: Shaped[Array, "n ..."],
    *,
    expected: Ranges | None = None,
    batch: int = BATCH,
) -> Candidates:
    """The three levels of every site; ranges of 8 bits are found as calibration finds them.

    Args:
      reference: the folded float network that the quantized one was made from.
      quantized: the network.
      images: normalised, to take ranges from.
      expected: ranges that are known without images.
      batch: images per forward pass.
    """
    made = without_fine(reference, quantized)
    whole, finer = made.reference, at_fine(reference, quantized.plan)
    histograms = histograms_of(whole, finer, images, batch)
    edges = fit_edges(whole, finer, histograms, expected or {})
    fitted = {**edges, **fit_kernels(whole, finer, edges)}
    fine = steps_by_site(whole, finer, fitted)
    return dataclasses.replace(made, fine=fine)


def without_fine(reference: Model, quantized: QuantizedModel) -> Candidates:
    """The sites as they are and in float; 8 bits are as they are, and nothing is calibrated."""
    plan, whole = quantized.plan, with_biases_of(reference, quantized.model)
    base = steps_by_site(whole, plan, quantized.qparams)
    sums = tuple(n.name for n in products(whole.graph) if plan.multiplies(n))
    return Candidates(whole, quantized.model, base, base, tuple(base), sums)


def at_fine(model: Model, plan: Plan) -> Plan:
    """The plan with 8 bits at every site that it quantizes."""
    return raised(model, plan, [site for site, _ in plan.entries])


def raised(model: Model, plan: Plan, sites: Iterable[Site]) -> Plan:
    """The plan with 8 bits at some sites, and at those that share a grid with them."""
    nodes, wanted = {n.name: n for n in model.graph.nodes}, set(sites)
    for _, group in plan.groups:
        wanted |= set(group) if wanted & set(group) else set()

    def finer(site: Site, spec: Spec) -> Spec:
        op = nodes[site.node].op
        if site not in wanted or spec.levels.bits >= FINE_BITS:
            return spec
        if isinstance(op, WEIGHTED) and site.argument is None:
            return weight_spec(op, FINE_BITS, spec.observer, sharing_in(spec.grid))
        return dataclasses.replace(spec, levels=dataclasses.replace(spec.grid, bits=FINE_BITS))

    entries = tuple((site, finer(site, spec)) for site, spec in plan.entries)
    return dataclasses.replace(plan, entries=entries)


def levels_between(plan: Plan, other: Plan) -> LevelNumbers:
    """The levels that make a network on one plan one on another, which may differ by 8-bit sites.

    Sites that the other plan leaves in float are so; sites that only it has are left out.
    """
    table = other.table

    def level(site: Site, spec: Spec) -> int:
        if site not in table:
            return FLOAT
        return AS_IS if table[site].levels.bits == spec.levels.bits else FINE

    return {site: level(site, spec) for site, spec in plan.entries}


def outputs_at(
    made: Candidates, images: Shaped[Array, "n ..."], levels: LevelNumbers, batch: int = BATCH
) -> Outputs:
    """The outputs of the network at these levels; sites that are not named stay float."""
    wanted = jnp.asarray([levels.get(site, FLOAT) for site in made.sites], jnp.int32)
    size, parts = min(batch, images.shape[0]), []
    for start in range(0, images.shape[0], size):
        first = min(start, images.shape[0] - size)
        found = run(made, images[first : first + size], wanted)
        parts.append([np.asarray(y)[start - first :] for y in found])
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))


@jax.jit
def run(made: Candidates, images: Tensor, levels: Int[Array, " sites"]) -> tuple[Tensor, ...]:
    """The outputs for one batch."""
    return evaluate(made.reference, images, hook=levelled(made, levels))[0]


def levelled(made: Candidates, levels: Int[Array, " sites"]) -> Hook:
    """The hook that gives each site its level. A bias goes with the kernel of its layer."""
    level = {site: levels[i] for i, site in enumerate(made.sites)}

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        if Site(node.name) in level:
            slots = {**slots, **parameters(made, level, node.name, slots)}
        sites = [Site(node.name, i) for i in range(len(args))]
        edges = zip(sites, args, strict=True)
        return slots, tuple(at_level(made, level, s, x, x) if s in level else x for s, x in edges)

    return hook


def parameters(
    made: Candidates, level: Mapping[Site, Array], layer: str, slots: Slots
) -> dict[str, Tensor]:
    """The kernel and bias of a layer at its levels, `slots` being the float ones.

    As in the deployed file, a bias is rounded to the product of both scales where the layer sums
    products of integers.
    """
    kernel, data = Site(layer), Site(layer, 0)
    ours = made.model.params[layer]
    found = {"kernel": at_level(made, level, kernel, slots["kernel"], ours["kernel"])}
    if "bias" not in slots:
        return found
    bias = jnp.where(level[kernel] == AS_IS, ours["bias"], slots["bias"])
    if layer not in made.sums:
        return {**found, "bias": bias}
    step = (steps_at(made, level, data).scale * steps_at(made, level, kernel).scale).reshape(-1)
    rounded = jnp.clip(jnp.round(bias / step), -BIAS_LIMIT, BIAS_LIMIT) * step
    integer = (level[kernel] != FLOAT) & (level[data] != FLOAT)
    return {**found, "bias": jnp.where(integer, rounded, bias)}


def steps_at(made: Candidates, level: Mapping[Site, Array], site: Site) -> Steps:
    """The grid of a site."""
    fine = level[site] == FINE
    return jax.tree.map(lambda b, f: jnp.where(fine, f, b), made.base[site], made.fine[site])


def at_level(
    made: Candidates, level: Mapping[Site, Array], site: Site, x: Tensor, quantized: Tensor
) -> Tensor:
    """`x` as it is in float and on 8 bits, and `quantized` as the network has it."""
    value = jnp.where(level[site] == AS_IS, quantized, x)
    return jnp.where(level[site] == FLOAT, x, snapped(value, steps_at(made, level, site)))
