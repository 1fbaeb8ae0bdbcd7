"""ONNX's operators: what each becomes. Arguments are inputs in order, keywords its attributes.

Every function takes `opset_version`, which decides where meanings changed between opsets.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import (
    Activation,
    Combine,
    ConvTranspose2d,
    Curve,
    LeakyRelu,
    Pads,
    Pair,
    Power,
    Scale,
)
from dfq_jax.io.importing import layers, pointwise
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.values import Value

Array = np.ndarray
Ints = Sequence[int]


def constant(x: Any, what: str) -> Array:
    """An input that must not depend on the network's input.

    Raises:
      UnsupportedModelError: if it does.
    """
    if not isinstance(x, np.ndarray):
        raise UnsupportedModelError(f"its {what} is computed by the network.")
    return x


def window(x: Value, kernel: Ints, named: dict[str, Any], ceil: bool = False):
    """(window, strides, padding, dilation) of an operator over pixels.

    Args:
      x: what it reads.
      kernel: sizes of its window.
      named: its attributes: strides, dilations, pads, auto_pad.
      ceil: whether sizes round up.
    """
    rank = len(x.dims)
    size = layers.pair(kernel, rank, 1)
    strides = layers.pair(named.get("strides", 1), rank, 1)
    dilation = layers.pair(named.get("dilations", 1), rank, 1)
    auto = named.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        padding = same_padding(x, size, strides, dilation, auto == "SAME_UPPER")
    else:
        pads = named.get("pads") or (0,) * (2 * (rank - 2))
        lows, highs = (layers.pair(tuple(p), rank, 0) for p in (pads[: rank - 2], pads[rank - 2 :]))
        padding = (lows[0], highs[0]), (lows[1], highs[1])
    return size, strides, padding, dilation


def same_padding(x: Value, size: Pair, strides: Pair, dilation: Pair, upper: bool) -> Pads:
    """Padding with which the result has ceil(input / stride) pixels."""
    pads = []
    for axis in (0, 1):
        have, s = layers.extent_of(x, axis), strides[axis]
        total = max((-(-have // s) - 1) * s + dilation[axis] * (size[axis] - 1) + 1 - have, 0)
        less, more = total // 2, total - total // 2
        pads.append((less, more) if upper else (more, less))
    return pads[0], pads[1]


def conv(b: Builder, x: Value, weight: Any, bias: Any = None, group: int = 1, **named: Any):
    """Conv."""
    kernel = constant(weight, "kernel")
    _, strides, padding, dilation = window(x, kernel.shape[2:], named)
    return layers.convolution(b, x, kernel, bias, strides, padding, dilation, group)


def conv_transpose(
    b: Builder, x: Value, weight: Any, bias: Any = None, group: int = 1, **named: Any
) -> Value:
    """ConvTranspose."""
    kernel = constant(weight, "kernel")
    if named.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in named:
        raise UnsupportedModelError("a transposed convolution with auto_pad or output_shape.")
    _, strides, padding, dilation = window(x, kernel.shape[2:], named)
    extra = layers.pair(named.get("output_padding", 0), len(x.dims), 0)
    op = ConvTranspose2d(strides, padding, group, dilation, extra)
    return layers.transposed_convolution(b, x, kernel, bias, op)


def gemm(
    b: Builder,
    x: Value,
    y: Any,
    c: Any = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    **_: Any,
) -> Value:
    """Gemm with a constant matrix."""
    weight = constant(y, "matrix")
    if transA:
        raise UnsupportedModelError("a Gemm that transposes its first input.")
    kernel = (weight if transB else weight.T) * np.float32(alpha)
    bias = None if c is None else np.asarray(c, np.float32).reshape(-1) * np.float32(beta)
    if bias is not None and bias.size == 1:
        bias = np.repeat(bias, kernel.shape[0])
    return layers.linear(b, x, kernel, bias)


def batch_normalization(
    b: Builder,
    x: Value,
    scale: Array,
    bias: Array,
    mean: Any,
    var: Any,
    epsilon: float = 1e-5,
    training_mode: int = 0,
    **_: Any,
) -> Value:
    """BatchNormalization with recorded statistics."""
    if training_mode:
        raise UnsupportedModelError(
            "batch norm in training mode; call model.eval() before exporting."
        )
    mean, var = constant(mean, "mean"), constant(var, "variance")
    return layers.batch_norm(b, x, scale, bias, mean, var, epsilon)


def layer_normalization(
    b: Builder,
    x: Value,
    scale: Array | None = None,
    bias: Array | None = None,
    axis: int = -1,
    epsilon: float = 1e-5,
    **_: Any,
) -> Value:
    """LayerNormalization over the axes from `axis` on."""
    return layers.layer_norm(b, x, len(x.dims) - axis % len(x.dims), scale, bias, epsilon)


def group_normalization(
    b: Builder,
    x: Value,
    scale: Array,
    bias: Array,
    num_groups: int = 1,
    epsilon: float = 1e-5,
    **_: Any,
) -> Value:
    """GroupNormalization; before opset 21 scales run over groups."""
    repeats = x.shape[1] // scale.size
    scale, bias = (np.repeat(v, repeats) for v in (scale, bias))
    return layers.group_norm(b, x, num_groups, scale, bias, epsilon)


def instance_normalization(
    b: Builder, x: Value, scale: Array, bias: Array, epsilon: float = 1e-5, **_: Any
) -> Value:
    """InstanceNormalization."""
    return layers.group_norm(b, x, x.shape[1], scale, bias, epsilon)


def curve(name: Curve, b: Builder, x: Value, **_: Any) -> Value:
    """An activation without parameters."""
    return pointwise.mapped(b, Activation(name), x)


def relu(b: Builder, x: Value, **_: Any) -> Value:
    """Relu."""
    return pointwise.limited(b, x, 0, None)


def clip(b: Builder, x: Value, low: Any = None, high: Any = None, **_: Any) -> Value:
    """Clip with constant limits."""
    ends = [None if e is None else float(constant(e, "limit").reshape(())) for e in (low, high)]
    return pointwise.limited(b, x, *ends)


def leaky_relu(b: Builder, x: Value, alpha: float = 0.01, **_: Any) -> Value:
    """LeakyRelu."""
    return pointwise.mapped(b, LeakyRelu(alpha), x)


def prelu(b: Builder, x: Value, slope: Any, **_: Any) -> Value:
    """PRelu with one slope for all, or one for each channel."""
    slopes = constant(slope, "slope")
    if slopes.size not in (1, x.shape[1]):
        raise UnsupportedModelError(f"slopes of shape {slopes.shape}.")
    return pointwise.parametric_relu(b, x, slopes)


def hard_sigmoid(b: Builder, x: Value, alpha: float = 0.2, beta: float = 0.5, **_: Any) -> Value:
    """HardSigmoid; PyTorch's where its numbers are 1/6 and 1/2."""
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return pointwise.mapped(b, Activation("hard_sigmoid"), x)
    return pointwise.limited(b, pointwise.mapped(b, Scale(alpha, beta), x), 0, 1)


