"""How far a quantized network can be trusted, measured without a single real image."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import Hook, Slots, Tensor, apply_node, evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import WEIGHTED
from dfq_jax.graph.query import macs, weighted_nodes
from dfq_jax.quantize.plan import Plan, Site
from dfq_jax.quantize.simulate import QuantizedModel, simulation_hook
from dfq_jax.types import finite_or_none

COLLAPSED = 0.5
"""Agreement with the float network below which a result is never called a success."""


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One convolution or linear layer.

    Attributes:
      name: node name.
      kind: operator name.
      weight_bits: bits of the kernel, None if it stays float.
      input_bits: bits of its input, None if that stays float.
      macs: multiply-accumulates for one image.
      params: number of weights.
      sqnr: signal to quantization noise of its output in dB, errors of all layers before included.
    """

    name: str
    kind: str
    weight_bits: int | None
    input_bits: int | None
    macs: int
    params: int
    sqnr: float

    @property
    def integer(self) -> bool:
        """Whether the layer multiplies integers."""
        return self.weight_bits is not None and self.input_bits is not None


@dataclasses.dataclass(frozen=True)
class Report:
    """The trust report of one quantized network.

    Attributes:
      layers: every weighted layer in execution order.
      agreement: share of held-out synthetic images given the float network's class.
      images: how many held-out images that is.
      sqnr: of the network's output, in dB.
      finite: whether every output was finite.
    """

    layers: tuple[LayerReport, ...]
    agreement: float
    images: int
    sqnr: float
    finite: bool

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
        return self.finite and self.agreement >= COLLAPSED

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "agreement": self.agreement,
            "held_out_images": self.images,
            "output_sqnr_db": finite_or_none(self.sqnr),
            "finite": self.finite,
            "passed": self.passed,
            "coverage_macs": self.coverage,
            "coverage_params": self.weight_coverage,
            "average_weight_bits": self.average_bits,
            "layers": [
                {**dataclasses.asdict(x), "sqnr": finite_or_none(x.sqnr)} for x in self.layers
            ],
        }


def share(layers: tuple[LayerReport, ...], what: str) -> float:
    """Share of `what` that belongs to integer layers."""
    total = sum(getattr(layer, what) for layer in layers)
    return sum(getattr(layer, what) for layer in layers if layer.integer) / max(total, 1)


def analyze(
    reference: Model, quantized: QuantizedModel, images: Float[Array, "n h w c"], *, batch: int = 16
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
    shape = macs(reference)
    layers = tuple(
        layer_report(n, quantized.plan, reference, shape[n.name], decibels(totals[n.name]))
        for n in weighted_nodes(reference.graph)
    )
    finite = all(np.isfinite(pair).all() for pair in totals.values())
    output = decibels(totals[reference.graph.outputs[0]])
    agreement = float(np.concatenate(agree).mean())
    return Report(layers, agreement, images.shape[0], output, finite)


def layer_report(node: Node, plan: Plan, model: Model, work: int, sqnr: float) -> LayerReport:
    """The line of one layer."""
    kernel, data = plan.spec(Site(node.name, "kernel")), plan.spec(Site(node.name, "input0"))
    return LayerReport(
        name=node.name,
        kind=type(node.op).__name__,
        weight_bits=kernel.grid.bits if kernel else None,
        input_bits=data.grid.bits if data else None,
        macs=work,
        params=model.params[node.name]["kernel"].size,
        sqnr=sqnr,
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
    reference: Model, quantized: QuantizedModel, images: Tensor
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """{tensor: (energy of signal, energy of error)}, and per image whether the classes agree."""
    exact, rough = (
        weighted_outputs(reference, images),
        weighted_outputs(
            quantized.model, images, simulation_hook(quantized.plan, quantized.qparams)
        ),
    )
    energies = {k: (jnp.sum(exact[k] ** 2), jnp.sum((exact[k] - rough[k]) ** 2)) for k in exact}
    output = reference.graph.outputs[0]
    return energies, jnp.argmax(exact[output], -1) == jnp.argmax(rough[output], -1)


def weighted_outputs(model: Model, images: Tensor, hook: Hook | None = None) -> dict[str, Tensor]:
    """{tensor: value} for the outputs of weighted nodes and of the graph."""
    kept: dict[str, Tensor] = {}

    def keep(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
        out = apply_node(node, slots, args)
        if isinstance(node.op, WEIGHTED) or node.name in model.graph.outputs:
            kept[node.name] = out
        return out

    evaluate(model, images, hook=hook, apply=keep)
    return kept
