"""Empirical bias correction: the mean shift quantization causes, measured on images and removed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import Tensor, apply_op
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import WEIGHTED
from dfq_jax.graph.rewrite import with_params
from dfq_jax.quantize.simulate import QuantizedModel, simulation_hook


def correct_biases(quantized: QuantizedModel, images: Float[Array, "n h w c"]) -> QuantizedModel:
    """Removes from every bias the mean output error of its layer.

    Float and quantized networks run side by side, node by node; each layer is corrected before its
    output travels on, so later layers see corrected inputs: one pass instead of one per layer.

    Args:
      quantized: a calibrated network.
      images: normalised images, all in one batch.

    Returns:
      The same network with `b -= mean(y_quantized - y_float)` per channel.

    Reference:
      Nagel et al. 2019, appendix D (empirical bias correction).
    """
    shifts = mean_shifts(quantized, images)
    params = quantized.model.params
    biases = {}
    for name, shift in shifts.items():
        bias = params[name].get("bias", jnp.zeros_like(shift))
        biases[name] = {"bias": bias - shift}
    return QuantizedModel(with_params(quantized.model, biases), quantized.plan, quantized.qparams)


@jax.jit
def mean_shifts(
    quantized: QuantizedModel, images: Float[Array, "n h w c"]
) -> dict[str, Float[Array, " chan"]]:
    """{layer: mean over batch and positions of (y_quantized - y_float)}, upstream ones removed."""
    model: Model = quantized.model
    hook = simulation_hook(quantized.plan, quantized.qparams)
    exact: dict[str, Tensor] = {model.graph.inputs[0]: images}
    rough: dict[str, Tensor] = dict(exact)
    shifts = {}
    for node in model.graph.nodes:
        slots = model.params.get(node.name, {})
        exact[node.name] = apply_op(node.op, slots, *(exact[i] for i in node.inputs))
        snapped, args = hook(node, slots, tuple(rough[i] for i in node.inputs))
        out = apply_op(node.op, snapped, *args)
        if isinstance(node.op, WEIGHTED):
            gap = out - exact[node.name]
            shift = jnp.mean(gap, axis=tuple(range(gap.ndim - 1)))
            nothing = jnp.zeros_like(shift)
            better = {**slots, "bias": slots.get("bias", nothing) - shift}
            stored, _ = hook(node, better, ())  # low bits have coarse grids for biases, too
            out = out + (stored["bias"] - snapped.get("bias", nothing))
            shifts[node.name] = shift
        rough[node.name] = out
    return shifts
