"""Batch norm re-estimated after quantization: kernel steps take its gain, biases its shift.

A folded network has no batch norm to adapt, but the layer it was folded into can do the same: an
affine function of each output channel brings mean and variance back to what they were in float.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.semantics import Tensor
from dfq_jax.numerics.levels import scales_of
from dfq_jax.quantization.plan import Site
from dfq_jax.quantization.side_by_side import Change, changed, mean_gap, side_by_side
from dfq_jax.quantization.simulate import QuantizedModel

NormTarget = Literal["reference", "recorded"]

MOST_GAIN = 4.0
"""Largest factor of a channel, and its reciprocal the smallest: beyond, rounding has left nothing
of the channel to be amplified."""


def reestimate_norms(
    quantized: QuantizedModel,
    reference: Model,
    images: Shaped[Array, "n ..."],
    *,
    target: NormTarget = "reference",
    significance: float = 3.0,
) -> QuantizedModel:
    """Gives every layer that had a batch norm the channel means and variances it should have.

    Args:
      quantized: a calibrated network.
      reference: the float network, node for node the same, with moments.
      images: normalised images, all in one batch.
      target: `reference`: what the float network shows on the same images, so that images which do
        not match the recorded statistics do no harm; `recorded`: those statistics, as batch norm in
        training mode would.
      significance: for `reference`, shrinks shifts as in `correct_biases`; 0 applies all in full.

    Returns:
      The same network with `y -> gain * y + shift` merged, `gain = std_float / std_quantized` and
      `shift = mean_float - gain * mean_quantized`. Layers with one scale for all channels are
      shifted only.

    Raises:
      UsageError: for a network without moments, or an unknown target.

    Reference:
      He et al. 2022, "Data-Free Quantization with Accurate Activation Clipping and Adaptive Batch
      Normalization", adaptive batch normalization; its formula is not public, this one is ours.
    """
    if target not in ("reference", "recorded"):
        raise UsageError(f"reestimate_norms() got target={target!r}; reference and recorded exist.")
    if not reference.moments:
        raise UsageError(
            "reestimate_norms() found no batch-norm statistics in the network; "
            "correct its biases by images instead."
        )
    return changed(quantized, norm_changes(quantized, reference, images, target, significance))


@partial(jax.jit, static_argnames="target")
def norm_changes(
    quantized: QuantizedModel,
    reference: Model,
    images: Shaped[Array, "n ..."],
    target: NormTarget,
    significance: float | Float[Array, ""],
) -> dict[str, Change]:
    """{layer that had a batch norm: what becomes of its output}."""

    def rule(node: Node, out: Tensor, exact: Tensor) -> Change | None:
        if node.name not in reference.moments:
            return None
        axes, recorded = tuple(range(out.ndim - 1)), reference.moments[node.name]
        wanted = jnp.var(exact, axes) if target == "reference" else recorded.var
        kernel = quantized.qparams.get(Site(node.name))
        scalable = kernel is None or scales_of(kernel).size == out.shape[-1]
        gain = matching_gain(wanted, jnp.var(out, axes)) if scalable else None
        scaled = out if gain is None else gain * out
        if target == "reference":
            return Change(gain, -mean_gap(scaled - exact, significance))
        return Change(gain, recorded.mean - jnp.mean(scaled, axes))

    return side_by_side(quantized, reference, images, rule)


def matching_gain(wanted: Float[Array, " c"], found: Float[Array, " c"]) -> Float[Array, " c"]:
    """Factors that give channels of variance `found` the variance `wanted`; 1 where either is 0."""
    alive = (wanted > 0) & (found > 0)
    gain = jnp.sqrt(jnp.where(alive, wanted / jnp.where(alive, found, 1.0), 1.0))
    return jnp.clip(gain, 1 / MOST_GAIN, MOST_GAIN)
