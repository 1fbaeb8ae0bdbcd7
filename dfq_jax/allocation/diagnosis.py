"""Which layers cost a quantized network most, and what each remedy would buy.

The error of a layer alone is that of the network's output with nothing but this layer's kernel and
inputs quantized. A remedy is a plan; its network is simulated with the layers it does not touch as
they are, so kernels that were learned for the others' errors stay as they were learned.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Array, Shaped

from dfq_jax.allocation.candidates import (
    AS_IS,
    BATCH,
    Candidates,
    Judge,
    Judged,
    levels_between,
    outputs_at,
)
from dfq_jax.allocation.costs import cost_of
from dfq_jax.allocation.remedies import Remedy
from dfq_jax.base.finite import finite_or_none
from dfq_jax.graph.query import keeps_values
from dfq_jax.quantization.plan import Plan
from dfq_jax.quantization.sites import Site


class LayerCost(NamedTuple):
    """What the quantization of one operator costs.

    Attributes:
      name: node name.
      kind: operator name.
      weight_bits: of its kernel; None without one, or in float.
      input_bits: the fewest of its inputs; None in float.
      alone_db: SQNR of the network's output in dB with only this operator quantized.
      so_far_db: SQNR of its own output in dB with everything before it quantized too; None where it
        was not measured.
    """

    name: str
    kind: str
    weight_bits: int | None
    input_bits: int | None
    alone_db: float
    so_far_db: float | None = None

    @property
    def noise(self) -> float:
        """Energy of the error that it causes alone, relative to that of the output."""
        return 10 ** (-self.alone_db / 10)

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Plain JSON data."""
        finite = lambda x: None if x is None else finite_or_none(x)
        ends = {"alone_db": finite(self.alone_db), "so_far_db": finite(self.so_far_db)}
        return {**self._asdict(), **ends}


class Outcome(NamedTuple):
    """What a remedy would do.

    Attributes:
      remedy: which.
      judged: the network after it.
      bytes: by how much the file would grow.
      seconds: that it took to find out.
    """

    remedy: Remedy
    judged: Judged
    bytes: int
    seconds: float


class Diagnosis(NamedTuple):
    """What is wrong with a quantized network, and what would help.

    Attributes:
      costs: of its layers, in execution order.
      now: the network as it is.
      outcomes: what remedies would do.
      images: how many judged it.
    """

    costs: tuple[LayerCost, ...]
    now: Judged
    outcomes: tuple[Outcome, ...]
    images: int


def costs_alone(
    made: Candidates,
    plan: Plan,
    images: Shaped[Array, "n ..."],
    judge: Judge,
    *,
    so_far: Mapping[str, float] | None = None,
    batch: int = BATCH,
) -> tuple[LayerCost, ...]:
    """The cost of every quantized operator, in execution order.

    Args:
      made: the network with its levels.
      plan: what is quantized.
      images: normalised; the error is that of the outputs for them.
      judge: what tells the SQNR of outputs.
      so_far: {layer: SQNR of its output in dB, errors before it included}, where known.
      batch: images per forward pass.

    Returns:
      One entry for each node that computes with something quantized.
    """
    exact = outputs_at(made, images, {}, batch)
    owned, found = sites_by_node(plan), []
    nodes = [n for n in made.reference.graph.nodes if n.name in owned and not keeps_values(n.op)]
    for node in nodes:
        rough = outputs_at(made, images, dict.fromkeys(owned[node.name], AS_IS), batch)
        bits = bits_of_node(plan, owned[node.name])
        ends = judge(exact, rough).sqnr_db, (so_far or {}).get(node.name)
        found.append(LayerCost(node.name, type(node.op).__name__, *bits, *ends))
    return tuple(found)


def worst_first(costs: Iterable[LayerCost]) -> tuple[LayerCost, ...]:
    """The same costs, that of the layer that does most harm alone first."""
    return tuple(sorted(costs, key=lambda cost: cost.alone_db))


def bits_of_node(plan: Plan, sites: Sequence[Site]) -> tuple[int | None, int | None]:
    """Bits of a node's kernel, and the fewest of its inputs; None where there is none."""
    bits = {site: plan.table[site].levels.bits for site in sites}
    kernels = [n for site, n in bits.items() if site.argument is None]
    inputs = [n for site, n in bits.items() if site.argument is not None]
    return min(kernels, default=None), min(inputs, default=None)


def sites_by_node(plan: Plan) -> dict[str, list[Site]]:
    """{node: its sites}."""
    found: dict[str, list[Site]] = {}
    for site, _ in plan.entries:
        found.setdefault(site.node, []).append(site)
    return found


def outcomes(
    made: Candidates,
    plan: Plan,
    remedies: tuple[Remedy, ...],
    images: Shaped[Array, "n ..."],
    judge: Judge,
    *,
    batch: int = BATCH,
) -> tuple[Judged, tuple[Outcome, ...]]:
    """The network as it is in the eyes of `judge`, and after each remedy.

    Args:
      made: the network with its levels.
      plan: what is quantized now.
      remedies: what to try, each by itself.
      images: normalised; all networks are judged by them.
      judge: see `levels.Judge`.
      batch: images per forward pass.
    """
    exact = outputs_at(made, images, {}, batch)
    model, before = made.reference, cost_of(made.reference, plan, "bytes").amount

    def tried(other: Plan) -> Judged:
        return judge(exact, outputs_at(made, images, levels_between(plan, other), batch))

    now, found = tried(plan), []
    for remedy in remedies:
        started = time.perf_counter()
        judged = tried(remedy.plan)
        grown = round(cost_of(model, remedy.plan, "bytes").amount - before)
        found.append(Outcome(remedy, judged, grown, time.perf_counter() - started))
    return now, tuple(found)
