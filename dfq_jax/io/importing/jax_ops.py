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
    Combine,
    Curve,
    Div,
    GlobalAvgPool,
    Maximum,
    Minimum,
    Mul,
    Power,
    Reduce,
    Relation,
    Scale,
)
from dfq_jax.io.importing import choices, pointwise
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


def compared(relation: Relation, b: Builder, x: Any, y: Any) -> Value | np.ndarray:
    """gt, ge, lt, le, eq."""
    return choices.compared(relation, b, compact(x), compact(y))


def selected(b: Builder, which: Any, *cases: Any) -> Any:
    """select_n of two cases.

    Raises:
      UnsupportedModelError: if there are more.
    """
    if len(cases) != 2:
        raise UnsupportedModelError(f"a choice among {len(cases)} tensors; two are supported.")
    no, yes = (compact(case) for case in cases)
    found = which if isinstance(which, Value) else compact(np.asarray(which, np.float32))
    if isinstance(found, float):
        return cases[1] if found else cases[0]
    return choices.selected(b, which, yes, no)


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


def cast(b: Builder, x: Value, new_dtype: Any) -> Value | np.ndarray:
    """convert_element_type between floats, to truths and of them; everything here is float32."""
    if np.dtype(new_dtype) == np.bool_:
        return choices.truth(b, x)
    if not is_float(new_dtype) and not choices.is_truth(b, x.name):
        raise UnsupportedModelError(f"a cast to {np.dtype(new_dtype)}, which is no float.")
    return x


def same(b: Builder, x: Value) -> Value:
    """copy, stop_gradient and their kind."""
    return x


def barrier(b: Builder, first: Any, *more: Any) -> Any:
    """optimization_barrier."""
    return (first, *more) if more else first


def clamped(b: Builder, low: Any, x: Value, high: Any) -> Value:
    """clamp."""
    return pointwise.limited(b, x, number_of(low, "a limit"), number_of(high, "a limit"))


def softmax(b: Builder, x: Value, axis: int, *, logarithm: bool = False) -> Value:
    """Softmax, or its logarithm, as `jax_patterns` found it."""
    return pointwise.softmax(b, x, axis, logarithm=logarithm)


def is_mean(node: Node) -> bool:
    """Whether a node takes the mean of something."""
    pool = isinstance(node.op, AvgPool | GlobalAvgPool)
    return pool or (isinstance(node.op, Reduce) and node.op.kind == "mean")
