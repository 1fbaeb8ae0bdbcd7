"""Empirical bias correction: the mean shift quantization causes, measured on images and removed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import WEIGHTED
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.semantics import Tensor, apply_op
from dfq_jax.quantize.simulate import QuantizedModel, simulation_hook


def correct_biases(
    quantized: QuantizedModel,
    reference: Model,
    images: Float[Array, "n h w c"],
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
    params = quantized.model.params
    biases = {}
    for name, shift in shifts.items():
        bias = params[name].get("bias", jnp.zeros_like(shift))
        biases[name] = {"bias": bias - shift}
    return QuantizedModel(with_params(quantized.model, biases), quantized.plan, quantized.qparams)


@jax.jit
def mean_shifts(
    quantized: QuantizedModel,
    reference: Model,
    images: Float[Array, "n h w c"],
    *,
    significance: float | Float[Array, ""],
) -> dict[str, Float[Array, " chan"]]:
    """{layer: mean over images and positions of (y_quantized - y_float)}, upstream ones removed."""
    model = quantized.model
    hook = simulation_hook(quantized.plan, quantized.qparams)
    exact: dict[str, Tensor] = {model.graph.inputs[0]: images}
    rough: dict[str, Tensor] = dict(exact)
    shifts = {}
    for node in model.graph.nodes:
        args = (exact[i] for i in node.inputs)
        exact[node.name] = apply_op(node.op, reference.params.get(node.name, {}), *args)
        slots = model.params.get(node.name, {})
        stored, snapped = hook(node, slots, tuple(rough[i] for i in node.inputs))
        out = apply_op(node.op, stored, *snapped)
        if isinstance(node.op, WEIGHTED):
            shift = mean_gap(out - exact[node.name], significance)
            nothing = jnp.zeros_like(shift)
            better = {**slots, "bias": slots.get("bias", nothing) - shift}
            better, _ = hook(node, better, ())  # biases have grids too, coarse ones at low bits
            out = out + (better["bias"] - stored.get("bias", nothing))
            shifts[node.name] = shift
        rough[node.name] = out
    return shifts


def mean_gap(
    gap: Float[Array, "n ... chan"], significance: float | Float[Array, ""]
) -> Float[Array, " chan"]:
    """Mean over all but channels, shrunk as far as its standard error over images demands."""
    by_image = jnp.mean(gap, axis=tuple(range(1, gap.ndim - 1)))
    mean = jnp.mean(by_image, axis=0)
    noise = significance**2 * jnp.var(by_image, axis=0) / max(by_image.shape[0] - 1, 1)
    return mean * jnp.maximum(1.0 - noise / jnp.maximum(mean**2, 1e-30), 0.0)
