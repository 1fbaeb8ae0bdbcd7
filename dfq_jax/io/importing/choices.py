"""Comparisons, what is true or not, and choices: `where(x > number, a, b)` as the activation it is.

A truth is 1 where it holds and 0 elsewhere.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import (
    Activation,
    Broadcast,
    Clip,
    Compare,
    Constant,
    Elu,
    Flatten,
    LeakyRelu,
    Maximum,
    Mul,
    Relation,
    Relu,
    Reshape,
    Scale,
    Slice,
    Sub,
    Transpose,
)
from dfq_jax.graph.token_ops import Embed, Present
from dfq_jax.io.importing import one_hot, pointwise
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.pointwise import Number, Operand
from dfq_jax.io.importing.values import Value, extent

KEEPS_TRUTH = (Broadcast, Flatten, Maximum, Mul, Reshape, Slice, Transpose)
"""Operators whose results are zeros and ones where all that they read is."""
STRAIGHT = 15.0
"""Where log(1 + exp(x)) is x in float32."""


class Test(NamedTuple):
    """`x > number`, or `x < number`; what happens at equality does not matter to its users."""

    x: Value
    number: float
    above: bool


def compared(relation: Relation, b: Builder, x: Operand, other: Operand) -> Value | np.ndarray:
    """Where a relation holds; a constant where that does not depend on the image.

    Masks of infinity are finite here, so nothing equals it, and nothing is no number.
    """
    if (found := of_ids(relation, b, x, other)) is not None:
        return found
    if isinstance(x, Value) and isinstance(other, Value) and same(x, other):
        return np.broadcast_to(np.bool_("equal" in relation), x.shape)
    for value, limit in ((x, other), (other, x)):
        if isinstance(value, Value) and relation == "equal" and endless(limit):
            return np.broadcast_to(np.False_, value.shape)
    if (found := of_truth(relation, b, x, other)) is not None:
        return found
    for value, number in ((x, other), (other, x)):
        if relation == "equal" and isinstance(value, Value) and is_truth(b, value.name):
            neither(number)
    return pointwise.combined(b, Compare(relation), x, other)


def of_truth(
    relation: Relation, b: Builder, x: Operand, other: Operand
) -> Value | np.ndarray | None:
    """Where a truth is 0 or 1, as masks are asked; None for other questions."""
    number = pointwise.plain(other)
    if relation != "equal" or not isinstance(x, Value) or isinstance(number, Value | np.ndarray):
        return None
    if number not in (0, 1) or not is_truth(b, x.name):
        return None
    return x if number == 1 else opposite(b, x)


def neither(numbers: Operand) -> None:
    """Refuses to compare zeros and ones with other numbers: more was read than a mask.

    Raises:
      UnsupportedModelError: if a constant holds any.
    """
    if not isinstance(numbers, Value) and not np.isin(numbers, (0, 1)).all():
        raise UnsupportedModelError(
            "what was taken for a mask is compared with other numbers than 0 and 1: the network "
            "reads whole numbers that look up no table. Let it read them as floats."
        )


def of_ids(relation: Relation, b: Builder, x: Operand, other: Operand) -> Value | np.ndarray | None:
    """Where ids of tokens are, or differ from, one number; None if none are compared with one.

    Raises:
      UnsupportedModelError: for another comparison.
    """
    for ids, number in ((x, other), (other, x)):
        if isinstance(ids, Value) and ids.name in b.ids:
            number = pointwise.plain(number)
            if relation == "equal" and isinstance(number, np.ndarray):
                found = one_hot.compared_with_all(b, ids, number)
                if found is not None:
                    return found
            if relation != "equal" or isinstance(number, Value | np.ndarray):
                raise UnsupportedModelError("ids of tokens compared with more than one number.")
            return opposite(b, pointwise.mapped(b, Present(int(number)), ids))
    return None


def unequal(b: Builder, x: Operand, other: Operand) -> Value | np.ndarray:
    """Where two tensors differ."""
    return opposite(b, compared("equal", b, x, other))


def endless(x: Any) -> bool:
    """Whether a constant is infinite everywhere."""
    return not isinstance(x, Value) and bool(np.all(np.isinf(x)))


def opposite(b: Builder, x: Value | np.ndarray) -> Value | np.ndarray:
    """Where something does not hold."""
    if not isinstance(x, Value):
        return np.logical_not(x)
    factor, offset, source = unscaled(b, x.name)
    if (factor, offset) == (-1.0, 1.0):
        return Value(source, x.axes, x.dims)
    return pointwise.affine(b, x, -1.0, 1.0)


def either(b: Builder, x: Operand, other: Operand) -> Value:
    """Where one of two truths holds, or both."""
    return pointwise.combined(b, Maximum(), x, other)


def both(b: Builder, x: Operand, other: Operand) -> Value:
    """Where two truths hold."""
    return pointwise.combined(b, Mul(), x, other)


def sign(b: Builder, x: Value) -> Value:
    """1 where values are positive, -1 where they are negative."""
    sides = (pointwise.combined(b, Compare(r), x, 0.0) for r in ("greater", "less"))
    return pointwise.combined(b, Sub(), *sides)


def truth(b: Builder, x: Value) -> Value | np.ndarray:
    """Where values are not 0."""
    if x.name in b.ids:
        return pointwise.mapped(b, Present(), x)
    return x if is_truth(b, x.name) else unequal(b, x, 0.0)


def is_truth(b: Builder, name: str) -> bool:
    """Whether a tensor is known to hold zeros and ones."""
    return holds_truths(b.maker, b.params, name)


def holds_truths(
    maker: Callable[[str], Node | None], params: Mapping[str, Mapping[str, np.ndarray]], name: str
) -> bool:
    """Whether a tensor is known to hold zeros and ones.

    Args:
      maker: of a tensor's name its node, None for what the network is fed.
      params: by node and slot.
      name: of the tensor.
    """
    factor, offset, name = before_scales(maker, name)
    node = maker(name)
    if node is None or (factor, offset) not in ((1.0, 0.0), (-1.0, 1.0)):
        return False
    if isinstance(node.op, KEEPS_TRUTH):
        return all(holds_truths(maker, params, source) for source in node.inputs)
    if isinstance(node.op, Constant):
        return bool(np.isin(params[name]["value"], (0, 1)).all())
    if isinstance(node.op, Embed):
        return one_hot.is_eye(params[name]["table"])
    return isinstance(node.op, Compare | Present)


def selected(b: Builder, which: Operand, x: Operand, y: Operand) -> Value:
    """`x` where a truth holds, `y` elsewhere: an activation if it is one, else a choice."""
    if not isinstance(which, Value) and hides(x, y):
        which = pointwise.as_value(b, np.asarray(which).astype(np.float32))
        return pointwise.selected(b, which, x, y)
    if not isinstance(which, Value):
        return pointwise.chosen(b, np.asarray(which).astype(np.bool_), x, y)
    test = tested(b, which)
    if test is not None:
        small, large = (pointwise.plain(v) for v in ((y, x) if test.above else (x, y)))
        found = bent(b, test, small, large) or limited(b, test, small, large)
        if found is not None:
            return found
    return pointwise.selected(b, which, x, y)


def hides(x: Operand, y: Operand) -> bool:
    """Whether one of two operands is a number that stands for what is not attended to."""
    found = [pointwise.plain(v) for v in (x, y)]
    return any(not isinstance(v, Value | np.ndarray) and v <= pointwise.HIDES for v in found)


def tested(b: Builder, which: Value) -> Test | None:
    """The comparison with a number that a truth comes from; None if it is something else."""
    node = b.maker(which.name)
    if node is None or not isinstance(node.op, Compare) or node.op.relation == "equal":
        return None
    number = b.params.get(node.inputs[1], {}).get("value")
    if number is None or number.size != 1:
        return None
    x = Value(node.inputs[0], which.axes, which.dims)
    return Test(x, float(number.reshape(())), node.op.relation.startswith("greater"))


def same(x: Any, y: Value) -> bool:
    """Whether two values are one tensor with the same axes."""
    return isinstance(x, Value) and x.name == y.name and x.dims == y.dims


def limited(b: Builder, test: Test, small: Operand, large: Operand) -> Value | None:
    """max and min with the number, of the tensor or of that with limits; else None."""
    if isinstance(small, Value) and is_number(large, test.number):
        return pointwise.limited(b, small, None, large) if only_limits(b, small, test.x) else None
    if isinstance(large, Value) and is_number(small, test.number):
        return pointwise.limited(b, large, small, None) if only_limits(b, large, test.x) else None
    return None


def is_number(x: Operand, number: float) -> TypeGuard[Number]:
    """Whether an operand is this number, in float32."""
    return not isinstance(x, Value | np.ndarray) and float(np.float32(x)) == number


def only_limits(b: Builder, x: Value, source: Value) -> bool:
    """Whether a value is `source`, or that with limits."""
    if same(x, source):
        return True
    node = b.maker(x.name)
    if node is None or not isinstance(node.op, Clip | Relu):
        return False
    return node.inputs[0] == source.name and x.dims == source.dims


def bent(b: Builder, test: Test, small: Operand, large: Operand) -> Value | None:
    """Leaky and parametric ReLU, ELU, softplus: what is straight above the number; else None."""
    if not isinstance(small, Value) or not isinstance(large, Value):
        return None
    if test.number >= STRAIGHT:
        return softplus(b, test.x, small, large)
    if test.number != 0 or not same(large, test.x):
        return None
    factor, offset, name = unscaled(b, small.name)
    if name == test.x.name:
        return pointwise.mapped(b, LeakyRelu(factor), test.x) if offset == 0 else None
    return parametric(b, test.x, small) or exponential(b, test.x, factor, offset, name)


def parametric(b: Builder, x: Value, small: Value) -> Value | None:
    """x where it is positive, elsewhere times a slope for each channel; None if it is not."""
    node = b.maker(small.name)
    if node is None or not isinstance(node.op, Mul) or node.inputs[0] != x.name or not x.dims[1:]:
        return None
    slopes = b.params.get(node.inputs[1], {}).get("value")
    channels = (1, *(extent(axis) if axis == x.dims[1] else 1 for axis in x.axes))
    if slopes is None or slopes.shape != channels:
        return None
    return pointwise.parametric_relu(b, x, slopes.reshape(-1))


def exponential(b: Builder, x: Value, factor: float, offset: float, name: str) -> Value | None:
    """x where it is positive, a multiple of exp(rate x) - 1 elsewhere; None if it is not."""
    made = b.maker(name)
    if made is None or made.op != Activation("exp") or factor != -offset:
        return None
    inside = made.inputs[0]
    limit = b.maker(inside)
    if limit is not None and limit.op == Clip(None, 0.0) and limit.inputs[0] == x.name:
        inside = x.name
    rate, shift, source = unscaled(b, inside)
    if source != x.name or shift != 0:
        return None
    if rate == 1:
        return pointwise.mapped(b, Activation("elu") if factor == 1 else Elu(factor, 1.0), x)
    return pointwise.exponential_linear(b, x, factor, 1.0, rate)


def softplus(b: Builder, x: Value, small: Value, large: Value) -> Value | None:
    """log(1 + exp(x)) / beta, straight where x is large; None if it is something else."""
    factor, offset, name = unscaled(b, small.name)
    logarithm = b.maker(name)
    if logarithm is None or logarithm.op != Activation("log") or offset != 0:
        return None
    power = unscaled(b, logarithm.inputs[0])
    made = b.maker(power[2])
    if power[:2] != (1.0, 1.0) or made is None or made.op != Activation("exp"):
        return None
    rate, shift, source = unscaled(b, x.name)
    scaled = (shift, source) == (0.0, large.name) and abs(rate * factor - 1) < 1e-6
    if made.inputs[0] != x.name or not (scaled or (factor == 1 and same(large, x))):
        return None
    return pointwise.affine(b, pointwise.mapped(b, Activation("softplus"), x), factor)


def unscaled(b: Builder, x: str) -> tuple[float, float, str]:
    """(factor, offset, tensor) of a tensor that is a multiple of another with an offset."""
    return before_scales(b.maker, x)


def before_scales(maker: Callable[[str], Node | None], x: str) -> tuple[float, float, str]:
    """The same, where `maker` knows the node of every tensor."""
    factor, offset = 1.0, 0.0
    while (node := maker(x)) is not None and isinstance(node.op, Scale):
        offset += factor * node.op.offset
        factor, x = factor * node.op.factor, node.inputs[0]
    return factor, offset, x
