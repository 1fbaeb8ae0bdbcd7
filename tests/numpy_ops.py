"""Every operator in NumPy, as plainly as it can be written."""

from typing import Any

import numpy as np
from scipy.special import erf, expit

from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    BatchNorm,
    Broadcast,
    Clip,
    Compare,
    Concat,
    Constant,
    Conv2d,
    ConvTranspose2d,
    Div,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    LayerNorm,
    LeakyRelu,
    Linear,
    MatMul,
    Maximum,
    MaxPool,
    Mul,
    Pad,
    Power,
    PRelu,
    Reduce,
    Relu,
    Reshape,
    Resize,
    Scale,
    Select,
    Slice,
    Softmax,
    Sub,
    Transpose,
)
from dfq_jax.graph.pixel_ops import DepthToSpace


def conv(x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), groups=1, dilation=(1, 1)):
    """Convolution as six nested loops, the two over pixels written as slices."""
    kh, kw, per_group, cout = kernel.shape
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    oh = (x.shape[1] - dilation[0] * (kh - 1) - 1) // strides[0] + 1
    ow = (x.shape[2] - dilation[1] * (kw - 1) - 1) // strides[1] + 1
    out = np.zeros((x.shape[0], oh, ow, cout), x.dtype)
    for o in range(cout):
        first = o // (cout // groups) * per_group
        for i, j, c in np.ndindex(kh, kw, per_group):
            top, left = i * dilation[0], j * dilation[1]
            rows = slice(top, top + (oh - 1) * strides[0] + 1, strides[0])
            columns = slice(left, left + (ow - 1) * strides[1] + 1, strides[1])
            out[..., o] += x[:, rows, columns, first + c] * kernel[i, j, c, o]
    return out


def windows(x, op, fill):
    """Values under each pooling window: (kh * kw, n, oh, ow, c)."""
    x = np.pad(x, ((0, 0), *op.padding, (0, 0)), constant_values=fill)
    (kh, kw), (sh, sw) = op.window, op.strides
    oh, ow = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    return np.stack(
        [
            x[:, i : i + (oh - 1) * sh + 1 : sh, j : j + (ow - 1) * sw + 1 : sw]
            for i, j in np.ndindex(kh, kw)
        ]
    )


def average(x, op):
    """Average pooling."""
    total = windows(x, op, 0.0).sum(0)
    if op.count_padding:
        return total / (op.window[0] * op.window[1])
    return total / windows(np.ones_like(x), op, 0.0).sum(0)


def conv_transposed(x, op, kernel):
    """Every input pixel adds its value times the kernel to the output; then the border is cut."""
    n, h, w, cin = x.shape
    kh, kw, per_group, cout = kernel.shape
    (sh, sw), (dh, dw) = op.strides, op.dilation
    height = (h - 1) * sh + dh * (kh - 1) + 1 + op.extra[0]
    width = (w - 1) * sw + dw * (kw - 1) + 1 + op.extra[1]
    out = np.zeros((n, height, width, cout), x.dtype)
    for o, c in np.ndindex(cout, per_group):
        source = o // (cout // op.groups) * per_group + c
        for i, j, p, q in np.ndindex(h, w, kh, kw):
            out[:, i * sh + p * dh, j * sw + q * dw, o] += x[:, i, j, source] * kernel[p, q, c, o]
    (top, bottom), (left, right) = op.padding
    assert cin == per_group * op.groups
    return out[:, top : height - bottom, left : width - right]


def bilinear(x, op):
    """Bilinear interpolation, `half_pixel`, one output pixel at a time."""
    assert op.coordinates == "half_pixel"
    for axis in (1, 2):
        size, rows = x.shape[axis], []
        for i in range(op.size[axis - 1]):
            at = min(max((i + 0.5) / op.scale[axis - 1] - 0.5, 0), size - 1)
            low = int(at)
            below, above = x.take(low, axis), x.take(min(low + 1, size - 1), axis)
            rows.append(below * (1 - at + low) + above * (at - low))
        x = np.stack(rows, axis)
    return x


def nearest(x, op):
    """The pixel below `i / scale`."""
    assert op.coordinates == "asymmetric"
    for axis in (1, 2):
        index = np.floor(np.arange(op.size[axis - 1]) / op.scale[axis - 1]).astype(int)
        x = x.take(index, axis)
    return x


