"""Folds batch norm into the layer before it.

Where nothing is traced this is NumPy's work: every shape would be half a dozen programs.
"""

import dataclasses

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import WEIGHTED, BatchNorm
from dfq_jax.graph.query import batch_norms, consumers, only_consumer
from dfq_jax.graph.rewrite import bypass, drop_params, with_params
from dfq_jax.graph.semantics import Slots
from dfq_jax.numerics.affine import NumpyOrJax, namespace
from dfq_jax.types import Moments


def fold_batch_norm(model: Model, *, distrusted: frozenset[str] = frozenset()) -> Model:
    """Every batch norm that is the only reader of a convolution or linear layer becomes part of it.

    Transposed convolutions included. Batch norms that follow anything else stay.

    Args:
      model: any network.
      distrusted: batch norms whose statistics say nothing about the network's tensors.

    Returns:
      The same function with fewer nodes; `moments` of each folded layer, and of each batch norm
      that stays, hold the mean and variance its output had in training: `beta` and
      `gamma^2 var / (var + eps)`.

    Reference:
      Jacob et al. 2018, "Quantization and Training of Neural Networks ...", section 3.2; the kept
      moments are those of Nagel et al. 2019, section 4.2.1.
    """
    readers = consumers(model.graph)
    new_params, moments, gone = {}, {}, []
    for node in model.graph.nodes:
        if not isinstance(node.op, WEIGHTED):
            continue
        norm = only_consumer(model.graph, readers, node.name)
        if norm is None or not isinstance(norm.op, BatchNorm):
            continue
        new_params[node.name] = folded(model, node, norm, norm.op.eps)
        gone.append(norm.name)
        if norm.name not in distrusted:
            moments[node.name] = normed_moments(model, norm, norm.op.eps)
    for norm in batch_norms(model.graph):
        if isinstance(norm.op, BatchNorm) and norm.name not in {*gone, *distrusted}:
            moments[norm.name] = normed_moments(model, norm, norm.op.eps)
    model = with_params(model, new_params)
    return dataclasses.replace(
        model,
        graph=bypass(model.graph, gone),
        params=drop_params(model.params, gone),
        moments={**model.moments, **moments},
    )


def normed_moments(model: Model, norm: Node, eps: float) -> Moments:
    """Mean and variance of the output of a batch norm, as its statistics have it."""
    slots = where_they_are(model.params[norm.name])
    xp = namespace(*slots.values())
    mean, var = slots["mean"], slots["var"]
    scale = slots.get("scale", xp.ones_like(mean))
    with np.errstate(invalid="ignore"):
        share = xp.where(xp.isfinite(var), var / (var + eps), 0.0)  # an infinite one: no output
    found = Moments(slots.get("bias", xp.zeros_like(mean)), scale**2 * share)
    return found if xp is not np else jax.device_put(found)


def folded(
    model: Model, layer: Node, norm: Node, eps: float
) -> dict[str, Float[NumpyOrJax, "..."]]:
    """New slots of `layer` with `norm` folded in."""
    slots, bn = (where_they_are(model.params[name]) for name in (layer.name, norm.name))
    xp = namespace(*slots.values(), *bn.values())
    scale = bn.get("scale", xp.ones_like(bn["mean"]))
    beta = bn.get("bias", xp.zeros_like(bn["mean"]))
    gain = scale / xp.sqrt(bn["var"] + eps)
    bias = slots.get("bias", xp.zeros_like(bn["mean"]))
    found = {"kernel": slots["kernel"] * gain, "bias": (bias - bn["mean"]) * gain + beta}
    return found if xp is not np else jax.device_put(found)


def where_they_are(slots: Slots) -> Slots:
    """Parameters as arrays of NumPy, or as they are while a program is traced."""
    traced = any(isinstance(v, Tracer) for v in slots.values())
    return slots if traced else jax.device_get(slots)
