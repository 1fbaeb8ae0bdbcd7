"""Corrections of layers that images show: the float and the quantized network, side by side.

Empirical bias correction removes the mean shift that quantization causes.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from dfq_jax.graph.evaluate import apply_node, evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.semantics import Slots, Tensor
from dfq_jax.numerics.affine import NumpyOrJax
from dfq_jax.numerics.levels import scales_of, with_scales
from dfq_jax.quantization.plan import Site
from dfq_jax.quantization.simulate import QParams, QuantizedModel, simulation_hook


class Change(NamedTuple):
    """What becomes of a layer's output `y`: `gain * y + shift` per channel.

    Attributes:
      gain: positive; None for 1.
      shift: in the units of the output.
    """

    gain: Float[Array, " chan"] | None
    shift: Float[Array, " chan"]


ChangeRule = Callable[[Node, Tensor, Tensor], Change | None]
"""(layer, its output in the quantized network, in the float one) -> what becomes of it."""


def correct_biases(
    quantized: QuantizedModel,
    reference: Model,
    images: Shaped[Array, "n ..."],
    *,
    significance: float = 3.0,
) -> QuantizedModel:
    """Removes from every bias the mean output error of its layer.

    Float and quantized networks run side by side, node by node; each layer is corrected before its
    output travels on, so later layers see corrected inputs: one pass instead of one per layer.

    Args:
      quantized: a calibrated network; its biases may be corrected already, analytically.
      reference: the float network whose outputs are right, node for node the same.
      images: normalised images, all in one batch.
      significance: scales each correction by `[1 - (significance * error / correction)^2]_+`, the
        standard error taken over images; 0 applies all in full. Noise in one layer's correction is
        an error of every later layer: without this, 16 images do a deep network more harm than
        good.

    Returns:
      The same network with `b -= mean(y_quantized - y_float)` per channel.

    Reference:
      Nagel et al. 2019, appendix D (empirical bias correction); the shrinkage, of James-Stein
      type, is our addition.
    """
    shifts = mean_shifts(quantized, reference, images, significance=significance)
    return changed(quantized, {name: Change(None, -shift) for name, shift in shifts.items()})


@jax.jit
def mean_shifts(
    quantized: QuantizedModel,
    reference: Model,
    images: Shaped[Array, "n ..."],
    *,
    significance: float | Float[Array, ""],
) -> dict[str, Float[Array, " chan"]]:
    """{layer: mean over images and positions of (y_quantized - y_float)}, upstream ones removed."""
    rule = lambda node, out, exact: Change(None, -mean_gap(out - exact, significance))
    changes = side_by_side(quantized, reference, images, rule)
    return {name: -change.shift for name, change in changes.items()}


def side_by_side(
    quantized: QuantizedModel, reference: Model, images: Shaped[Array, "n ..."], rule: ChangeRule
) -> dict[str, Change]:
    """{layer: what a rule makes of its output}, later layers seeing what became of earlier ones."""
    model, plan = quantized.model, quantized.plan
    _, exact = evaluate(reference, images, taps=[n.name for n in weighted_nodes(model.graph)])
    hook = simulation_hook(plan, quantized.qparams)
    changes: dict[str, Change] = {}

    def corrected(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
        stored, snapped = hook(node, slots, args)
        out = apply_node(node, stored, snapped)
        change = rule(node, out, exact[node.name]) if node.name in exact else None
        if change is None:
            return out
        changes[node.name] = change
        better, qparams = changed_layer(node.name, slots, quantized.qparams, change)
        better, _ = simulation_hook(plan, qparams)(node, better, ())  # biases have grids too
        out = out - stored.get("bias", jnp.zeros_like(change.shift))
        return (out if change.gain is None else out * change.gain) + better["bias"]

    evaluate(model, images, apply=corrected)
    return changes


def changed(quantized: QuantizedModel, changes: Mapping[str, Change]) -> QuantizedModel:
    """The network with changes merged into kernels, their scales, and biases."""
    model, qparams = quantized.model, quantized.qparams
    for name, change in changes.items():
        slots, qparams = changed_layer(name, model.params[name], qparams, change)
        model = with_params(model, {name: slots})
    return QuantizedModel(model, quantized.plan, qparams)


def changed_layer(
    name: str, slots: Slots, qparams: QParams, change: Change
) -> tuple[Slots, QParams]:
    """New slots of one layer, and the scales of all; codes of its kernel stay the same."""
    bias = slots.get("bias", jnp.zeros_like(change.shift))
    if change.gain is None:
        return {**slots, "bias": bias + change.shift}, qparams
    moved = {"kernel": slots["kernel"] * change.gain, "bias": bias * change.gain + change.shift}
    site = Site(name)
    if site not in qparams:
        return {**slots, **moved}, qparams
    scaled = with_scales(qparams[site], scales_of(qparams[site]) * change.gain)
    return {**slots, **moved}, {**qparams, site: scaled}


def mean_gap(
    gap: Float[NumpyOrJax, "n ... chan"], significance: float | Float[Array, ""]
) -> Float[NumpyOrJax, " chan"]:
    """Mean over all but channels, shrunk as far as its standard error over images demands."""
    by_image = gap.mean(axis=tuple(range(1, gap.ndim - 1)))
    mean = by_image.mean(axis=0)
    noise = significance**2 * by_image.var(axis=0) / max(by_image.shape[0] - 1, 1)
    return mean * (1.0 - noise / (mean**2).clip(1e-30)).clip(0.0)
