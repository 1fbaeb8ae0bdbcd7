"""Choices by the sign of a tensor: the forms of `jnp.where` that are operators of their own."""

from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Activation, Clip, Elu, LeakyRelu, Relu, Scale
from dfq_jax.io.importing import pointwise
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.jax_ops import compact, made, number_of, source_of
from dfq_jax.io.importing.values import Value


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
    if node is None or not isinstance(node.op, Clip | Relu):
        return False
    return node.inputs[0] == source.name and x.dims == source.dims


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
