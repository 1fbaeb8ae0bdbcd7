"""JAX's elementwise operators: what each becomes. Keywords are parameters of the primitive."""

import math
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import (
    WEIGHTED,
    Activation,
    Add,
    AvgPool,
    Clip,
    Combine,
    Curve,
    Div,
    Elu,
    GlobalAvgPool,
    LeakyRelu,
    Maximum,
    Minimum,
    Mul,
    Power,
    Reduce,
    Relu,
    Scale,
)
from dfq_jax.io.importing import layers, pointwise
from dfq_jax.io.importing.arrange import permuted
from dfq_jax.io.importing.builder import Builder, as_float
from dfq_jax.io.importing.jax_makers import is_float, shortest
from dfq_jax.io.importing.values import Value, extent

Array = np.ndarray
NEAREST_EVEN = 1
"""The rounding method of JAX that takes halves to the even number."""


def compact(x: Any) -> Any:
    """A constant with size 1 along axes where it only repeats itself; a number where it is one."""
    if not isinstance(x, np.ndarray):
        return x
    for axis, size in enumerate(x.shape):
        if size > 1:
            first = x[(slice(None),) * axis + (slice(0, 1),)]
            x = first if x.strides[axis] == 0 or bool((x == first).all()) else x
    return shortest(x) if x.size == 1 else x


def number_of(x: Any, what: str) -> float:
    """A constant that is one number.

    Raises:
      UnsupportedModelError: if it is computed, or has several values.
    """
    found = compact(x)
    if isinstance(found, Value | np.ndarray):
        raise UnsupportedModelError(f"{what} that is not one constant number.")
    return float(found)


def made(b: Builder, x: Value) -> Node | None:
    """The node that stores a value; None for the input."""
    return next((node for node in reversed(b.nodes) if node.name == x.name), None)


def source_of(b: Builder, node: Node) -> Node | None:
    """The node whose result the first input of another one is."""
    return next((n for n in reversed(b.nodes) if n.name == node.inputs[0]), None)


def combined(op: Combine, b: Builder, x: Any, y: Any) -> Value:
    """add, sub, max, min."""
    x, y = compact(x), compact(y)
    if isinstance(op, Maximum | Minimum):
        never = -math.inf if isinstance(op, Maximum) else math.inf
        for value, other in ((x, y), (y, x)):
            if isinstance(other, float) and other == never:
                return value
    return pointwise.combined(b, op, x, y)


def biased(b: Builder, x: Value, y: Any) -> Value:
    """add of a constant right after a layer: its bias, if it is one for each output channel."""
    node, vector = made(b, x), compact(y)
    if node is None or not isinstance(node.op, WEIGHTED) or "bias" in b.params[node.name]:
        return combined(Add(), b, x, y)
    slots, at = b.params[node.name], len(x.dims) - 1
    count = slots["kernel"].shape[-1]
    if isinstance(vector, np.ndarray):
        large = [i for i, n in enumerate(vector.shape) if n > 1]
        at = large[0] + len(x.dims) - vector.ndim if len(large) == 1 else -1
    fits = at > 0 and x.axes and x.dims[at] == x.axes[-1] and extent(x.dims[at]) == count
    if not fits and not isinstance(vector, float):
        return combined(Add(), b, x, y)
    full = np.broadcast_to(np.reshape(vector, -1), count)
    b.params[node.name] = {**slots, "bias": as_float(full)}
    return x


def multiplied(b: Builder, x: Any, y: Any) -> Value:
    """mul."""
    x, y = compact(x), compact(y)
    if isinstance(x, float):
        x, y = y, x
    return times(b, x, y) if isinstance(y, float) else pointwise.combined(b, Mul(), x, y)


def divided(b: Builder, x: Any, y: Any) -> Value:
    """div."""
    x, y = compact(x), compact(y)
    if isinstance(x, Value) and isinstance(y, float) and y:
        return times(b, x, float(np.float32(1) / np.float32(y)))
    return pointwise.combined(b, Div(), x, y)


