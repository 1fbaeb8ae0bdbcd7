"""What is reconstructed at a time: a block of the network with its share of the plan.

A unit is canonical, so that equal blocks share their compiled programs. A tensor whose values
several blocks carry on one grid is quantized where the last of them reads it: until then the very
same rounding would only come earlier.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from dfq_jax.graph.cuts import (
    Block,
    as_block,
    blocks,
    canonical,
    canonical_graph,
    canonical_names,
)
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.query import consumers, only_consumer, weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import Affine
from dfq_jax.numerics.levels import affine_of
from dfq_jax.quantization.plan import Plan, Site
from dfq_jax.quantization.simulate import QParams, QuantizedModel
from dfq_jax.quantization.sites import ABSORBED

Host = Shaped[np.ndarray, "n ..."]
"""What passes from unit to unit, in memory of the host: values, or ids before the first."""


class Unit(NamedTuple):
    """A piece of a network that is reconstructed as one.

    Attributes:
      block: the piece under its original names.
      plan: what is quantized in it, under canonical names.
    """

    block: Block
    plan: Plan

    @property
    def names(self) -> dict[str, str]:
        """{original: canonical name}."""
        return canonical_names(self.block)

    @property
    def title(self) -> str:
        """What reports call it: its first layer with weights, and how many more."""
        layers = [site.node for site, _ in self.plan.entries if site.argument is None]
        original = {new: old for old, new in self.names.items()}
        first = original[layers[0]] if layers else self.block.names[0]
        return first if len(layers) < 2 else f"{first} +{len(layers) - 1}"


def units_of(graph: Graph, plan: Plan, *, merge: int | Sequence[int] = 1) -> tuple[Unit, ...]:
    """The units of a network, in the order in which data passes through them.

    Args:
      graph: of the folded network.
      plan: what is quantized.
      merge: so many consecutive blocks make a unit ("stages" of BRECQ, modules of MRECG); 0 makes
        one of the whole network; several numbers, of all blocks, are those of one unit each.

    Returns:
      Every block, those included of which nothing is quantized.
    """
    pieces = blocks(graph)
    if isinstance(merge, int):
        merge = [merge or len(pieces)] * -(-len(pieces) // (merge or len(pieces)))
    ends = list(accumulate(merge))
    groups = [pieces[end - size : end] for end, size in zip(ends, merge, strict=True)]
    merged = tuple(joined(graph, group) for group in groups)
    where = {name: index for index, block in enumerate(merged) for name in block.names}
    last = [max(where[s.node] for s in sites) for _, sites in plan.groups]
    read = lambda index: {group for group, home in enumerate(last) if home == index}
    return tuple(Unit(b, share(plan, b, read(i))) for i, b in enumerate(merged))


def layers_of(unit: Unit) -> tuple[Unit, ...]:
    """The layers of a unit that have a kernel to round, each with what it absorbs.

    They are units of the canonical unit, as that is one of the network.
    """
    graph = canonical_graph(unit.block)
    readers = consumers(graph)
    found = []
    for node in weighted_nodes(graph):
        if Site(node.name) not in unit.plan.table:
            continue
        chain = [node]
        while (after := only_consumer(graph, readers, chain[-1].name)) is not None:
            if not isinstance(after.op, ABSORBED):
                break
            chain.append(after)
        block = as_block(graph, chain, frozenset())
        groups = enumerate(unit.plan.groups)
        read = {i for i, (_, sites) in groups if any(s.node == node.name for s in sites)}
        found.append(Unit(block, share(unit.plan, block, read)))
    return tuple(found)


def joined(graph: Graph, pieces: tuple[Block, ...]) -> Block:
    """Consecutive blocks as one."""
    if len(pieces) == 1:
        return pieces[0]
    inside = {name for piece in pieces for name in piece.names}
    return as_block(graph, [n for n in graph.nodes if n.name in inside], frozenset())


def share(plan: Plan, block: Block, groups: Collection[int]) -> Plan:
    """The part of a plan that a block carries out, under canonical names.

    Args:
      plan: of the whole.
      block: the part.
      groups: numbers of those whose edges are quantized in it.

    Returns:
      Its plan.
    """
    names = canonical_names(block)
    inside = set(block.names)
    moved = lambda site: Site(names[site.node], site.argument)
    kept = [
        tuple(site for site in plan.groups[i][1] if site.node in inside) for i in sorted(groups)
    ]
    edges = {site for sites in kept for site in sites}
    entries = [
        (moved(site), spec)
        for site, spec in plan.entries
        if site.node in inside and (site.argument is None or site in edges)
    ]
    renamed = tuple((f"t{i}", tuple(map(moved, sites))) for i, sites in enumerate(kept))
    return Plan(tuple(entries), renamed, plan.scheme, plan.layers, plan.store)


def rest_of(model: Model, units: Sequence[Unit]) -> Model | None:
    """Consecutive units of a network, in float and as one; None if there are none."""
    if not units:
        return None
    return canonical(joined(model.graph, tuple(unit.block for unit in units)), model)


def unit_model(unit: Unit, model: Model) -> Model:
    """The unit as a network of its own, with its parameters."""
    return canonical(unit.block, model)


def unit_qparams(unit: Unit, qparams: QParams) -> dict[Site, Affine]:
    """{canonical site: scales} of what a unit quantizes."""
    original = {new: old for old, new in unit.names.items()}
    scales = lambda site: affine_of(qparams[Site(original[site.node], site.argument)])
    return {site: scales(site) for site, _ in unit.plan.entries}


def with_unit(
    quantized: QuantizedModel, unit: Unit, model: Model, qparams: Mapping[Site, Affine]
) -> QuantizedModel:
    """The network with one unit replaced.

    Args:
      quantized: the network.
      unit: which part.
      model: the unit with new parameters.
      qparams: its new scales, by canonical site.

    Returns:
      The network; edges elsewhere that share a grid with one of the unit share its new scale too.
    """
    original = {new: old for old, new in unit.names.items()}
    back = {Site(original[s.node], s.argument): affine for s, affine in qparams.items()}
    for _, sites in quantized.plan.groups:
        changed = [back[site] for site in sites if site in back]
        if changed:
            back |= dict.fromkeys(sites, changed[0])
    params = {original[name]: dict(slots) for name, slots in model.params.items()}
    return QuantizedModel(
        with_params(quantized.model, params), quantized.plan, {**quantized.qparams, **back}
    )