def gelu(b: Builder, x: Value, approximate: str = "none", **_: Any) -> Value:
    """Gelu, exact or by tanh."""
    return curve("gelu" if approximate == "none" else "gelu_tanh", b, x)


def elu(b: Builder, x: Value, alpha: float = 1.0, **_: Any) -> Value:
    """Elu with alpha 1."""
    if alpha != 1:
        raise UnsupportedModelError(f"alpha {alpha} is supported as 1 only.")
    return curve("elu", b, x)


def swish(b: Builder, x: Value, alpha: float = 1.0, **_: Any) -> Value:
    """Swish with alpha 1."""
    if alpha != 1:
        raise UnsupportedModelError(f"alpha {alpha} is supported as 1 only.")
    return curve("silu", b, x)


def power(b: Builder, x: Value, exponent: Any, **_: Any) -> Value:
    """Pow with a number."""
    number = constant(exponent, "exponent")
    if number.size != 1:
        raise UnsupportedModelError("several exponents.")
    return pointwise.mapped(b, Power(float(number.reshape(()))), x)


def raised(exponent: float, b: Builder, x: Value, **_: Any) -> Value:
    """Reciprocal."""
    return pointwise.mapped(b, Power(exponent), x)


def negated(b: Builder, x: Value, **_: Any) -> Value:
    """Neg."""
    return pointwise.affine(b, x, -1.0)


def binary(op: Combine, b: Builder, x: Any, *others: Any, **_: Any) -> Value:
    """Add, Sub, Mul, Div, and Sum and Max of any number of tensors."""
    for other in others:
        x = pointwise.combined(b, op, x, other)
    return x


def softmax(b: Builder, x: Value, axis: int | None = None, opset_version: int = 13, **_: Any):
    """Softmax; before opset 13 over all axes from `axis` on, which must be the last one."""
    at = (-1 if opset_version >= 13 else 1) if axis is None else axis
    if opset_version < 13 and at % len(x.dims) != len(x.dims) - 1:
        raise UnsupportedModelError(f"softmax over several axes of shape {x.shape}.")
    return pointwise.softmax(b, x, at)


def where(b: Builder, condition: Any, x: Any, y: Any, **_: Any) -> Value:
    """Where with a constant condition."""
    return pointwise.chosen(b, constant(condition, "condition").astype(np.bool_), x, y)


def is_nan(b: Builder, x: Value, **_: Any) -> Array:
    """IsNaN: nowhere. Exporters ask it of softmax over masks of -inf, which are finite here."""
    return np.zeros(x.shape, np.bool_)


def matmul(b: Builder, x: Any, y: Any, **_: Any) -> Value:
    """MatMul."""
    return layers.matmul(b, x, y)


def mish(b: Builder, x: Value, **_: Any) -> Value:
    """Mish."""
    return curve("mish", b, x)


def same(b: Builder, x: Value, *others: Any, **_: Any) -> Any:
    """Identity; Dropout at inference, whose mask nobody may read."""
    return x


def cast(b: Builder, x: Value, to: int = 1, **_: Any) -> Value:
    """Cast between float types; everything here is float32."""
    if to not in (1, 10, 11, 16):
        raise UnsupportedModelError(f"a cast to ONNX element type {to}, which is no float.")
    return x
