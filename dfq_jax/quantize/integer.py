"""The quantized network in integer arithmetic: what the deployed kernels compute, in JAX.

Convolutions and matrix products multiply codes and accumulate in int32, exactly; between layers
values are rescaled by one float32 factor, as ONNX Runtime's integer kernels do.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Integer

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Node
from dfq_jax.graph.lowering import convolve, convolve_transposed
from dfq_jax.graph.ops import WEIGHTED, Conv2d, ConvTranspose2d, MatMul
from dfq_jax.graph.semantics import Slots, Tensor, apply_op
from dfq_jax.numerics.affine import Affine, bias_scale, quantize, quantize_bias
from dfq_jax.numerics.integer import exact_product
from dfq_jax.quantize.plan import Site
from dfq_jax.quantize.simulate import QuantizedModel, argument_hook, simulation_hook


def integer_node(
    quantized: QuantizedModel, node: Node, slots: Slots, args: tuple[Tensor, ...]
) -> Tensor:
    """The output of one node, with integer sums where kernel and input are both quantized.

    Args:
      quantized: the network.
      node: one of its nodes.
      slots: its float parameters (any on-grid or off-grid kernel).
      args: its arguments, already snapped to their grids.

    Returns:
      The output as float32: an exact int32 sum times `x_scale * w_scale` for weighted nodes, and
      for products of two quantized tensors.
    """
    if isinstance(node.op, MatMul):
        return integer_matmul(quantized, node, args)
    table, qparams = quantized.plan.table, quantized.qparams
    data, kernel = Site(node.name, "input0"), Site(node.name, "kernel")
    if not isinstance(node.op, WEIGHTED) or data not in table or kernel not in table:
        slots, _ = simulation_hook(quantized.plan, qparams)(node, slots, ())
        return apply_op(node.op, slots, *args)
    x = centred(quantize(args[0], qparams[data], table[data].grid), qparams[data])
    w = centred(quantize(slots["kernel"], qparams[kernel], table[kernel].grid), qparams[kernel])
    total = integer_sum(node, x, w)
    if "bias" in slots:
        total = total + quantize_bias(slots["bias"], qparams[data].scale, qparams[kernel].scale)
    return total.astype(jnp.float32) * bias_scale(qparams[data].scale, qparams[kernel].scale)


def integer_matmul(quantized: QuantizedModel, node: Node, args: tuple[Tensor, ...]) -> Tensor:
    """The product of two tensors: an exact int32 sum times the product of both scales."""
    table, qparams = quantized.plan.table, quantized.qparams
    sites = [Site(node.name, f"input{i}") for i in range(2)]
    if not all(site in table for site in sites):
        return apply_op(node.op, {}, *args)
    a, b = (
        centred(quantize(x, qparams[site], table[site].grid), qparams[site])
        for x, site in zip(args, sites, strict=True)
    )
    product = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    columns = jnp.swapaxes(b, -1, -2) if node.op == MatMul(True) else b
    total = exact_product(a, columns, product, a.shape[-1])
    return total.astype(jnp.float32) * (qparams[sites[0]].scale * qparams[sites[1]].scale)


def centred(codes: Integer[Array, "..."], affine: Affine) -> Int[Array, "..."]:
    """Codes less their zero point, int32."""
    return codes.astype(jnp.int32) - affine.zero_point.astype(jnp.int32)


def integer_sum(node: Node, x: Int[Array, "..."], w: Int[Array, "..."]) -> Int[Array, "..."]:
    """The int32 convolution or matrix product of centred codes."""
    highest = lax.Precision.HIGHEST
    match node.op:
        case Conv2d():
            product = partial(convolve, op=node.op, precision=highest)
        case ConvTranspose2d():
            product = partial(convolve_transposed, op=node.op, precision=highest)
        case _:
            product = partial(jnp.matmul, precision=highest)
    terms = w.size // w.shape[-1]
    return exact_product(x, w, product, terms)


@jax.jit
def integer_predict(quantized: QuantizedModel, images: Float[Array, "n h w c"]) -> Tensor:
    """First output of the quantized network, computed in integers.

    Args:
      quantized: the network.
      images: normalised, NHWC.

    Returns:
      Logits, Float[n classes] for a classifier.
    """
    hook = argument_hook(quantized.plan, quantized.qparams)
    apply = partial(integer_node, quantized)
    return evaluate(quantized.model, images, hook=hook, apply=apply)[0][0]
