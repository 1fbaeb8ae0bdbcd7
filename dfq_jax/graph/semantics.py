"""What every operator computes, in float, on NHWC arrays."""

from collections.abc import Callable, Mapping
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from dfq_jax.graph.lowering import convolve, convolve_transposed, convolve_volume
from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    Arrange,
    AvgPool,
    BatchNorm,
    Broadcast,
    Clip,
    Combine,
    Compare,
    Concat,
    Constant,
    Conv2d,
    ConvTranspose2d,
    Curve,
    Div,
    Elu,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    LayerNorm,
    LeakyRelu,
    Linear,
    LocalNorm,
    LogSoftmax,
    MatMul,
    Maximum,
    MaxPool,
    Minimum,
    Mul,
    Norm,
    Op,
    Pad,
    Pointwise,
    Power,
    PRelu,
    Recurrent,
    Reduce,
    Relation,
    Relu,
    Reshape,
    Resize,
    Scale,
    Select,
    Slice,
    Softmax,
    Sub,
    Transpose,
    Weighted,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.recurrent import recurrent
from dfq_jax.graph.token_ops import (
    Column,
    Embed,
    Leading,
    OfTokens,
    Present,
    RmsNorm,
    Rotary,
)
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.graph.windows import pooled, resized

Tensor = Shaped[Array, "..."]
Slots = Mapping[str, Shaped[Any, "..."]]
"""Parameters of a node, arrays of JAX or NumPy."""


def apply_op(op: Op, p: Slots, *xs: Tensor) -> Tensor:  # noqa: C901 - one case per family
    """The output of an operator.

    Args:
      op: what to compute.
      p: its parameters by slot.
      *xs: its arguments, batch first.

    Returns:
      The result, in the dtype of the arguments.
    """
    match op:
        case Conv2d() | ConvTranspose2d() | Conv3d() | Linear():
            return weighted_layer(op, p, xs[0])
        case MatMul(transposed):
            return xs[0] @ (jnp.swapaxes(xs[1], -1, -2) if transposed else xs[1])
        case BatchNorm() | LayerNorm() | RmsNorm() | GroupNorm() | LocalNorm():
            return normalised(op, p, xs[0])
        case Relu() | LeakyRelu() | PRelu() | Clip() | Elu() | Activation() | Scale() | Power():
            return pointwise(op, p, xs[0])
        case Softmax(axis):
            return jax.nn.softmax(xs[0], axis=axis)
        case LogSoftmax(axis):
            return jax.nn.log_softmax(xs[0], axis=axis)
        case Add() | Sub() | Mul() | Div() | Maximum() | Minimum() | Compare():
            return combined(op, *xs)
        case Select():
            return jnp.where(xs[0] != 0, xs[1], xs[2])
        case MaxPool() | AvgPool() | AdaptiveAvgPool() | GlobalAvgPool():
            return pooled(op, xs[0])
        case Recurrent():
            return recurrent(op, p, xs[0])
        case Reduce():
            return reduced(op, xs[0])
        case Flatten() | Reshape() | Transpose() | Slice() | Concat() | Broadcast() | Pad():
            return arranged(op, *xs)
        case DepthToSpace():
            return arranged(op, *xs)
        case Resize():
            return resized(op, xs[0])
        case Column() | Leading() | Embed() | Present() | Rotary():
            return of_tokens(op, p, xs[0])
        case Constant():
            return p["value"]
        case _:
            assert_never(op)


def weighted_layer(
    op: Weighted, p: Slots, x: Tensor, convolve: Callable[..., Tensor] = convolve
) -> Tensor:
    """A layer with a kernel, and its bias where it has one."""
    match op:
        case Conv2d():
            y = convolve(x, p["kernel"], op)
        case ConvTranspose2d():
            y = convolve_transposed(x, p["kernel"], op)
        case Conv3d():
            y = convolve_volume(x, p["kernel"], op)
        case Linear():
            y = x @ p["kernel"]
        case _:
            assert_never(op)
    return y + p["bias"] if "bias" in p else y