def evenly(x, size):
    """Adaptive average pooling: the mean of each window."""
    rows, columns = (
        [slice(i * s // o, -(-(i + 1) * s // o)) for i in range(o)]
        for s, o in zip(x.shape[1:3], size, strict=True)
    )
    return np.stack([np.stack([x[:, r, c].mean((1, 2)) for c in columns], 1) for r in rows], 1)


def normalised(x, axes, eps):
    """Layer or group norm."""
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(var + eps)


def softmax(x, axis):
    """Softmax."""
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def joined(axis, *xs):
    """Concatenation; a single row serves the whole batch."""
    rows = max(len(x) for x in xs)
    return np.concatenate([np.broadcast_to(x, (rows, *x.shape[1:])) for x in xs], axis)


CURVES = {
    "sigmoid": expit,
    "tanh": np.tanh,
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: x * (1 + erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * expit(2 * (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)),
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "softplus": lambda x: np.logaddexp(x, 0),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "exp": np.exp,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "erf": erf,
}

REDUCTIONS = {
    "mean": np.mean,
    "sum": np.sum,
    "max": np.max,
    "l2": lambda x, axis, keepdims: np.sqrt(np.sum(x**2, axis, keepdims=keepdims)),
}


def scaled(x, p):
    """`x * scale + bias`, each where there is one."""
    return x * p.get("scale", 1.0) + p.get("bias", 0.0)


def group_norm(x, op):
    """Standardised over positions and groups of channels."""
    split = x.reshape(len(x), -1, op.groups, x.shape[-1] // op.groups)
    return normalised(split, (1, 3), op.eps).reshape(x.shape)


REFERENCE = {
    Conv2d: lambda op, p, x: (
        conv(x, p["kernel"], op.strides, op.padding, op.groups, op.dilation) + p.get("bias", 0.0)
    ),
    ConvTranspose2d: lambda op, p, x: conv_transposed(x, op, p["kernel"]) + p.get("bias", 0.0),
    Linear: lambda op, p, x: x @ p["kernel"] + p.get("bias", 0.0),
    MatMul: lambda op, p, a, b: a @ (b.swapaxes(-1, -2) if op.transposed else b),
    BatchNorm: lambda op, p, x: scaled((x - p["mean"]) / np.sqrt(p["var"] + op.eps), p),
    LayerNorm: lambda op, p, x: scaled(normalised(x, -1, op.eps), p),
    GroupNorm: lambda op, p, x: scaled(group_norm(x, op), p),
    Relu: lambda op, p, x: np.clip(x, 0, op.ceiling),
    LeakyRelu: lambda op, p, x: np.where(x > 0, x, op.slope * x),
    PRelu: lambda op, p, x: np.where(x > 0, x, p["slope"] * x),
    Clip: lambda op, p, x: np.clip(x, op.low, op.high),
    Activation: lambda op, p, x: CURVES[op.curve](x),
    Scale: lambda op, p, x: op.factor * x + op.offset,
    Power: lambda op, p, x: x**op.exponent,
    Softmax: lambda op, p, x: softmax(x, op.axis),
    Add: lambda op, p, a, b: a + b,
    Sub: lambda op, p, a, b: a - b,
    Mul: lambda op, p, a, b: a * b,
    Div: lambda op, p, a, b: a / b,
    Maximum: lambda op, p, a, b: np.maximum(a, b),
    Compare: lambda op, p, a, b: getattr(np, op.relation)(a, b).astype(a.dtype),
    Select: lambda op, p, x, a, b: np.where(x != 0, a, b),
    MaxPool: lambda op, p, x: windows(x, op, -np.inf).max(0),
    AvgPool: lambda op, p, x: average(x, op),
    AdaptiveAvgPool: lambda op, p, x: evenly(x, op.size),
    GlobalAvgPool: lambda op, p, x: x.mean((1, 2), keepdims=op.keepdims),
    Reduce: lambda op, p, x: REDUCTIONS[op.kind](x, axis=op.axes, keepdims=op.keepdims),
    Flatten: lambda op, p, x: x.reshape(len(x), -1),
    Reshape: lambda op, p, x: x.reshape(len(x), *op.shape),
    Transpose: lambda op, p, x: x.transpose(op.order),
    Slice: lambda op, p, x: x[tuple(slice(*b) for b in op.bounds)],
    Concat: lambda op, p, *xs: joined(op.axis, *xs),
    Broadcast: lambda op, p, x: np.broadcast_to(x, (len(x), *op.shape)),
    DepthToSpace: lambda op, p, x: spread_out(x, op.block, op.inner),
    Resize: lambda op, p, x: (nearest if op.method == "nearest" else bilinear)(x, op),
    Constant: lambda op, p: p["value"],
}


def spread_out(x, block, inner):
    """Every place of a block by itself."""
    made = x.shape[-1] // block**2
    y = np.zeros((len(x), x.shape[1] * block, x.shape[2] * block, made))
    for i in range(block):
        for j in range(block):
            at = i * block + j
            part = slice(at, None, block**2) if inner else slice(at * made, (at + 1) * made)
            y[:, i::block, j::block] = x[..., part]
    return y


def reference(op, p, *xs):
    """One operator in NumPy."""
    if isinstance(op, Pad):
        if op.mode == "constant":
            return np.pad(xs[0], op.widths, constant_values=op.value)
        mode: Any = op.mode
        return np.pad(xs[0], op.widths, mode=mode)
    return REFERENCE[type(op)](op, p, *xs)
