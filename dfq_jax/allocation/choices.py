"""What may be given bits: kernels and tensors that neither a preset nor a rule pins.

A *choice* is a kernel, or the tensors whose bits one rule sets at once: those that a product of two
tensors reads.
"""

import dataclasses
import glob
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from dfq_jax.errors import PlanError
from dfq_jax.graph.graph import Graph
from dfq_jax.quantization.observers import DEFAULT_OBSERVERS, Observers
from dfq_jax.quantization.plan import (
    LayerPreset,
    Plan,
    Rule,
    Scheme,
    apply_rule,
    layer_bits,
    resolve,
)
from dfq_jax.quantization.sites import Site

BITS = (2, 3, 4, 5, 6, 8)
"""Candidates of every choice."""


class Choice(NamedTuple):
    """What is given bits as one.

    Attributes:
      name: the layer of a kernel, or the (first) tensor.
      sites: where these bits quantize.
      layers: whose rules say so.
      weight: whether it is a kernel.
    """

    name: str
    sites: tuple[Site, ...]
    layers: tuple[str, ...]
    weight: bool

    def rules_for(self, bits: int) -> Iterable[Rule]:
        """The rules that give it so many bits."""
        for layer in self.layers:
            pattern = glob.escape(layer)
            if self.weight:
                yield Rule(pattern, weight_bits=bits)
            else:
                yield Rule(pattern, input_bits=bits)


@dataclasses.dataclass(frozen=True)
class Space:
    """Everything that can be chosen in a network.

    Attributes:
      choices: kernels in execution order, then tensors.
      bits: candidates of each, ascending.
      plans: for each candidate, the plan that gives it to every choice. A site that is no choice
        may have other bits there than in the end: a tensor has the most that its readers want.
      rest: the plan of the scheme and the rules, where sites that are no choice have the bits that
        they keep whatever is chosen.
      rules: exceptions by name that hold whatever is chosen.
    """

    choices: tuple[Choice, ...]
    bits: tuple[int, ...]
    plans: tuple[Plan, ...]
    rest: Plan
    rules: tuple[Rule, ...]

    @property
    def owners(self) -> dict[Site, int]:
        """{site: index of the choice that sets its bits}."""
        return {site: i for i, choice in enumerate(self.choices) for site in choice.sites}

    def rules_for(self, bits: Sequence[int]) -> tuple[Rule, ...]:
        """The rules that give each choice its bits."""
        chosen = zip(self.choices, bits, strict=True)
        return (*self.rules, *(rule for choice, b in chosen for rule in choice.rules_for(b)))


def space_of(
    graph: Graph,
    layers: LayerPreset = "qdrop_8bit_ends",
    rules: Iterable[Rule] = (),
    *,
    scheme: Scheme,
    tensors: bool = False,
    bits: Sequence[int] = BITS,
    observers: Observers = DEFAULT_OBSERVERS,
) -> Space:
    """What can be chosen in a network.

    Args:
      graph: of the folded network.
      layers: its pinned layers keep their 8 bits.
      rules: exceptions by name; what they give bits to keeps these bits.
      scheme: bits of activations where `tensors` is false.
      tensors: also choose the bits of tensors.
      bits: candidates.
      observers: how ranges are found, of the plans.

    Returns:
      The space.

    Raises:
      PlanError: if a rule matches no layer, an observer does not suit weights, or nothing is left
        to choose.
    """
    rules, bits = tuple(rules), tuple(sorted(set(bits)))
    planned = lambda wanted: resolve(graph, wanted, layers, rules, observers)
    uniform = lambda b: dataclasses.replace(
        scheme, weight_bits=b, activation_bits=b if tensors else scheme.activation_bits
    )
    plans = tuple(planned(uniform(b)) for b in bits)
    tables = [plan.table for plan in plans]
    follows = lambda site: all(t[site].levels.bits == b for t, b in zip(tables, bits, strict=True))
    kernels = [
        Choice(site.node, (site,), (site.node,), True)
        for site, _ in plans[0].entries
        if site.argument is None and follows(site)
    ]
    free = tied(plans[0], ruled_layers(graph, scheme, layers, rules)) if tensors else []
    found = (*kernels, *(c for c in free if all(map(follows, c.sites))))
    if not found:
        raise PlanError(
            f"mixed precision finds nothing to choose: the preset {layers} and the rules pin every "
            "layer; choose another preset or fewer rules."
        )
    return Space(found, bits, plans, planned(scheme), rules)


def ruled_layers(
    graph: Graph, scheme: Scheme, layers: LayerPreset, rules: Iterable[Rule]
) -> frozenset[str]:
    """The layers that take bits from rules: a rule for one kept in float would bring it back."""
    preset = layer_bits(graph, scheme, layers)
    ruled = dict(preset)
    for rule in rules:
        apply_rule(ruled, preset, rule)
    return frozenset(ruled)


def tied(plan: Plan, ruled: Collection[str]) -> list[Choice]:
    """The tensors of a plan, those together that one layer reads; each needs a layer with rules."""
    merged: list[Choice] = []
    for tensor, sites in plan.groups:
        readers = tuple(dict.fromkeys(s.node for s in sites if s.node in ruled))
        shared = [c for c in merged if set(c.layers) & set(readers)]
        merged = [c for c in merged if c not in shared]
        together = [*shared, Choice(tensor, sites, readers, False)]
        union = lambda parts: tuple(dict.fromkeys(x for part in parts for x in part))
        merged.append(
            Choice(
                together[0].name,
                union(c.sites for c in together),
                union(c.layers for c in together),
                False,
            )
        )
    return [c for c in merged if c.layers]
