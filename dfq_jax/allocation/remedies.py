"""What can be done about a network that lost too much: plans, and the options that make them."""

import dataclasses
import glob
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from dfq_jax.allocation.candidates import FINE_BITS, raised
from dfq_jax.graph.graph import Model
from dfq_jax.quantization.plan import Plan, with_shortcuts
from dfq_jax.quantization.sites import Site, products

STEPS = (1, 2, 5, 10, 20, 50, 100)
"""How many of the worst layers are given more bits."""


class Remedy(NamedTuple):
    """A change of a plan.

    Attributes:
      name: in words.
      plan: what it makes of the network's plan.
      rules: what it adds to the rules, as `parse_rule` reads them.
      options: other options of the command, flag and value by turns.
    """

    name: str
    plan: Plan
    rules: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def remedies_for(model: Model, plan: Plan, worst: Sequence[str]) -> tuple[Remedy, ...]:
    """What is worth trying for a network.

    Args:
      model: folded network.
      plan: as it is quantized now.
      worst: its layers, the one that costs most first.

    Returns:
      More bits for the worst layers, nested; for all tensors; for all kernels; for shortcuts. Where
      all have 8 bits already, the worst layers in float instead.
    """
    layers = {n.name for n in products(model.graph)}
    low = [name for name in worst if name in layers and least_bits(plan, name) < FINE_BITS]
    if not low:
        return tuple(kept_float(model, plan, [name for name in worst if name in layers]))
    return (*more_bits(model, plan, low), *wholesale(model, plan))


def least_bits(plan: Plan, layer: str) -> int:
    """The fewest bits of what a layer multiplies; 8 where it is in float."""
    bits = [spec.levels.bits for site, spec in plan.entries if site.node == layer]
    return min(bits, default=FINE_BITS)


def more_bits(model: Model, plan: Plan, worst: Sequence[str]) -> Iterator[Remedy]:
    """The worst layers at 8 bits, more and more of them; then so, and all activations too."""
    sites = [site for site, _ in plan.entries]
    edges = [site for site in sites if site.argument is not None]
    nested = [(k, [s for s in sites if s.node in worst[:k]]) for k in counts(len(worst))]
    bits = "w8" if plan.scheme.activation_bits is None else "8"
    rules = lambda k: tuple(f"{glob.escape(name)}={bits}" for name in worst[:k])
    for k, chosen in nested:
        yield Remedy(f"{told(k)} at 8 bits", raised(model, plan, chosen), rules(k))
    if raised(model, plan, edges) == plan:
        return
    for k, chosen in nested:
        finer = raised(model, plan, [*edges, *chosen])
        yield Remedy(f"{told(k)} and all activations", finer, ("*=a8", *rules(k)))


def kept_float(model: Model, plan: Plan, worst: Sequence[str]) -> Iterator[Remedy]:
    """The worst layers in float, more and more of them; never all of several."""
    for k in counts(len(worst)):
        rules = tuple(f"{glob.escape(name)}=float" for name in worst[:k])
        yield Remedy(f"{told(k)} in float", without(model, plan, worst[:k]), rules)


def counts(layers: int) -> list[int]:
    """How many of so many layers are tried: few, a half, three quarters; all of a single one."""
    tried = {k for k in STEPS if k <= layers / 2} | {layers // 2, 3 * layers // 4}
    return sorted(tried - {0}) or [layers]


def told(k: int) -> str:
    """So many layers in words."""
    return "the worst layer" if k == 1 else f"the {k} worst layers"


def without(model: Model, plan: Plan, layers: Collection[str]) -> Plan:
    """The plan with layers in float, as rules make it: grids that other layers read too stay."""
    others = {n.name for n in products(model.graph)} - set(layers)

    def stays(sites: tuple[Site, ...]) -> bool:
        readers = {site.node for site in sites}
        return not readers & set(layers) or bool(readers & others)

    groups = tuple((tensor, sites) for tensor, sites in plan.groups if stays(sites))
    kept = {site for _, sites in groups for site in sites}
    kept |= {site for site, _ in plan.entries if site.argument is None and site.node not in layers}
    entries = tuple((site, spec) for site, spec in plan.entries if site in kept)
    return dataclasses.replace(plan, entries=entries, groups=groups)


def wholesale(model: Model, plan: Plan) -> Iterator[Remedy]:
    """8 bits for all tensors, for all kernels, for all of both, and for what shortcuts read."""
    kernels = [site for site, _ in plan.entries if site.argument is None]
    edges = [site for site, _ in plan.entries if site.argument is not None]
    tried: list[Plan] = []
    for name, sites, rule in (
        ("all activations", edges, "*=a8"),
        ("all weights", kernels, "*=w8"),
        ("everything", [*kernels, *edges], "*=8"),
    ):
        finer = raised(model, plan, sites)
        if finer != plan and finer not in tried:
            tried.append(finer)
            yield Remedy(f"{name} at 8 bits", finer, (rule,))
    if plan.layers in ("qdrop_8bit_ends", "brecq_8bit_ends_second"):
        parted = shortcuts_apart(model, plan)
        if parted != plan:
            options = ("--layers", f"{plan.layers}_shortcuts")
            yield Remedy("shortcuts at 8 bits", parted, options=options)


def shortcuts_apart(model: Model, plan: Plan) -> Plan:
    """The plan with 8 bits for what operators without kernels read of a tensor of fewer bits."""
    layers = [n.name for n in products(model.graph)]
    table, groups, others = plan.table, [], []
    for tensor, sites in plan.groups:
        parted = list(with_shortcuts(model.graph, {tensor: list(sites)}, layers))
        if len(parted) < 2 or table[sites[0]].levels.bits == FINE_BITS:
            groups.append((tensor, sites))
            continue
        groups += [(tensor, tuple(part)) for _, part in parted]
        others += parted[1][1]
    return raised(model, dataclasses.replace(plan, groups=tuple(groups)), others)
