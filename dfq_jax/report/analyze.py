"""How far a quantized network can be trusted, measured without a single real image."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Shaped

from dfq_jax.allocation.diagnosis import LayerCost, worst_first
from dfq_jax.base.finite import finite_or_none
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.query import macs
from dfq_jax.graph.tasks import LanguageModel, Task, noun_of, parts_of, task_of, task_to_json
from dfq_jax.optim.progress import UnitReport
from dfq_jax.quantization.in_float import float_layers
from dfq_jax.quantization.node_by_node import BATCH, Batch, in_batches, in_float, simulating
from dfq_jax.quantization.plan import Plan, Site
from dfq_jax.quantization.shared_grids import SharedGrid
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sites import products
from dfq_jax.report.decibels import in_decibels
from dfq_jax.report.float_kinds import FloatKind, float_kinds
from dfq_jax.report.outputs import (
    COLLAPSED,
    LEAST_SQNR,
    OutputReport,
    Tally,
    decibels,
    leading,
    output_report,
    tally,
)
from dfq_jax.report.trust import Confidence, Estimate, told_as_data

MOST_TOLD = 5
"""Tensors that a message names."""
PIECE = 8192
"""Values whose squares are summed at once."""


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One convolution, linear layer or product of two tensors.

    Attributes:
      name: node name.
      kind: operator name.
      weight_bits: bits of the kernel, or of a product's second tensor; None if it stays float.
      input_bits: bits of its input, None if that stays float.
      macs: multiply-accumulates for one image.
      params: number of weights, 0 for a product.
      sqnr: signal to quantization noise of its output in dB, errors of all layers before included.
      reason: why it does not multiply integers, empty if it does.
    """

    name: str
    kind: str
    weight_bits: int | None
    input_bits: int | None
    macs: int
    params: int
    sqnr: float
    reason: str = ""

    @property
    def integer(self) -> bool:
        """Whether the layer multiplies integers."""
        return None not in (self.weight_bits, self.input_bits) and not self.reason


