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
from dfq_jax.numerics.affine import Affine, bias_scale, quantize_bias
from dfq_jax.numerics.integer import exact_product
from dfq_jax.numerics.levels import Parameters, codes_of, scales_of
from dfq_jax.quantization.simulate import QuantizedModel, argument_hook, simulation_hook
from dfq_jax.quantization.sites import operands


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
    plan, qparams = quantized.plan, quantized.qparams
    if not isinstance(node.op, WEIGHTED) or not plan.multiplies(node):
        slots, _ = simulation_hook(plan, qparams)(node, slots, ())
        return apply_op(node.op, slots, *args)
    data, kernel = operands(node)
    scales = scales_of(qparams[data]), scales_of(qparams[kernel])
    x, w = (
        centred(codes_of(v, plan.table[site].levels, qparams[site]), qparams[site])
        for v, site in ((args[0], data), (slots["kernel"], kernel))
    )
    total = integer_sum(node, x, w)
    if "bias" in slots:
        total = total + quantize_bias(slots["bias"], *scales)
    return total.astype(jnp.float32) * bias_scale(*scales)


def integer_matmul(quantized: QuantizedModel, node: Node, args: tuple[Tensor, ...]) -> Tensor:
    """The product of two tensors: an exact int32 sum times the product of both scales."""
    table, qparams, sites = quantized.plan.table, quantized.qparams, operands(node)
    if not quantized.plan.multiplies(node):
        return apply_op(node.op, {}, *args)
    a, b = (
        centred(codes_of(x, table[site].levels, qparams[site]), qparams[site])
        for x, site in zip(args, sites, strict=True)
    )
    product = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    columns = jnp.swapaxes(b, -1, -2) if node.op == MatMul(True) else b
    total = exact_product(a, columns, product, a.shape[-1])
    return total.astype(jnp.float32) * (scales_of(qparams[sites[0]]) * scales_of(qparams[sites[1]]))


def centred(codes: Integer[Array, "..."], parameters: Parameters) -> Int[Array, "..."]:
    """Codes less their zero point, if they have one, int32."""
    if not isinstance(parameters, Affine):
        return codes.astype(jnp.int32)
    return codes.astype(jnp.int32) - parameters.zero_point.astype(jnp.int32)


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