def normalised(op: Norm, p: Slots, x: Tensor) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * scale + bias`, with recorded or present statistics."""
    match op:
        case BatchNorm(eps):
            gain = lax.rsqrt(p["var"] + eps)  # one multiply-add per element
            gain = gain * p["scale"] if "scale" in p else gain
            shift = -p["mean"] * gain
            return x * gain + (shift + p["bias"] if "bias" in p else shift)
        case LayerNorm(eps):
            return scaled(p, standardised(x, (-1,), eps))
        case RmsNorm(eps):
            power = jnp.mean(x * x, axis=-1, keepdims=True)
            return scaled(p, x * lax.rsqrt(power + eps))
        case GroupNorm(groups, eps):
            split = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
            return scaled(p, standardised(split, (1, 3), eps).reshape(x.shape))
        case LocalNorm(size, alpha, beta, offset):
            wide = jnp.pad(x * x, (*((0, 0),) * (x.ndim - 1), (size // 2, size // 2)))
            parts = (wide[..., i : i + x.shape[-1]] for i in range(size))
            return x * (offset + alpha / size * sum(parts, start=jnp.zeros_like(x))) ** -beta
        case _:
            assert_never(op)


def standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """`x` with mean 0 and variance 1 over `axes`."""
    centred = x - jnp.mean(x, axis=axes, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, axis=axes, keepdims=True) + eps)


def scaled(p: Slots, x: Tensor) -> Tensor:
    """`x * scale + bias`, each where there is one."""
    x = x * p["scale"] if "scale" in p else x
    return x + p["bias"] if "bias" in p else x


def pointwise(op: Pointwise, p: Slots, x: Tensor) -> Tensor:
    """A function of each element alone."""
    match op:
        case Relu(ceiling):
            return jnp.clip(x, 0.0, ceiling)
        case LeakyRelu(slope):
            return jnp.where(x > 0, x, slope * x)
        case PRelu():
            return jnp.where(x > 0, x, p["slope"] * x)
        case Clip(low, high):
            return jnp.clip(x, low, high)
        case Elu(alpha, scale):
            return scale * jax.nn.elu(x, alpha)
        case Activation(curve):
            return bent(curve, x)
        case Scale(factor, offset):
            x = x * factor if factor != 1.0 else x
            return x + offset if offset != 0.0 else x
        case Power(exponent):
            return x ** (int(exponent) if exponent.is_integer() else exponent)
        case _:
            assert_never(op)


def bent(curve: Curve, x: Tensor) -> Tensor:  # noqa: C901 - one case per curve
    """The activation called `curve`."""
    match curve:
        case "sigmoid":
            return jax.nn.sigmoid(x)
        case "tanh":
            return jnp.tanh(x)
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "hard_sigmoid":
            return jnp.clip(x + 3.0, 0.0, 6.0) / 6.0
        case "hard_swish":
            return x * (jnp.clip(x + 3.0, 0.0, 6.0) / 6.0)
        case "mish":
            return x * jnp.tanh(jax.nn.softplus(x))
        case "softplus":
            return jax.nn.softplus(x)
        case "elu":
            return jax.nn.elu(x)
        case "exp":
            return jnp.exp(x)
        case "sqrt":
            return jnp.sqrt(x)
        case "abs":
            return jnp.abs(x)
        case "erf":
            return jax.scipy.special.erf(x)
        case "log":
            return jnp.log(x)
        case "round":
            return jnp.round(x)
        case _:
            assert_never(curve)


def combined(op: Combine, a: Tensor, b: Tensor) -> Tensor:
    """Two tensors, element by element."""
    match op:
        case Add():
            return a + b
        case Sub():
            return a - b
        case Mul():
            return a * b
        case Div():
            return a / b
        case Maximum():
            return jnp.maximum(a, b)
        case Minimum():
            return jnp.minimum(a, b)
        case Compare(relation):
            return compared(relation, a, b).astype(a.dtype)
        case _:
            assert_never(op)


def compared(relation: Relation, a: Tensor, b: Tensor) -> Tensor:
    """Where a relation holds between two tensors."""
    match relation:
        case "equal":
            return a == b
        case "greater":
            return a > b
        case "greater_equal":
            return a >= b
        case "less":
            return a < b
        case "less_equal":
            return a <= b
        case _:
            assert_never(relation)


def reduced(op: Reduce, x: Tensor) -> Tensor:
    """One value for all positions along `op.axes`."""
    match op.kind:
        case "mean":
            return jnp.mean(x, axis=op.axes, keepdims=op.keepdims)
        case "sum":
            return jnp.sum(x, axis=op.axes, keepdims=op.keepdims)
        case "max":
            return jnp.max(x, axis=op.axes, keepdims=op.keepdims)
        case "l2":
            return jnp.sqrt(jnp.sum(x * x, axis=op.axes, keepdims=op.keepdims))
        case _:
            assert_never(op.kind)


def arranged(op: Arrange, *xs: Tensor) -> Tensor:
    """Values moved, dropped, repeated or put beside others."""
    x = xs[0]
    match op:
        case Flatten():
            return x.reshape(x.shape[0], -1)
        case Reshape(shape):
            return x.reshape(x.shape[0], *shape)
        case Transpose(order):
            return jnp.transpose(x, order)
        case Slice(bounds):
            return x[tuple(slice(*b) for b in bounds)]
        case Concat(axis):
            rows = max(part.shape[0] for part in xs)
            parts = [jnp.broadcast_to(part, (rows, *part.shape[1:])) for part in xs]
            return jnp.concatenate(parts, axis=axis)
        case Broadcast(shape):
            have = (*(1,) * (len(shape) + 1 - x.ndim), *x.shape[1:])
            full = (h if n == -1 else n for n, h in zip(shape, have, strict=True))
            return jnp.broadcast_to(x, (x.shape[0], *full))
        case DepthToSpace(block, inner):
            n, h, w, c = x.shape
            sizes = (c // block**2, block, block) if inner else (block, block, c // block**2)
            order = (0, 1, 4, 2, 5, 3) if inner else (0, 1, 3, 2, 4, 5)
            blocks = jnp.transpose(x.reshape(n, h, w, *sizes), order)
            return blocks.reshape(n, h * block, w * block, c // block**2)
        case Pad(widths, value, "constant"):
            return jnp.pad(x, widths, constant_values=value)
        case Pad(widths, _, mode):
            return jnp.pad(x, widths, mode=mode)
        case _:
            assert_never(op)


def of_tokens(op: OfTokens, p: Slots, x: Tensor) -> Tensor:
    """What ids stand for, which of them count, and what their places do to them.

    An id that is none has the last row of its table; `data/text.py` refuses those.
    """
    match op:
        case Column(index):
            return x[..., index]
        case Leading(axes):
            ends = [x.shape[1] if a in axes else n for a, n in enumerate(p["value"].shape)]
            return p["value"][tuple(map(slice, ends))]
        case Embed():
            return jnp.take(p["table"], x.astype(jnp.int32), axis=0, mode="clip")
        case Present(absent):
            return (x != absent).astype(jnp.float32)
        case Rotary():
            half = x.shape[-1] // 2
            cos, sin = p["cos"][:, None], p["sin"][:, None]
            a, b = x[..., :half], x[..., half:]
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        case _:
            assert_never(op)