@dataclasses.dataclass(frozen=True)
class Report:
    """The trust report of one quantized network.

    Attributes:
      layers: every layer that multiplies, in execution order.
      agreement: share of held-out images given the float network's class; of their
        positions where each has a class; with one score only, whether its sign is the same. Of the
        part of the outputs that suffers most.
      images: how many held-out images that is.
      sqnr: of that part, in dB, before a final softmax or sigmoid.
      finite: whether every output was finite.
      not_finite: the tensors that were not, in words and execution order.
      classes: scores of an image, or of a position; 1 for a sign, 0 where nothing is decided.
      dense: whether an image has more than one decision.
      in_float: what else computes in float, and why.
      confidence: `low` where the images say little about the network.
      notes: what a reader of the numbers should know, in sentences.
      units: how each piece fared whose rounding was learned.
      shared_grids: tensors that lose much on a grid that others share.
      costs: what each layer costs, in execution order, where the network lost much.
      outputs: every part of every output.
      estimate: what quantization is expected to cost on real images; None where outputs are no
        class scores.
      given: whether the user brought the images; else they were made from the network.
      task: what the network is for.
      rows: whether these are rows rather than images, as `graph.tasks.noun_of` says.
    """

    layers: tuple[LayerReport, ...]
    agreement: float
    images: int
    sqnr: float
    finite: bool
    classes: int = 2
    dense: bool = False
    in_float: tuple[FloatKind, ...] = ()
    confidence: Confidence = "usual"
    notes: tuple[str, ...] = ()
    units: tuple[UnitReport, ...] = ()
    shared_grids: tuple[SharedGrid, ...] = ()
    costs: tuple[LayerCost, ...] = ()
    outputs: tuple[OutputReport, ...] = ()
    estimate: Estimate | None = None
    given: bool = False
    not_finite: tuple[str, ...] = ()
    task: Task | None = None
    rows: bool = False

    @property
    def held_out(self) -> str:
        """What the numbers were measured on, in words that follow their count."""
        text = isinstance(self.task, LanguageModel)
        if self.given:
            return f"of your {'rows' if text or self.rows else 'images'}, held out"
        if text:
            return "held-out rows of text"
        return f"held-out synthetic {'rows' if self.rows else 'images'}"

    @property
    def whose(self) -> str:
        """Whose classes are compared, in words that come before their count; empty for images'."""
        parts = "tokens" if isinstance(self.task, LanguageModel) else "positions"
        return f"the {parts} of " if self.dense else ""

    @property
    def coverage(self) -> float:
        """Share of multiply-accumulates done in integers."""
        return sum(x.macs for x in self.layers if x.integer) / max(self.macs, 1)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image, those that stay float among them."""
        return sum(x.macs for x in (*self.layers, *self.in_float))

    @property
    def params(self) -> int:
        """Weights, those that stay float among them."""
        return sum(x.params for x in (*self.layers, *self.in_float))

    @property
    def weight_coverage(self) -> float:
        """Share of weights stored as integers."""
        stored = sum(x.params for x in self.layers if x.weight_bits is not None)
        return stored / max(self.params, 1)

    @property
    def average_bits(self) -> float:
        """Mean bits per weight; float ones count 32."""
        bits = sum(x.params * (x.weight_bits or 32) for x in self.layers)
        bits += sum(32 * kind.params for kind in self.in_float)
        return bits / max(self.params, 1)

    @property
    def passed(self) -> bool:
        """Whether the result may be called a success."""
        return not self.failure

    @property
    def failure(self) -> str:
        """Why the result may not be called a success, in words; empty if it may."""
        if not self.finite:
            return f"outputs of the integer network are not finite{listed(self.not_finite)}"
        if self.estimate is not None:
            return self.estimate.failure
        if self.faults:
            told = "; ".join(self.faults)
            return (
                f"the integer network is no longer the float one: {told}, on {self.images} "
                f"held-out {'rows' if self.rows else 'images'}"
            )
        enough = self.classes > 1 or self.sqnr >= LEAST_SQNR
        if self.outputs or (self.agreement >= COLLAPSED and enough):
            return ""
        return (
            f"the integer network agrees with the float one on only {100 * self.agreement:.1f} % "
            f"of {self.images} {self.held_out}, at {in_decibels(self.sqnr)}"
        )

    @property
    def faults(self) -> tuple[str, ...]:
        """The outputs that are ruined, a phrase each."""
        return tuple(output.fault for output in self.outputs if output.fault)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "task": self.task and task_to_json(self.task),
            "agreement": self.agreement,
            "held_out_images": self.images,
            "images_given": self.given,
            "output_sqnr_db": finite_or_none(self.sqnr),
            **told_as_data(self.estimate),
            "finite": self.finite,
            "not_finite": list(self.not_finite),
            "passed": self.passed,
            "coverage_macs": self.coverage,
            "coverage_params": self.weight_coverage,
            "average_weight_bits": self.average_bits,
            "confidence": self.confidence,
            "notes": list(self.notes),
            "units": [unit._asdict() for unit in self.units],
            "shared_grids": [found.to_dict() for found in self.shared_grids],
            "layer_costs": [cost.to_dict() for cost in worst_first(self.costs)],
            "in_float": [dataclasses.asdict(kind) for kind in self.in_float],
            "outputs": [output.to_dict() for output in self.outputs],
            "layers": [
                {**dataclasses.asdict(x), "sqnr": finite_or_none(x.sqnr)} for x in self.layers
            ],
        }


def analyze(
    reference: Model,
    quantized: QuantizedModel,
    images: Shaped[Array, "n ..."],
    *,
    task: Task | None = None,
    original: Model | None = None,
    batch: int = BATCH,
) -> Report:
    """Compares a quantized network with its float original on held-out images.

    Args:
      reference: the folded float network, before bias correction.
      quantized: the quantized network, same graph.
      images: normalised images that calibration has not seen.
      task: what the network is for; None for what its graph says.
      original: whose outputs are right, folded, if the reference computes something else.
      batch: images per forward pass.

    Returns:
      The report. Layers are judged against the reference, outputs against the original.
    """
    parts, aim = parts_of(reference, task), task_of(reference) if task is None else task
    kept = frozenset(name for part in parts for name in (part.tensor, part.output))
    totals: dict[str, np.ndarray] = {}
    seen: dict[str, set[str]] = {}
    tallies: list[Tally] = []
    for some in in_batches(images, batch):
        energies, tensors = compare(reference, quantized, some, kept)
        tensors = tensors if original is None else judged_by(original, some, tensors)
        now = [tally(part, tensors, aim) for part in parts]
        tallies = [a.plus(b) for a, b in zip(tallies, now, strict=True)] if tallies else now
        for name, energy in energies.items():
            totals[name] = totals.get(name, 0.0) + np.array([energy.signal, energy.error])
            seen[name] = seen.get(name, set()) | energy.where_not_finite()
    outputs = tuple(output_report(*each, aim) for each in zip(parts, tallies, strict=True))
    first = leading(outputs)
    return Report(
        layers=layer_reports(reference, quantized.plan, totals),
        agreement=1.0 if first is None or first.agreement is None else first.agreement,
        images=images.shape[0],
        sqnr=math.inf if first is None else first.sqnr,
        finite=not any(seen.values()),
        not_finite=strange_tensors(reference.graph, seen),
        classes=0 if first is None else first.classes,
        dense=first is not None and first.dense,
        in_float=float_kinds(reference),
        outputs=outputs,
        task=aim,
        rows=noun_of(reference.inputs[0]) == "row",
    )


def layer_reports(
    reference: Model, plan: Plan, energies: Mapping[str, np.ndarray]
) -> tuple[LayerReport, ...]:
    """The line of every layer that multiplies."""
    work, reasons = macs(reference), float_layers(reference.graph, plan)
    return tuple(
        layer_report(
            node,
            plan,
            reference,
            work[node.name],
            decibels(energies[node.name]),
            reasons.get(node.name, ""),
        )
        for node in products(reference.graph)
    )


def layer_report(
    node: Node, plan: Plan, model: Model, work: int, sqnr: float, reason: str
) -> LayerReport:
    """The line of one layer."""
    slots = model.params.get(node.name, {})
    second = None if "kernel" in slots else 1
    kernel, data = plan.spec(Site(node.name, second)), plan.spec(Site(node.name, 0))
    return LayerReport(
        name=node.name,
        kind=type(node.op).__name__,
        weight_bits=kernel.levels.bits if kernel else None,
        input_bits=data.levels.bits if data else None,
        macs=work,
        params=slots["kernel"].size if "kernel" in slots else 0,
        sqnr=sqnr,
        reason=reason,
    )


class Energies(NamedTuple):
    """What a tensor holds, and the error of it: sums of squares, finite where all values are.

    Attributes:
      signal: of the float network.
      error: of the difference.
      finite: whether all values of the integer network are finite.
    """

    signal: float
    error: float
    finite: bool

    def where_not_finite(self) -> set[str]:
        """Which of the networks has values here that are not finite."""
        told = {"float": math.isfinite(self.signal), "integer": self.finite}
        return {name for name, finite in told.items() if not finite}


def energies_of(exact: np.ndarray, rough: np.ndarray) -> Energies:
    """The energies of a tensor in float64: squares of float32 end at 1.8e19.

    Pieces of it stay in the processor's cache, and are too short for NumPy's threads.
    """
    one, other = exact.ravel(), rough.ravel()
    signal = error = 0.0
    with np.errstate(invalid="ignore"):
        for start in range(0, one.size, PIECE):
            wanted = one[start : start + PIECE].astype(np.float64)
            gap = other[start : start + PIECE] - wanted
            signal, error = signal + float(wanted @ wanted), error + float(gap @ gap)
    return Energies(signal, error, math.isfinite(error) or bool(np.isfinite(rough).all()))


def strange_tensors(graph: Graph, seen: Mapping[str, set[str]]) -> tuple[str, ...]:
    """The tensors with values that are not finite, in execution order, in words."""
    names = [name for name in (*graph.inputs, *(n.name for n in graph.nodes)) if seen.get(name)]
    return tuple(
        f"{name!r} (in float too)" if "float" in seen[name] else f"{name!r}" for name in names
    )


def listed(names: tuple[str, ...]) -> str:
    """The first of some tensors, for the end of a sentence."""
    more = f" and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else ""
    return f": in {', '.join(names[:MOST_TOLD])}{more}" if names else ""


def judged_by(
    original: Model, batch: Batch, tensors: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tensors of two networks, with those of another one for the first."""
    run = in_float(original)(batch.images)
    return {name: (batch.counting(x), tensors[name][1]) for name, _, x in run if name in tensors}


def compare(
    reference: Model, quantized: QuantizedModel, batch: Batch, kept: frozenset[str]
) -> tuple[dict[str, Energies], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """{layer or output: energies}, and {kept tensor: (float, quantized)}, of images that count."""
    wanted = kept | {node.name for node in products(reference.graph)}
    energies: dict[str, Energies] = {}
    tensors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    runs = in_float(reference)(batch.images), simulating(quantized)(batch.images)
    for (name, _, exact), (_, _, rough) in zip(*runs, strict=True):
        if name in wanted:
            pair = batch.counting(exact), batch.counting(rough)
            energies[name] = energies_of(*pair)
            if name in kept:
                tensors[name] = pair
    return energies, tensors
