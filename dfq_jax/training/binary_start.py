"""A start for binary activations: what a student reads has both signs, and one size a tensor.

Behind a ReLU nothing is negative, and a sign says nothing. So the student has hard tangents instead
(IR-Net's `hardtanh`), node for node where its teacher has ReLUs.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.errors import PlanError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import Clip, Relu
from dfq_jax.graph.rewrite import replace_nodes
from dfq_jax.numerics.levels import Parameters
from dfq_jax.numerics.signs import Alpha, Signs
from dfq_jax.quantization.plan import on_other_levels
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sites import Site
from dfq_jax.training.tracking import BYTE

HARD_TANH = Clip(-1.0, 1.0)


def with_hard_tanh(model: Model) -> Model:
    """The network with `clip(x, -1, 1)` where it has a ReLU; another function, to learn from there.

    Moments are forgotten: those of the layers stay true, of what follows them none would.

    Reference:
      Qin et al. 2020, "Forward and Backward Information Retention for Accurate Binary Neural
      Networks" (IR-Net), its architectures.
    """
    changed = {
        node.name: dataclasses.replace(node, op=HARD_TANH)
        for node in model.graph.nodes
        if isinstance(node.op, Relu)
    }
    return dataclasses.replace(model, graph=replace_nodes(model.graph, changed), moments={})


def on_binary_activations(
    quantized: QuantizedModel, images: Float[Array, "n h w c"]
) -> QuantizedModel:
    """A quantized network whose activations of fewer than 8 bits are on signs.

    Their size is the mean absolute value on images, which leaves the least squared error (the paper
    has size 1, and norms of each batch behind it). ONNX has no such activations: the network runs
    here, and is not exported.

    Args:
      quantized: of `with_hard_tanh`, calibrated.
      images: normalised.

    Raises:
      PlanError: if all activations have 8 bits or more.
    """
    table = quantized.plan.table
    low = {t: s for t, s in quantized.plan.groups if table[s[0]].levels.bits < BYTE}
    if not low:
        raise PlanError(
            "no activation has fewer than 8 bits, so none would be binary: begin from a scheme "
            "like w1a2."
        )
    sizes = mean_sizes(quantized.model, tuple(low), images)
    levels, found = {}, dict[Site, Parameters](quantized.qparams)
    for tensor, sites in low.items():
        levels |= dict.fromkeys(sites, Signs(None))
        found |= dict.fromkeys(sites, Alpha(jnp.maximum(sizes[tensor], 1e-12)))
    plan = on_other_levels(quantized.plan, levels)
    return dataclasses.replace(quantized, plan=plan, qparams=found)


@partial(jax.jit, static_argnums=1)
def mean_sizes(
    model: Model, names: tuple[str, ...], images: Float[Array, "n h w c"]
) -> dict[str, Float[Array, ""]]:
    """{tensor: mean absolute value}."""
    _, taps = evaluate(model, images, taps=names)
    return {name: jnp.mean(jnp.abs(x)) for name, x in taps.items()}
