"""ONNX's operators: what each becomes. Arguments are inputs in order, keywords its attributes.

Every function takes `opset_version`, which decides where meanings changed between opsets.
"""

import math
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
    LeakyRelu,
    LocalNorm,
    Mul,
    Pads,
    Pair,
    Power,
    Scale,
)
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.io.importing import arrange, choices, layers, pointwise, volumes
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.values import Value

Array = np.ndarray
BOOL = 9
"""ONNX's number for truths."""
Ints = Sequence[int]


def constant(x: Any, what: str) -> Array:
    """An input that must not depend on the network's input.

    Raises:
      UnsupportedModelError: if it does.
    """
    if not isinstance(x, np.ndarray):
        raise UnsupportedModelError(f"its {what} is computed by the network.")
    return x


def window(
    x: Value,
    kernel: Ints,
    strides: Ints | None,
    dilations: Ints | None,
    pads: Ints | None,
    auto_pad: str,
) -> tuple[Pair, Pair, Pads, Pair]:
    """(window, strides, padding, dilation) of an operator over pixels.

    Args:
      x: what it reads.
      kernel: sizes of its window.
      strides: its attributes, as all that follow; None where left out.
      dilations: likewise.
      pads: all beginnings, then all ends.
      auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
    """
    rank = len(x.dims)
    size = layers.pair(kernel, rank, 1)
    steps = layers.pair(strides or 1, rank, 1)
    dilation = layers.pair(dilations or 1, rank, 1)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return size, steps, same_padding(x, size, steps, dilation, auto_pad), dilation
    given = (0,) * (2 * (rank - 2)) if pads is None or auto_pad == "VALID" else tuple(pads)
    lows, highs = (layers.pair(p, rank, 0) for p in (given[: rank - 2], given[rank - 2 :]))
    return size, steps, ((lows[0], highs[0]), (lows[1], highs[1])), dilation


