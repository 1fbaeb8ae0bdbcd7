"""How far a quantized network can be trusted, measured without a single real image."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import Hook, Slots, Tensor, apply_node, evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Activation, Op
from dfq_jax.graph.query import macs, output_shapes
from dfq_jax.quantize.finished import UnitReport
from dfq_jax.quantize.plan import Plan, Site, float_layers
from dfq_jax.quantize.simulate import Simulated, hook_of
from dfq_jax.quantize.sites import PRODUCTS, float_operators, products
from dfq_jax.report.trust import Confidence, Estimate, told_as_data
from dfq_jax.types import finite_or_none

COLLAPSED = 0.5
"""Agreement with the float network below which a result is never called a success."""

LEAST_SQNR = 3.0
"""The same for the SQNR, in dB, of a network with one score, whose agreement says little."""

CURVE_NAMES = {"gelu": "GELU", "gelu_tanh": "GELU", "elu": "ELU"}


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
        return self.weight_bits is not None and self.input_bits is not None


@dataclasses.dataclass(frozen=True)
class FloatKind:
    """Operators of one kind that compute in float for one reason; none multiplies."""

    kind: str
    count: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The trust report of one quantized network.

    Attributes:
      layers: every layer that multiplies, in execution order.
      agreement: share of held-out synthetic images given the float network's class; of their
        pixels where each has a class; with one score only, whether its sign is the same.
      images: how many held-out images that is.
      sqnr: of the network's (first) output, in dB.
      finite: whether every output was finite.
      classes: scores of an image, or of a pixel.
      dense: whether an image has more than one vector of scores.
      in_float: what else computes in float, and why.
      confidence: `low` where the images say little about the network.
      notes: what a reader of the numbers should know, in sentences.
      units: how each piece fared whose rounding was learned.
      estimate: what quantization is expected to cost on real images; None where outputs are no
        class scores.
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
    estimate: Estimate | None = None

    @property
    def coverage(self) -> float:
        """Share of multiply-accumulates done in integers."""
        return share(self.layers, "macs")

    @property
    def weight_coverage(self) -> float:
        """Share of weights stored as integers."""
        total = sum(layer.params for layer in self.layers)
        return sum(x.params for x in self.layers if x.weight_bits is not None) / max(total, 1)

    @property
    def average_bits(self) -> float:
        """Mean bits per weight; float ones count 32."""
        total = sum(layer.params for layer in self.layers)
        return sum(x.params * (x.weight_bits or 32) for x in self.layers) / max(total, 1)

    @property
    def passed(self) -> bool:
        """Whether the result may be called a success."""
        return not self.failure

    @property
    def failure(self) -> str:
        """Why the result may not be called a success, in words; empty if it may."""
        if not self.finite:
            return "outputs of the integer network are not finite"
        if self.estimate is not None:
            return self.estimate.failure
        if self.agreement >= COLLAPSED and (self.classes > 1 or self.sqnr >= LEAST_SQNR):
            return ""
        whose = "the pixels of " if self.dense else ""
        return (
            f"the integer network agrees with the float one on only {100 * self.agreement:.1f} % "
            f"of {whose}{self.images} held-out synthetic images, at {self.sqnr:.1f} dB"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "agreement": self.agreement,
            "held_out_images": self.images,
            "output_sqnr_db": finite_or_none(self.sqnr),
            **told_as_data(self.estimate),
            "finite": self.finite,
            "passed": self.passed,
            "coverage_macs": self.coverage,
            "coverage_params": self.weight_coverage,
            "average_weight_bits": self.average_bits,
            "confidence": self.confidence,
            "notes": list(self.notes),
            "units": [unit._asdict() for unit in self.units],
            "in_float": [dataclasses.asdict(kind) for kind in self.in_float],
            "layers": [
                {**dataclasses.asdict(x), "sqnr": finite_or_none(x.sqnr)} for x in self.layers
            ],
        }


def share(layers: tuple[LayerReport, ...], what: str) -> float:
    """Share of `what` that belongs to integer layers."""
    total = sum(getattr(layer, what) for layer in layers)
    return sum(getattr(layer, what) for layer in layers if layer.integer) / max(total, 1)


def analyze(
    reference: Model, quantized: Simulated, images: Float[Array, "n h w c"], *, batch: int = 16
) -> Report:
    """Compares a quantized network with its float original on held-out images.

    Args:
      reference: the folded float network, before bias correction.
      quantized: the quantized network, same graph.
      images: normalised images that calibration has not seen.
      batch: images per forward pass.

    Returns:
      The report.
    """
    batch = min(batch, images.shape[0])
    totals: dict[str, np.ndarray] = {}
    agree: list[np.ndarray] = []
    for start in range(0, images.shape[0], batch):
        last = min(start, images.shape[0] - batch)
        energies, same = compare(reference, quantized, images[last : last + batch])
        agree.append(np.asarray(same)[start - last :])
        for name, pair in energies.items():
            totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
    finite = all(np.isfinite(pair).all() for pair in totals.values())
    output = reference.graph.outputs[0]
    scores = output_shapes(reference)[output]
    return Report(
        layers=layer_reports(reference, quantized.plan, totals),
        agreement=float(np.concatenate(agree).mean()),
        images=images.shape[0],
        sqnr=decibels(totals[output]),
        finite=finite,
        classes=scores[-1],
        dense=len(scores) > 2,
        in_float=float_kinds(reference.graph),
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


def float_kinds(graph: Graph) -> tuple[FloatKind, ...]:
    """What computes in float under every plan, counted by kind and reason."""
    reasons = float_operators(graph)
    kinds = [(kind_of(n.op), reasons[n.name]) for n in graph.nodes if n.name in reasons]
    return tuple(FloatKind(kind, n, reason) for (kind, reason), n in Counter(kinds).items())


def kind_of(op: Op) -> str:
    """What people call an operator."""
    if isinstance(op, Activation):
        return CURVE_NAMES.get(op.curve, op.curve.capitalize())
    return type(op).__name__


def layer_report(
    node: Node, plan: Plan, model: Model, work: int, sqnr: float, reason: str
) -> LayerReport:
    """The line of one layer."""
    slots = model.params.get(node.name, {})
    second = "kernel" if "kernel" in slots else "input1"
    kernel, data = plan.spec(Site(node.name, second)), plan.spec(Site(node.name, "input0"))
    return LayerReport(
        name=node.name,
        kind=type(node.op).__name__,
        weight_bits=kernel.grid.bits if kernel else None,
        input_bits=data.grid.bits if data else None,
        macs=work,
        params=slots["kernel"].size if "kernel" in slots else 0,
        sqnr=sqnr,
        reason=reason,
    )


def decibels(energies: np.ndarray) -> float:
    """`10 log10(signal / noise)`; infinite without noise."""
    signal, noise = energies
    if not np.isfinite(signal) or not np.isfinite(noise):
        return float("nan")
    if noise == 0:
        return float("inf")
    return 10 * math.log10(max(float(signal), 1e-30) / float(noise))


@jax.jit
def compare(
    reference: Model, quantized: Simulated, images: Tensor
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """{tensor: (energy of signal, energy of error)}, and per image how far the classes agree."""
    exact = layer_outputs(reference, images)
    rough = layer_outputs(quantized.model, images, hook_of(quantized))
    energies = {k: (jnp.sum(exact[k] ** 2), jnp.sum((exact[k] - rough[k]) ** 2)) for k in exact}
    output = reference.graph.outputs[0]
    return energies, agreeing(exact[output], rough[output])


def agreeing(exact: Float[Array, "n ... k"], rough: Float[Array, "n ... k"]) -> Float[Array, " n"]:
    """Share of each image's positions with the same highest score, or sign of the only one."""
    choice = lambda x: x[..., 0] > 0 if x.shape[-1] == 1 else jnp.argmax(x, -1)
    same = (choice(exact) == choice(rough)).astype(jnp.float32)
    return jnp.mean(same.reshape(same.shape[0], -1), axis=1)


def layer_outputs(model: Model, images: Tensor, hook: Hook | None = None) -> dict[str, Tensor]:
    """{tensor: value} for the outputs of layers that multiply, and of the graph."""
    kept: dict[str, Tensor] = {}

    def keep(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
        out = apply_node(node, slots, args)
        if isinstance(node.op, PRODUCTS) or node.name in model.graph.outputs:
            kept[node.name] = out
        return out

    evaluate(model, images, hook=hook, apply=keep)
    return kept