def times(b: Builder, x: Value, factor: float) -> Value:
    """A value times a number; a sum over its count is a mean again."""
    node = made(b, x)
    if node is not None and isinstance(node.op, Scale) and node.op.offset == 0:
        mean = source_of(b, node)
        pooled = mean is not None and is_mean(mean)
        if pooled and math.isclose(node.op.factor * factor, 1.0, rel_tol=1e-6):
            return Value(node.inputs[0], x.axes, x.dims)
    return pointwise.affine(b, x, factor)


def curve(name: Curve, b: Builder, x: Value) -> Value:
    """An activation without parameters."""
    return pointwise.mapped(b, Activation(name), x)


def negated(b: Builder, x: Value) -> Value:
    """neg."""
    return pointwise.affine(b, x, -1.0)


def power(b: Builder, x: Value, exponent: float) -> Value:
    """x to the power of a number."""
    return x if exponent == 1 else pointwise.mapped(b, Power(exponent), x)


def whole_power(b: Builder, x: Value, y: int) -> Value:
    """integer_pow."""
    return power(b, x, float(y))


def any_power(b: Builder, x: Any, y: Any) -> Value:
    """pow, of which one operand is a number."""
    if isinstance(y, Value):
        base = number_of(x, "a base")
        return curve("exp", b, pointwise.affine(b, y, math.log(base)))
    return power(b, x, number_of(y, "an exponent"))


def exp2(b: Builder, x: Value) -> Value:
    """exp2."""
    return curve("exp", b, pointwise.affine(b, x, math.log(2)))


def expm1(b: Builder, x: Value) -> Value:
    """expm1."""
    return pointwise.affine(b, curve("exp", b, x), 1.0, -1.0)


def log1p(b: Builder, x: Value) -> Value:
    """log1p."""
    return curve("log", b, pointwise.affine(b, x, 1.0, 1.0))


def erfc(b: Builder, x: Value) -> Value:
    """erfc: 1 + erf(-x), which is how GELU is known elsewhere."""
    return pointwise.affine(b, curve("erf", b, negated(b, x)), 1.0, 1.0)


def rounded(b: Builder, x: Value, rounding_method: Any) -> Value:
    """round."""
    if int(rounding_method) != NEAREST_EVEN:
        raise UnsupportedModelError("halves rounded away from zero; use jnp.round.")
    return curve("round", b, x)


def cast(b: Builder, x: Value, new_dtype: Any) -> Value:
    """convert_element_type between floats; everything here is float32."""
    if not is_float(new_dtype):
        raise UnsupportedModelError(f"a cast to {np.dtype(new_dtype)}, which is no float.")
    return x


def same(b: Builder, x: Value) -> Value:
    """copy, stop_gradient and their kind."""
    return x


def barrier(b: Builder, *given: Any) -> Any:
    """optimization_barrier."""
    return given if len(given) > 1 else given[0]


def clamped(b: Builder, low: Any, x: Value, high: Any) -> Value:
    """clamp."""
    return pointwise.limited(b, x, number_of(low, "a limit"), number_of(high, "a limit"))


def selected(b: Builder, which: Any, *cases: Any) -> Any:
    """select_n with a constant choice.

    Raises:
      UnsupportedModelError: if the network computes the choice.
    """
    if isinstance(which, Value) or len(cases) != 2:
        raise UnsupportedModelError(
            "a choice the network computes; only where(x > number, ...) in the forms of max, min, "
            "ReLU, leaky ReLU and ELU is understood."
        )
    no, yes = cases
    found = compact(np.asarray(which, np.float32))
    if isinstance(found, float):
        return yes if found else no
    return pointwise.chosen(b, np.asarray(which, np.bool_), yes, no)


def where_above(b: Builder, x: Value, number: Any, small: Any, large: Any) -> Value:
    """where(x > number, large, small), which equals at `number`: max, min, leaky ReLU, ELU.

    Raises:
      UnsupportedModelError: for any other.
    """
    at = number_of(number, "a limit")
    small, large = compact(small), compact(large)
    if same_value(large, x):
        found = bent(b, x, at, small)
        if found is not None:
            return found
    if large == at and limits_only(b, small, x):
        return pointwise.limited(b, small, None, at)
    if small == at and limits_only(b, large, x):
        return pointwise.limited(b, large, at, None)
    raise UnsupportedModelError(
        f"where(x > {at:g}, ...) in a form that is none of max, min, ReLU, leaky ReLU and ELU."
    )