def same_padding(x: Value, size: Pair, strides: Pair, dilation: Pair, auto_pad: str) -> Pads:
    """Padding with which the result has ceil(input / stride) pixels."""
    pads = []
    for axis in (0, 1):
        have, s = layers.extent_of(x, axis), strides[axis]
        total = max((-(-have // s) - 1) * s + dilation[axis] * (size[axis] - 1) + 1 - have, 0)
        less, more = total // 2, total - total // 2
        pads.append((less, more) if auto_pad == "SAME_UPPER" else (more, less))
    return pads[0], pads[1]


def conv(
    b: Builder,
    x: Value,
    weight: Any,
    bias: Any = None,
    group: int = 1,
    strides: Ints | None = None,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    auto_pad: str = "NOTSET",
) -> Value:
    """Conv."""
    kernel = constant(weight, "kernel")
    if kernel.ndim == 5:
        given = volumes.volume_window(x, kernel.shape[2:], strides, dilations, pads, auto_pad)
        op = Conv3d(given[1], given[2], group, given[3])
        return volumes.volume_convolution(b, x, kernel, bias, op)
    _, steps, padding, dilation = window(x, kernel.shape[2:], strides, dilations, pads, auto_pad)
    return layers.convolution(b, x, kernel, bias, steps, padding, dilation, group)


def conv_transpose(
    b: Builder,
    x: Value,
    weight: Any,
    bias: Any = None,
    group: int = 1,
    strides: Ints | None = None,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    auto_pad: str = "NOTSET",
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
) -> Value:
    """ConvTranspose, whose padding is stated, or follows from the size of its result."""
    kernel, rank = constant(weight, "kernel"), len(x.dims)
    stated = "NOTSET" if auto_pad.startswith("SAME") else auto_pad
    size, steps, padding, dilation = window(x, kernel.shape[2:], strides, dilations, pads, stated)
    extra = layers.pair(output_padding or 0, rank, 0)
    wanted: Sequence[int | None] = (None, None)
    if output_shape is not None:
        wanted = layers.pair(tuple(output_shape)[2 - rank :], rank, 1)
    elif auto_pad.startswith("SAME"):
        wanted = [layers.extent_of(x, axis) * steps[axis] for axis in (0, 1)]
    cuts = list(padding)
    for axis, target in enumerate(wanted):
        if target is not None:
            reach = dilation[axis] * (size[axis] - 1) + 1
            full = (layers.extent_of(x, axis) - 1) * steps[axis] + reach + extra[axis]
            cuts[axis] = layers.shared_out(full - target, auto_pad)
    op = ConvTranspose2d(steps, (cuts[0], cuts[1]), group, dilation, extra)
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
) -> Value:
    """GroupNormalization; before opset 21 scales run over groups."""
    repeats = x.shape[1] // scale.size
    scale, bias = (np.repeat(v, repeats) for v in (scale, bias))
    return layers.group_norm(b, x, num_groups, scale, bias, epsilon)


def instance_normalization(
    b: Builder, x: Value, scale: Array, bias: Array, epsilon: float = 1e-5
) -> Value:
    """InstanceNormalization."""
    return layers.group_norm(b, x, x.shape[1], scale, bias, epsilon)


def curve(name: Curve, b: Builder, x: Value) -> Value:
    """An activation without parameters."""
    return pointwise.mapped(b, Activation(name), x)


def relu(b: Builder, x: Value) -> Value:
    """Relu."""
    return pointwise.limited(b, x, 0, None)


def clip(
    b: Builder,
    x: Value,
    low: Any = None,
    high: Any = None,
    min: float | None = None,
    max: float | None = None,
) -> Value:
    """Clip with constant limits: inputs, or before opset 11 attributes."""
    ends = [None if e is None else float(constant(e, "limit").reshape(())) for e in (low, high)]
    return pointwise.limited(
        b, x, *(a if e is None else e for e, a in zip(ends, (min, max), strict=True))
    )


def leaky_relu(b: Builder, x: Value, alpha: float = 0.01) -> Value:
    """LeakyRelu."""
    return pointwise.mapped(b, LeakyRelu(alpha), x)


def prelu(b: Builder, x: Value, slope: Any) -> Value:
    """PRelu: slopes broadcast from the right, so those of channels have axes of size 1 behind."""
    slopes, rank = constant(slope, "slope"), len(x.dims)
    full = slopes.reshape(*(1,) * (rank - slopes.ndim), *slopes.shape)
    if full.ndim > rank or any(
        n not in (1, have) for n, have in zip(full.shape, x.shape, strict=True)
    ):
        raise UnsupportedModelError(
            f"slopes of shape {slopes.shape} do not broadcast to {x.shape}; give one for each "
            f"channel the shape {(x.shape[1], *(1,) * (rank - 2))}."
        )
    if full.size in (1, full.shape[1]):
        return pointwise.parametric_relu(b, x, slopes)
    bent = pointwise.combined(b, Mul(), pointwise.limited(b, x, None, 0), slopes)
    return pointwise.combined(b, Add(), pointwise.limited(b, x, 0, None), bent)


def hard_sigmoid(b: Builder, x: Value, alpha: float = 0.2, beta: float = 0.5) -> Value:
    """HardSigmoid; PyTorch's where its numbers are 1/6 and 1/2."""
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return pointwise.mapped(b, Activation("hard_sigmoid"), x)
    return pointwise.limited(b, pointwise.mapped(b, Scale(alpha, beta), x), 0, 1)


def gelu(b: Builder, x: Value, approximate: str = "none") -> Value:
    """Gelu, exact or by tanh."""
    return curve("gelu" if approximate == "none" else "gelu_tanh", b, x)


def elu(b: Builder, x: Value, alpha: float = 1.0) -> Value:
    """Elu."""
    return pointwise.exponential_linear(b, x, alpha)


def selu(
    b: Builder, x: Value, alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805
) -> Value:
    """Selu."""
    return pointwise.exponential_linear(b, x, alpha, gamma)


def celu(b: Builder, x: Value, alpha: float = 1.0) -> Value:
    """Celu."""
    y = pointwise.mapped(b, Activation("elu"), pointwise.affine(b, x, 1 / alpha))
    return pointwise.affine(b, y, alpha)


def swish(b: Builder, x: Value, alpha: float = 1.0) -> Value:
    """Swish with alpha 1."""
    if alpha != 1:
        raise UnsupportedModelError(f"alpha {alpha} is supported as 1 only.")
    return curve("silu", b, x)


def power(b: Builder, x: Value, exponent: Any) -> Value:
    """Pow with a number."""
    number = constant(exponent, "exponent")
    if number.size != 1:
        raise UnsupportedModelError("several exponents.")
    return pointwise.mapped(b, Power(float(number.reshape(()))), x)


def raised(exponent: float, b: Builder, x: Value) -> Value:
    """Reciprocal."""
    return pointwise.mapped(b, Power(exponent), x)


def negated(b: Builder, x: Value) -> Value:
    """Neg."""
    return pointwise.affine(b, x, -1.0)


def binary(op: Combine, b: Builder, x: Any, *others: Any) -> Value:
    """Add, Sub, Mul, Div, and Sum, Max and Min of any number of tensors."""
    for other in others:
        x = pointwise.combined(b, op, x, other)
    return x


def softmax(
    logarithm: bool, b: Builder, x: Value, axis: int | None = None, opset_version: int = 13
) -> Value:
    """Softmax and LogSoftmax; before opset 13 over all axes from `axis` on."""
    if opset_version >= 13:
        return pointwise.softmax(b, x, -1 if axis is None else axis, logarithm=logarithm)
    at = (1 if axis is None else axis) % len(x.dims)
    large = [i for i in range(at, len(x.dims)) if x.shape[i] > 1]
    if len(large) <= 1:
        return pointwise.softmax(b, x, large[0] if large else at, logarithm=logarithm)
    flat = arrange.viewed(b, x, (*x.shape[:at], math.prod(x.shape[at:])))
    return arrange.viewed(b, pointwise.softmax(b, flat, at, logarithm=logarithm), x.shape)


def local_norm(
    b: Builder, x: Value, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Value:
    """LRN."""
    return layers.local_norm(b, x, LocalNorm(size, alpha, beta, bias))


def is_nan(b: Builder, x: Value) -> Array:
    """IsNaN: nowhere. Exporters ask it of softmax over masks of -inf, which are finite here."""
    return np.zeros(x.shape, np.bool_)


def matmul(b: Builder, x: Any, y: Any) -> Value:
    """MatMul."""
    return layers.matmul(b, x, y)


def mish(b: Builder, x: Value) -> Value:
    """Mish."""
    return curve("mish", b, x)


def same(b: Builder, x: Value) -> Value:
    """Identity."""
    return x


def dropout(b: Builder, x: Value, ratio: Any = None, training_mode: Any = None) -> Value:
    """Dropout at inference, whose mask nobody may read."""
    if training_mode is not None and np.any(constant(training_mode, "training mode")):
        raise UnsupportedModelError("dropout in training mode; call model.eval() before exporting.")
    return x


def cast(b: Builder, x: Value, to: int = 1) -> Value | Array:
    """Cast between float types, to truths and of them; everything here is float32."""
    if to == BOOL:
        return choices.truth(b, x)
    if to not in (1, 10, 11, 16) and x.name not in b.ids and not choices.is_truth(b, x.name):
        raise UnsupportedModelError(f"a cast to ONNX element type {to}, which is no float.")
    return x
