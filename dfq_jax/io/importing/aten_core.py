"""PyTorch's operators under the names that `run_decompositions()` gives them.

Norms return their statistics too, which training reads and inference does not.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_jax.graph.ops import Add, Mul, Sub
from dfq_jax.io.importing import arrange, aten, choices, layers, pointwise, pools
from dfq_jax.io.importing.aten import needs
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.pointwise import Number
from dfq_jax.io.importing.values import Value, extent

Array = np.ndarray
Ints = Sequence[int]
Several = tuple[Value | None, ...]
"""A normalised tensor, and the statistics nobody may read."""


def batch_norm_recorded(
    b: Builder,
    x: Value,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
) -> Several:
    """_native_batch_norm_legit_no_training, _batch_norm_no_update."""
    given = (weight, bias, running_mean, running_var)
    if not images_in_channels(b, x):
        y = aten.batch_norm(b, x, *given, training=False, eps=eps)
        return y, None, None, None
    apart = images_apart(b, x)
    scale, shift, mean, var = (one_of_each(v, apart.shape[1]) for v in given)
    y = aten.batch_norm(b, apart, scale, shift, mean, var, training=False, eps=eps)
    return images_joined(y), None, None, None


def batch_norm(
    b: Builder,
    x: Value,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool,
    momentum: Number,
    eps: Number,
    cudnn_enabled: bool = True,
) -> Several:
    """native_batch_norm, _native_batch_norm_legit, _batch_norm_impl_index."""
    recorded = (running_mean, running_var)
    return (
        aten.batch_norm(b, x, weight, bias, *recorded, training, momentum, eps),
        None,
        None,
        None,
        None,
    )


def batch_norm_of_a_device(
    b: Builder,
    x: Value,
    weight: Array,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool,
    exponential_average_factor: Number,
    epsilon: Number,
) -> Several:
    """cudnn_batch_norm, miopen_batch_norm."""
    return batch_norm(
        b, x, weight, bias, running_mean, running_var, training, exponential_average_factor, epsilon
    )


def present_norm(
    b: Builder,
    x: Value,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: Number,
    eps: Number,
) -> Several:
    """_native_batch_norm_legit.no_stats: what is left of an instance norm.

    PyTorch normalises (1, n c, h, w) there, so that every image has statistics of its own.
    """
    joined = images_in_channels(b, x)
    needs(
        extent(x.dims[0]) == 1 and (joined or b.batch is None),
        "batch norm in training mode; call model.eval() before exporting.",
    )
    apart = images_apart(b, x) if joined else x
    count = apart.shape[1]
    scale, shift = (one_of_each(v, count) for v in (weight, bias))
    y = layers.group_norm(b, apart, count, scale, shift, float(eps))
    return images_joined(y) if joined else y, None, None


def images_in_channels(b: Builder, x: Value) -> bool:
    """Whether an instance norm made one image with the channels of all images of the batch."""
    return b.batch is not None and b.batch in x.dims[1]


def images_apart(b: Builder, x: Value) -> Value:
    """(1, n c, h, w) as (n, c, h, w)."""
    batch = tuple(a for a in x.dims[1] if a is b.batch)
    return Value(x.name, x.axes, (batch, b.inner(x.dims[1]), *x.dims[2:]))


def images_joined(x: Value) -> Value:
    """(n, c, h, w) as (1, n c, h, w)."""
    return Value(x.name, x.axes, ((), (*x.dims[0], *x.dims[1]), *x.dims[2:]))


def one_of_each(vector: Array | None, count: int) -> Array | None:
    """The first of the repetitions that a vector, if there is one, consists of."""
    if vector is None:
        return None
    rows = vector.reshape(-1, count)
    needs(bool((rows == rows[0]).all()), "an instance norm with parameters for each image.")
    return rows[0]


def layer_norm(
    b: Builder,
    x: Value,
    normalized_shape: Ints,
    weight: Array | None,
    bias: Array | None,
    eps: Number,
) -> Several:
    """native_layer_norm."""
    return aten.layer_norm(b, x, normalized_shape, weight, bias, eps), None, None


def group_norm(
    b: Builder,
    x: Value,
    weight: Array | None,
    bias: Array | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: Number,
) -> Several:
    """native_group_norm."""
    return layers.group_norm(b, x, group, weight, bias, float(eps)), None, None


def rms_norm(
    b: Builder, x: Value, normalized_shape: Ints, weight: Any = None, eps: Number | None = None
) -> Value:
    """x / sqrt(mean(x^2) + eps) over the last axes, times a weight."""
    least = float(np.finfo(np.float32).eps) if eps is None else float(eps)
    if weight is None or isinstance(weight, np.ndarray):
        return layers.rms_norm(b, x, len(normalized_shape), weight, least)
    y = layers.rms_norm(b, x, len(normalized_shape), None, least)
    return pointwise.combined(b, Mul(), y, weight)


def variance(
    b: Builder,
    x: Value,
    dim: Any = None,
    correction: Number | None = 1,
    keepdim: bool = False,
) -> Value:
    """var.correction: the mean square of what is left without the mean."""
    axes = [dim] if isinstance(dim, int) else list(dim or ())
    needs(bool(axes), "a variance over all axes, the batch among them.")
    count = int(np.prod([x.shape[a] for a in axes]))
    taken = 1 if correction is None else correction
    needs(count > taken, f"a variance of {count} values with correction {taken}.")
    centred = pointwise.combined(b, Sub(), x, pools.reduced(b, x, "mean", axes, keepdims=True))
    mean = pools.reduced(b, aten.power(b, centred, 2.0), "mean", axes, keepdims=keepdim)
    return pointwise.affine(b, mean, count / (count - taken))


def deviation(b: Builder, x: Value, *given: Any, **named: Any) -> Value:
    """std.correction."""
    return aten.curve("sqrt", b, variance(b, x, *given, **named))


def biased_variance(
    b: Builder, x: Value, dim: Any, unbiased: bool = True, keepdim: bool = False
) -> Value:
    """var.dim: with its correction as a truth value."""
    return variance(b, x, dim, int(unbiased), keepdim)


def biased_deviation(b: Builder, x: Value, *given: Any, **named: Any) -> Value:
    """std.dim: with its correction as a truth value."""
    return aten.curve("sqrt", b, biased_variance(b, x, *given, **named))


def variance_and_mean(
    b: Builder, x: Value, dim: Any = None, correction: Number | None = 1, keepdim: bool = False
) -> tuple[Value, Value]:
    """var_mean.correction."""
    spread = variance(b, x, dim, correction, keepdim)
    axes = [dim] if isinstance(dim, int) else dim
    return spread, pools.reduced(b, x, "mean", axes, keepdims=keepdim)


def least(b: Builder, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """amin: the greatest of the negatives."""
    axes = [dim] if isinstance(dim, int) else list(dim or ())
    needs(bool(axes), "a minimum over all axes, the batch among them.")
    greatest = pools.reduced(b, pointwise.affine(b, x, -1.0), "max", axes, keepdims=keepdim)
    return pointwise.affine(b, greatest, -1.0)


def greatest_of(b: Builder, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, None]:
    """max.dim; nobody may read the indices."""
    return pools.reduced(b, x, "max", [dim], keepdims=keepdim), None


def least_of(b: Builder, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, None]:
    """min.dim; nobody may read the indices."""
    return least(b, x, dim, keepdim), None


def above(b: Builder, x: Value, threshold: Number, value: Number) -> Value:
    """threshold: a number wherever values are not larger than another."""
    return choices.selected(b, choices.compared("greater", b, x, threshold), x, value)


def hard_shrunk(b: Builder, x: Value, lambd: Number = 0.5) -> Value:
    """hardshrink: 0 in place of what is small."""
    large = choices.compared("greater", b, aten.curve("abs", b, x), lambd)
    return choices.selected(b, large, x, 0.0)


def soft_shrunk(b: Builder, x: Value, lambd: Number = 0.5) -> Value:
    """softshrink: everything a step nearer to 0."""
    return pointwise.combined(b, Sub(), x, pointwise.limited(b, x, -lambd, lambd))


def log_sigmoid(b: Builder, x: Value) -> Value:
    """log_sigmoid: -softplus(-x)."""
    y = aten.curve("softplus", b, pointwise.affine(b, x, -1.0))
    return pointwise.affine(b, y, -1.0)


def full_like(b: Builder, x: Value, fill_value: Number, **named: Any) -> Array:
    """full_like, ones_like."""
    return np.broadcast_to(np.float32(fill_value), x.shape)


def restrided(b: Builder, x: Value, size: Ints, stride: Ints, storage_offset: Any = None) -> Value:
    """as_strided of an image pooled to one pixel: pooling leaves it, and it changes nothing."""
    whole = tuple(size) == x.shape and not storage_offset
    steps = [s for n, s in zip(size, stride, strict=True) if n > 1]
    ordered = steps == sorted(steps, reverse=True) and steps[-1:] in ([], [1])
    pixel = whole and all(n == 1 for n in x.shape[2:])
    needs(pixel and ordered, f"memory seen with sizes {tuple(size)} and strides {tuple(stride)}.")
    return x


def interpolated(b: Builder, x: Value, end: Any, weight: Number) -> Value:
    """lerp: x + weight * (end - x)."""
    return aten.binary(Add(), b, x, aten.binary(Sub(), b, end, x), weight)


def gated(b: Builder, x: Value, dim: int = -1) -> Value:
    """glu: the first half times the sigmoid of the second."""
    half = x.shape[dim] // 2
    value, gate = arrange.split(b, x, dim, [half, half])
    return pointwise.combined(b, Mul(), value, aten.curve("sigmoid", b, gate))
