"""The quantized network in integer arithmetic: what the deployed kernels compute, in JAX.

Convolutions and matrix products multiply codes and accumulate in int32, exactly; between layers
values are rescaled by one float32 factor, as ONNX Runtime's integer kernels do.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Integer, Shaped

from dfq_jax.graph.graph import Node
from dfq_jax.graph.lowering import convolve, convolve_transposed, convolve_volume
from dfq_jax.graph.ops import WEIGHTED, Conv2d, ConvTranspose2d, MatMul, Op
from dfq_jax.graph.semantics import Slots, Tensor, apply_op
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.numerics.affine import Affine, NumpyOrJax, bias_scale, quantize_bias
from dfq_jax.numerics.integer import exact_product
from dfq_jax.numerics.levels import Parameters, codes_of, scales_of
from dfq_jax.quantization.simulate import QuantizedModel, simulation_hook
from dfq_jax.quantization.sites import operands

Multiply = Callable[
    [Op, Float[NumpyOrJax, "..."], Float[NumpyOrJax, "..."]], Float[NumpyOrJax, "..."]
]
"""(layer or matrix product, its input, its kernel or second factor) -> the product, of floats."""


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
    found = integer_product(quantized, node, slots, args, multiplied)
    if found is not None:
        return found
    slots, _ = simulation_hook(quantized.plan, quantized.qparams)(node, slots, ())
    return apply_op(node.op, slots, *args)


def integer_product(
    quantized: QuantizedModel,
    node: Node,
    slots: Mapping[str, Float[NumpyOrJax, "..."]],
    args: tuple[Shaped[NumpyOrJax, "..."], ...],
    multiply: Multiply,
) -> Float[NumpyOrJax, "..."] | None:
    """The output of a node that sums products of codes; None for any other.

    Args:
      quantized: the network.
      node: one of its nodes.
      slots: its float parameters.
      args: its arguments.
      multiply: exact for floats that hold integers, as long as sums are.
    """
    plan, qparams = quantized.plan, quantized.qparams
    if not isinstance(node.op, (*WEIGHTED, MatMul)) or not plan.multiplies(node):
        return None
    sites = operands(node)
    factors = args if isinstance(node.op, MatMul) else (args[0], slots["kernel"])
    x, w = (
        centred(codes_of(v, plan.table[site].levels, qparams[site]), qparams[site])
        for v, site in zip(factors, sites, strict=True)
    )
    scales = scales_of(qparams[sites[0]]), scales_of(qparams[sites[1]])
    if isinstance(node.op, MatMul):
        columns = w.swapaxes(-1, -2) if node.op == MatMul(True) else w
        total = exact_product(x, columns, partial(multiply, MatMul()), x.shape[-1])
        return total.astype(jnp.float32) * (scales[0] * scales[1])
    total = integer_sum(node, x, w, multiply)
    if "bias" in slots:
        total = total + quantize_bias(slots["bias"], *scales)
    return total.astype(jnp.float32) * bias_scale(*scales)


def centred(codes: Integer[NumpyOrJax, "..."], parameters: Parameters) -> Int[NumpyOrJax, "..."]:
    """Codes less their zero point, if they have one, int32."""
    if not isinstance(parameters, Affine):
        return codes.astype(jnp.int32)
    return codes.astype(jnp.int32) - parameters.zero_point.astype(jnp.int32)


def integer_sum(
    node: Node,
    x: Int[NumpyOrJax, "..."],
    w: Int[NumpyOrJax, "..."],
    multiply: Multiply | None = None,
) -> Int[NumpyOrJax, "..."]:
    """The int32 convolution or matrix product of centred codes."""
    product = partial(multiply or multiplied, node.op)
    return exact_product(x, w, product, w.size // w.shape[-1])


def multiplied(op: Op, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    """The convolution or matrix product, of the highest precision there is."""
    highest = lax.Precision.HIGHEST
    match op:
        case Conv2d():
            return convolve(x, w, op=op, precision=highest)
        case ConvTranspose2d():
            return convolve_transposed(x, w, op=op, precision=highest)
        case Conv3d():
            return convolve_volume(x, w, op=op, precision=highest)
        case _:
            return jnp.matmul(x, w, precision=highest)
