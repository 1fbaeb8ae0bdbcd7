"""Ranges of tensors that follow from batch-norm statistics, constants and the operators alone.

As of moments: of a network with parameters of NumPy they are found in NumPy.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    Clip,
    Concat,
    Constant,
    Elu,
    GlobalAvgPool,
    LeakyRelu,
    Maximum,
    Minimum,
    Mul,
    Op,
    Pointwise,
    PRelu,
    Reduce,
    Relu,
    Resize,
    Scale,
    Softmax,
)
from dfq_jax.graph.query import constants, keeps_values
from dfq_jax.graph.semantics import Slots, pointwise
from dfq_jax.numerics.affine import NumpyOrJax, namespace
from dfq_jax.numerics.gaussian import normal_range
from dfq_jax.passes.moments import expected_moments
from dfq_jax.types import Moments

TensorRange = tuple[Float[NumpyOrJax, ""], Float[NumpyOrJax, ""]]
Ends = tuple[Float[NumpyOrJax, "..."], Float[NumpyOrJax, "..."]]
"""A range, or one of each channel."""

SAMPLES = 1025
"""Points at which a curve is looked at to bound it."""


def expected_ranges(
    model: Model, *, sigmas: float = 6.0, known: Mapping[str, Moments] | None = None
) -> dict[str, TensorRange]:
    """{tensor: (lo, hi)} that batch-norm statistics predict, `mean -/+ sigmas * std` at the widest.

    A function of each element alone takes the range of its input through its curve, channel by
    channel where slopes differ by channel; operators that
    make no new values keep it; sums and means use the moments of their results, means without
    moments the range of what they average; joined tensors have the union; a tensor times a gate in
    [0, 1] has the range of the tensor. Softmax, sigmoids, tanh and constants need no statistics.

    Args:
      model: folded network with moments.
      sigmas: how many standard deviations to cover.
      known: its `expected_moments`, where they have been found.

    Returns:
      Ranges of all tensors that something is known about.

    Reference:
      Nagel et al. 2019, section 5 (n = 6).
    """
    graph, known = model.graph, expected_moments(model) if known is None else known
    rectified, tame = nonnegative(graph), constants(graph) | gates(graph)
    low, high = map(np.float32, model.input.value_range)
    ranges: dict[str, TensorRange] = dict.fromkeys(graph.inputs, (low, high))
    for node in graph.nodes:
        read = [ranges.get(i) for i in node.inputs]
        slots = model.params.get(node.name, {})
        if isinstance(node.op, PRelu) and node.inputs[0] in known and read[0] is not None:
            each = channel_ranges(known[node.inputs[0]], sigmas, read[0])
            found = curve_range(node.op, slots, each)
        else:
            found = bounds(node.op, read, slots, any(i in tame for i in node.inputs))
        if found is None and node.name in known:
            found = normal_range(known[node.name], sigmas, rectified=node.name in rectified)
        if found is None and averages(node.op):
            found = read[0]
        if found is not None:
            ranges[node.name] = found
    return {name: found for name, found in ranges.items() if name not in graph.inputs}


def bounds(op: Op, read: list[TensorRange | None], slots: Slots, tame: bool) -> TensorRange | None:
    """The range an operator imposes, or takes over from what it reads.

    Args:
      op: the operator.
      read: range of each input, None where unknown.
      slots: its parameters.
      tame: whether one of its inputs is a constant or a gate.
    """
    zero, one = np.float32(0), np.float32(1)
    source = read[0] if read else None
    match op:
        case Constant():
            return slots["value"].min(), slots["value"].max()
        case Softmax() | Activation("sigmoid" | "hard_sigmoid"):
            return zero, one
        case Activation("tanh"):
            return -one, one
        case Relu(ceiling) if source is not None:
            return source[0].clip(0.0, ceiling), source[1].clip(0.0, ceiling)
        case LeakyRelu() | PRelu() | Clip() | Elu() | Scale() | Activation() if source is not None:
            return curve_range(op, slots, source)
        case Concat():
            return union(read)
        case Mul() if tame:
            return product_range(read)
        case _:
            return source if keeps_values(op) else None


def channel_ranges(moments: Moments, sigmas: float, whole: TensorRange) -> Ends:
    """The range of each channel, within that of the tensor.

    Slopes differ by channel: the steepest one seldom meets the widest channel.
    """
    deviations = sigmas * namespace(*moments).sqrt(moments.var)
    ends = moments.mean - deviations, moments.mean + deviations
    return ends[0].clip(*whole), ends[1].clip(*whole)


def curve_range(op: Pointwise, slots: Slots, source: Ends) -> TensorRange | None:
    """Smallest and largest value of a curve over a range, or over one of each channel."""
    if isinstance(op, Activation) and op.curve in ("exp", "sqrt", "log"):
        return None
    found = ends_of_curve(op, slots, source)
    return jax.device_get(found) if namespace(*source) is np else found


@partial(jax.jit, static_argnames="op")
def ends_of_curve(op: Pointwise, slots: Slots, source: Ends) -> TensorRange:
    """`curve_range` of arrays of JAX."""
    points = jnp.linspace(*source, SAMPLES).reshape(SAMPLES, -1)
    values = pointwise(op, slots, points)
    return jnp.min(values), jnp.max(values)


def union(ranges: list[TensorRange | None]) -> TensorRange | None:
    """The range that covers all, None if one is unknown."""
    known = [r for r in ranges if r is not None]
    if len(known) < len(ranges):
        return None
    lows, highs = zip(*known, strict=True)
    xp = namespace(*lows, *highs)
    return xp.stack(lows).min(), xp.stack(highs).max()


def product_range(read: list[TensorRange | None]) -> TensorRange | None:
    """The range of a product of two tensors, None if one is unknown."""
    a, b = read
    if a is None or b is None:
        return None
    ends = namespace(*a, *b).stack([x * y for x in a for y in b])
    return ends.min(), ends.max()


def averages(op: Op) -> bool:
    """Whether results lie between the values read."""
    match op:
        case AvgPool() | AdaptiveAvgPool() | GlobalAvgPool() | Reduce("mean" | "max"):
            return True
        case Resize(method=method):
            return method != "bicubic"  # which overshoots
        case _:
            return False


def gates(graph: Graph) -> frozenset[str]:
    """Tensors known to lie in [0, 1]: behind a sigmoid or softmax, moved or averaged."""
    found: set[str] = set()
    for node in graph.nodes:
        match node.op:
            case Softmax() | Activation("sigmoid" | "hard_sigmoid"):
                found.add(node.name)
            case op if (keeps_values(op) or averages(op)) and node.inputs[0] in found:
                found.add(node.name)
            case _:
                pass
    return frozenset(found)


def nonnegative(graph: Graph) -> frozenset[str]:
    """Tensors that the operators before them keep from being negative."""
    found: set[str] = set(gates(graph))
    for node in graph.nodes:
        inherited = all(i in found for i in node.inputs) and bool(node.inputs)
        match node.op:
            case Relu() | Activation("softplus" | "exp" | "sqrt" | "abs"):
                found.add(node.name)
            case Clip(low) if low is not None and low >= 0:
                found.add(node.name)
            case (
                Add() | Mul() | Concat() | Maximum() | Minimum() | Clip() | PRelu() | LeakyRelu()
            ) if inherited:
                found.add(node.name)
            case op if inherited and (keeps_values(op) or averages(op)):
                found.add(node.name)
            case _:
                pass
    return frozenset(found)
