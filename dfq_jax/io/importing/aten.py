"""PyTorch's operators (ATen): what each becomes. Arguments are named as ATen names them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Combine,
    ConvTranspose2d,
    Curve,
    Div,
    LeakyRelu,
    Maximum,
    Minimum,
    Mul,
    Power,
    Sub,
)
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.io.importing import arrange, choices, layers, pointwise, pools, volumes
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.pointwise import Number
from dfq_jax.io.importing.values import Value

Array = np.ndarray
Ints = Sequence[int]
PerAxis = Sequence[int] | int


def needs(condition: bool, message: str) -> None:
    """Raises UnsupportedModelError unless a condition on the arguments holds."""
    if not condition:
        raise UnsupportedModelError(message)


def convolution(
    b: Builder,
    x: Value,
    weight: Any,
    bias: Array | None = None,
    stride: PerAxis = 1,
    padding: PerAxis | str = 0,
    dilation: PerAxis = 1,
    transposed: bool = False,
    output_padding: PerAxis = 0,
    groups: int = 1,
) -> Value:
    """conv1d, conv2d, conv_transpose1d, conv_transpose2d and convolution."""
    needs(isinstance(weight, np.ndarray), "its kernel is computed by the network.")
    rank = weight.ndim
    if rank == 5 and not transposed:
        op = volume_op(weight, stride, padding, dilation, groups)
        return volumes.volume_convolution(b, x, weight, bias, op)
    needs(rank in (3, 4), f"its kernel has {rank} axes; only 1-d and 2-d ones are supported.")
    strides, dilations = layers.pair(stride, rank, 1), layers.pair(dilation, rank, 1)
    if isinstance(padding, str):
        kernel = (1, *weight.shape[2:]) if rank == 3 else weight.shape[2:]
        pads = same_padding(padding, kernel, dilations)
    else:
        pads = layers.pads(padding, rank)
    if not transposed:
        return layers.convolution(b, x, weight, bias, strides, pads, dilations, groups)
    extra = layers.pair(output_padding, rank, 0)
    op = ConvTranspose2d(strides, pads, groups, dilations, extra)
    return layers.transposed_convolution(b, x, weight, bias, op)


def volume_op(
    weight: Array, stride: PerAxis, padding: PerAxis | str, dilation: PerAxis, groups: int
) -> Conv3d:
    """A convolution in three directions; `same` keeps sizes, the odd place at the end."""
    spread, kernel = volumes.triple(dilation), weight.shape[2:]
    if isinstance(padding, str):
        room = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(spread, kernel, strict=True)
        ]
        a, c, e = ((n // 2, n - n // 2) for n in room)
    else:
        a, c, e = ((n, n) for n in volumes.triple(padding))
    return Conv3d(volumes.triple(stride), (a, c, e), groups, spread)


def same_padding(mode: str, kernel: Ints, dilation: Ints) -> layers.Pads:
    """`valid` pads nothing; `same` keeps the size, the odd pixel at the end."""
    if mode == "valid":
        return pools.NO_PADS
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)


def transposed_convolution(
    b: Builder,
    x: Value,
    weight: Any,
    bias: Array | None = None,
    stride: PerAxis = 1,
    padding: PerAxis = 0,
    output_padding: PerAxis = 0,
    groups: int = 1,
    dilation: PerAxis = 1,
) -> Value:
    """conv_transpose1d, conv_transpose2d."""
    given = (stride, padding, dilation)
    return convolution(b, x, weight, bias, *given, True, output_padding, groups)


def plain_convolution(
    b: Builder,
    x: Value,
    weight: Any,
    bias: Array | None = None,
    stride: PerAxis = 1,
    padding: PerAxis | str = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Value:
    """conv1d, conv2d."""
    return convolution(b, x, weight, bias, stride, padding, dilation, groups=groups)


def linear(b: Builder, x: Value, weight: Any, bias: Array | None = None) -> Value:
    """Linear layer; a kernel that the network computes makes a matrix product."""
    if isinstance(x, Value) and isinstance(weight, np.ndarray):
        return layers.linear(b, x, weight, bias)
    turned = arrange.swapped(weight, -1, -2) if isinstance(weight, Value) else weight.T
    y = layers.matmul(b, x, turned)
    return y if bias is None else pointwise.combined(b, Add(), y, bias)


def addmm(b: Builder, x: Any, mat1: Any, mat2: Any, beta: Number = 1, alpha: Number = 1) -> Value:
    """addmm, baddbmm: beta * x + alpha * mat1 @ mat2."""
    if beta != 1:
        x = pointwise.affine(b, x, beta) if isinstance(x, Value) else np.float32(beta) * x
    if (
        isinstance(mat2, np.ndarray)
        and isinstance(x, np.ndarray)
        and mat2.ndim == 2
        and x.ndim == 1
    ):
        return layers.linear(b, mat1, np.float32(alpha) * mat2.T, x)
    product = pointwise.affine(b, layers.matmul(b, mat1, mat2), alpha)
    return pointwise.combined(b, Add(), product, x)


def batch_norm(
    b: Builder,
    x: Value,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool = False,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:
    """Batch norm with recorded statistics."""
    if training or running_mean is None or running_var is None:
        raise UnsupportedModelError(
            "batch norm in training mode, or without recorded statistics; "
            "call model.eval() before exporting."
        )
    return layers.batch_norm(b, x, weight, bias, running_mean, running_var, eps)


def layer_norm(
    b: Builder,
    x: Value,
    normalized_shape: Ints,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: Number = 1e-5,
    cudnn_enable: bool = True,
) -> Value:
    """Normalisation over the last axes."""
    return layers.layer_norm(b, x, len(normalized_shape), weight, bias, eps)


def group_norm(
    b: Builder,
    x: Value,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: Number = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:
    """Normalisation over groups of channels."""
    return layers.group_norm(b, x, num_groups, weight, bias, eps)


def instance_norm(
    b: Builder,
    x: Value,
    weight: Array | None = None,
    bias: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    use_input_stats: bool = True,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:
    """Normalisation of each channel of each image; with recorded statistics a batch norm."""
    if not use_input_stats and running_mean is not None and running_var is not None:
        return layers.batch_norm(b, x, weight, bias, running_mean, running_var, eps)
    return layers.group_norm(b, x, x.shape[1], weight, bias, eps)


def curve(name: Curve, b: Builder, x: Value) -> Value:
    """An activation without parameters."""
    return pointwise.mapped(b, Activation(name), x)


def gelu(b: Builder, x: Value, approximate: str = "none") -> Value:
    """GELU, exact or by tanh."""
    return curve("gelu" if approximate == "none" else "gelu_tanh", b, x)


def elu(
    b: Builder, x: Value, alpha: Number = 1, scale: Number = 1, input_scale: Number = 1
) -> Value:
    """ELU; SELU and CELU are ELUs of other numbers."""
    return pointwise.exponential_linear(b, x, alpha, scale, input_scale)


def softplus(b: Builder, x: Value, beta: Number = 1, threshold: Number = 20) -> Value:
    """log(1 + exp(beta x)) / beta."""
    needs(threshold >= choices.STRAIGHT, f"threshold {threshold}.")
    return pointwise.affine(b, curve("softplus", b, pointwise.affine(b, x, beta)), 1 / beta)


def relu(b: Builder, x: Value) -> Value:
    """ReLU."""
    return pointwise.limited(b, x, 0, None)


def leaky_relu(b: Builder, x: Value, negative_slope: Number = 0.01) -> Value:
    """Leaky ReLU."""
    return pointwise.mapped(b, LeakyRelu(float(negative_slope)), x)


def hardtanh(b: Builder, x: Value, min_val: Number = -1, max_val: Number = 1) -> Value:
    """Limits; ReLU6 among them."""
    return pointwise.limited(b, x, min_val, max_val)


def clamp(b: Builder, x: Value, min: Any = None, max: Any = None) -> Value:
    """Limits that are numbers."""
    return pointwise.limited(b, x, limit(min), limit(max))


def limit(x: Any) -> Number | None:
    """A limit that is a number, or a tensor of one."""
    if x is None or isinstance(x, int | float):
        return x
    if isinstance(x, np.ndarray) and x.size == 1:
        return float(x.reshape(()))
    raise UnsupportedModelError("limits that are tensors.")


def filled(b: Builder, x: Any, value: Any) -> Any:
    """fill_, copy_: other values in the place of those of a tensor."""
    if isinstance(value, Value):
        return arrange.expanded(b, value, x.shape)
    return np.broadcast_to(np.asarray(value, np.float32), x.shape)


def where(b: Builder, condition: Any, self: Any, other: Any) -> Value:
    """One of two tensors."""
    return choices.selected(b, condition, self, other)


def masked_fill(b: Builder, x: Value | Array, mask: Any, value: Any) -> Value:
    """A number where a mask holds."""
    return where(b, mask, value, x)


def prelu(b: Builder, x: Value, weight: Array) -> Value:
    """Leaky ReLU with learned slopes."""
    return pointwise.parametric_relu(b, x, weight)


def binary(op: Combine, b: Builder, x: Any, other: Any, alpha: Number = 1) -> Value:
    """add, sub, mul, div, maximum, with tensors or numbers."""
    if alpha != 1:
        scaled = isinstance(other, Value)
        other = pointwise.affine(b, other, alpha) if scaled else other * alpha
    return pointwise.combined(b, op, x, other)


def divided(b: Builder, x: Any, other: Any, rounding_mode: str | None = None) -> Value:
    """Quotient, not rounded."""
    needs(rounding_mode is None, f"rounding mode {rounding_mode!r}.")
    return pointwise.combined(b, Div(), x, other)


def reversed_sub(b: Builder, x: Value, other: Any, alpha: Number = 1) -> Value:
    """other - alpha * x."""
    return pointwise.combined(b, Add(), pointwise.affine(b, x, -float(alpha)), other)


def added_product(b: Builder, x: Any, tensor1: Any, tensor2: Any, value: int | float = 1) -> Value:
    """x + value * tensor1 * tensor2."""
    first, second = (tensor1, tensor2) if isinstance(tensor1, Value) else (tensor2, tensor1)
    if not isinstance(first, Value):
        return binary(Add(), b, x, tensor1 * tensor2, value)
    product = binary(Mul(), b, first, second)
    return binary(Add(), b, x, product, value)


def power(b: Builder, x: Value, exponent: Any) -> Value:
    """x ** number."""
    needs(isinstance(exponent, int | float), "an exponent that is no number.")
    return pointwise.mapped(b, Power(float(exponent)), x)


def softmax(
    b: Builder,
    x: Value,
    dim: int,
    dtype: Any = None,
    half_to_float: bool = False,
    *,
    logarithm: bool = False,
) -> Value:
    """Softmax along one axis, or its logarithm."""
    return pointwise.softmax(b, x, dim, logarithm=logarithm)


def same(b: Builder, x: Value, *given: Any, **named: Any) -> Value:
    """Operators that leave values as they are at inference."""
    return x


def converted(b: Builder, x: Value, *given: Any, **named: Any) -> Value | Array:
    """A change of float type or device; everything here is float32."""
    wanted = str(named.get("dtype", next((g for g in given if isinstance(g, str)), "float")))
    if "bool" in wanted:
        return choices.truth(b, x)
    whole = x.name in b.ids or choices.is_truth(b, x.name)
    needs(whole or not any(n in wanted for n in ("int", "long")), f"a cast to {wanted}.")
    return x


def dropout(b: Builder, x: Value, p: Number = 0.5, train: bool = False) -> Value:
    """Nothing, at inference."""
    needs(not train, "dropout in training mode; call model.eval() before exporting.")
    return x


CURVES: dict[str, Curve] = {
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "silu": "silu",
    "hardswish": "hard_swish",
    "hardsigmoid": "hard_sigmoid",
    "mish": "mish",
    "exp": "exp",
    "sqrt": "sqrt",
    "abs": "abs",
    "log": "log",
    "round": "round",
    "erf": "erf",
}
BINARY: dict[str, Combine] = {
    "add": Add(),
    "sub": Sub(),
    "mul": Mul(),
    "maximum": Maximum(),
    "minimum": Minimum(),
}
