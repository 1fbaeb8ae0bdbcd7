"""Empirical bias correction: the mean shift quantization causes, measured on images and removed."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import Tensor, apply_op
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import WEIGHTED
from dfq_jax.graph.rewrite import with_params
from dfq_jax.quantize.simulate import QuantizedModel, simulation_hook


def correct_biases(
    quantized: QuantizedModel,
    reference: Model,
    images: Float[Array, "n h w c"],
    *,
    shrink: bool = True,
) -> QuantizedModel:
    """Removes from every bias the mean output error of its layer.

    Float and quantized networks run side by side, node by node; each layer is corrected before its
    output travels on, so later layers see corrected inputs: one pass instead of one per layer.

    Args:
      quantized: a calibrated network; its biases may be corrected already, analytically.
      reference: the float network whose outputs are right, node for node the same.
      images: normalised images, all in one batch.
      shrink: scale each correction by `[1 - (standard error / correction)^2]_+`, the standard error
        taken over images. A few images measure some shifts well and others not at all; without
        this, 16 images can do more harm than good in a deep network.

    Returns:
      The same network with `b -= mean(y_quantized - y_float)` per channel.

    Reference:
      Nagel et al. 2019, appendix D (empirical bias correction); the shrinkage is the positive-part
      James-Stein rule, our addition.
    """
    shifts = mean_shifts(quantized, reference, images, shrink=shrink)
    params = quantized.model.params
    biases = {}
    for name, shift in shifts.items():
        bias = params[name].get("bias", jnp.zeros_like(shift))
        biases[name] = {"bias": bias - shift}
    return QuantizedModel(with_params(quantized.model, biases), quantized.plan, quantized.qparams)


@partial(jax.jit, static_argnames="shrink")
def mean_shifts(
    quantized: QuantizedModel,
    reference: Model,
    images: Float[Array, "n h w c"],
    *,
    shrink: bool,
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
            shift = mean_gap(out - exact[node.name], shrink)
            nothing = jnp.zeros_like(shift)
            better = {**slots, "bias": slots.get("bias", nothing) - shift}
            better, _ = hook(node, better, ())  # biases have grids too, coarse ones at low bits
            out = out + (better["bias"] - stored.get("bias", nothing))
            shifts[node.name] = shift
        rough[node.name] = out
    return shifts


def mean_gap(gap: Float[Array, "n ... chan"], shrink: bool) -> Float[Array, " chan"]:
    """Mean over all but channels, shrunk by its standard error over images where asked."""
    by_image = jnp.mean(gap, axis=tuple(range(1, gap.ndim - 1)))
    mean = jnp.mean(by_image, axis=0)
    if not shrink:
        return mean
    count = by_image.shape[0]
    if count < 2:
        return jnp.zeros_like(mean)  # one image says nothing about its own error
    noise = jnp.var(by_image, axis=0) / (count - 1)
    return mean * jnp.maximum(1.0 - noise / jnp.maximum(mean**2, 1e-30), 0.0)