def same_value(x: Any, y: Value) -> bool:
    """Whether two values are one tensor with the same axes."""
    return isinstance(x, Value) and x.name == y.name and x.dims == y.dims


def limits_only(b: Builder, x: Any, source: Value) -> bool:
    """Whether a value is `source`, or that with limits."""
    if same_value(x, source):
        return True
    node = made(b, x) if isinstance(x, Value) else None
    limited = node is not None and isinstance(node.op, Clip | Relu)
    return limited and node.inputs[0] == source.name and x.dims == source.dims


def bent(b: Builder, x: Value, at: float, small: Any) -> Value | None:
    """x where it is above 0, a multiple of it or of exp(x) - 1 elsewhere; None if it is neither."""
    if not isinstance(small, Value) or at != 0:
        return None
    factor, offset, node = unscaled(b, small)
    if node == x.name and offset == 0:
        return pointwise.mapped(b, LeakyRelu(factor), x)
    made_by = next((n for n in reversed(b.nodes) if n.name == node), None)
    if made_by is None or made_by.op != Activation("exp") or factor != -offset:
        return None
    limited = source_of(b, made_by)
    below = limited is not None and limited.op == Clip(None, 0.0) and limited.inputs[0] == x.name
    plain = made_by.inputs[0] == x.name
    if not below and not plain:
        return None
    return pointwise.mapped(b, Activation("elu") if factor == 1 else Elu(factor, 1.0), x)


def unscaled(b: Builder, x: Value) -> tuple[float, float, str]:
    """(factor, offset, tensor) of a value that is a multiple of a tensor with an offset."""
    factor, offset, name = 1.0, 0.0, x.name
    for node in reversed(b.nodes):
        if node.name == name and isinstance(node.op, Scale):
            offset += factor * node.op.offset
            factor, name = factor * node.op.factor, node.inputs[0]
    return factor, offset, name


def softmax(b: Builder, x: Value, axis: int, *, logarithm: bool = False) -> Value:
    """Softmax, or its logarithm, as `jax_patterns` found it."""
    return pointwise.softmax(b, x, axis, logarithm=logarithm)


def batch_norm(
    b: Builder, x: Value, like: Any, mean: Any, var: Array, scale: Any, bias: Any, eps: float
) -> Value:
    """Batch norm as `jax_norms` found it; `like` varies along the axis of channels.

    Raises:
      UnsupportedModelError: if its vectors do not have as many values as that axis.
    """
    size, rank = var.size, len(x.dims)
    axis = channel_axis(like, size, rank)
    if extent(x.dims[axis]) != size:
        raise UnsupportedModelError(
            f"a batch norm of {size} channels reads shape {x.shape}, axis {axis}."
        )
    turned = permuted(x, (0, axis, *(i for i in range(1, rank) if i != axis)))
    vectors = [evaluated(terms, size) for terms in (scale, bias, mean)]
    y = layers.batch_norm(b, turned, *vectors, var.reshape(-1).astype(np.float32), eps)
    back = [0, *range(2, rank)]
    back.insert(axis, 1)
    return permuted(y, back)


def channel_axis(like: Array, size: int, rank: int) -> int:
    """The axis along which a constant of a value's rank has `size` values; else the last one."""
    strides = zip(like.shape, like.strides, strict=True)
    axes = [i for i, (n, stride) in enumerate(strides) if n == size and stride]
    at = axes[-1] if axes else like.ndim - 1
    return at + rank - like.ndim


def evaluated(terms: tuple[Any, ...], size: int) -> Array:
    """A sum of products of constant vectors: (number, ((vector, power), ...)) each."""
    total = np.zeros(size, np.float64)
    for number, factors in terms:
        product = np.full(size, number, np.float64)
        for vector, power_of in factors:
            product *= vector.reshape(-1).astype(np.float64) ** power_of
        total += product
    return total.astype(np.float32)


def is_mean(node: Node) -> bool:
    """Whether a node takes the mean of something."""
    pool = isinstance(node.op, AvgPool | GlobalAvgPool)
    return pool or (isinstance(node.op, Reduce) and node.op.kind == "mean")
