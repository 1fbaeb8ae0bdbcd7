"""Runs a graph. Fake quantization, statistics, pruning masks are hooks of this one evaluator."""

from collections.abc import Callable, Collection, Mapping
from typing import assert_never

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from dfq_jax.errors import GraphError
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.lowering import convolve
from dfq_jax.graph.ops import (
    Add,
    AvgPool,
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Op,
    Pad,
    Pads,
    Pair,
    Relu,
    Slice,
)

Tensor = Shaped[Array, "..."]
Slots = Mapping[str, Tensor]
Hook = Callable[[Node, Slots, tuple[Tensor, ...]], tuple[Slots, tuple[Tensor, ...]]]
"""Rewrites the (parameters, arguments) of a node before it is applied."""
Apply = Callable[[Node, Slots, tuple[Tensor, ...]], Tensor]
"""Computes the output of a node."""


def apply_node(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
    """The float semantics of a node."""
    return apply_op(node.op, slots, *args)


def evaluate(
    model: Model,
    *inputs: Tensor,
    taps: Collection[str] = (),
    hook: Hook | None = None,
    apply: Apply = apply_node,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Runs a network.

    Args:
      model: the network.
      *inputs: one array per graph input, images NHWC and normalised.
      taps: names of nodes whose first argument is wanted (after `hook`), e.g. batch norms.
      hook: rewrites parameters and arguments of each node; build it inside the jitted function.
      apply: the semantics of a node; `quantize.integer` replaces the float ones.

    Returns:
      The graph outputs, and {tap: first argument of that node}.

    Raises:
      GraphError: if the number of inputs or a tap's name does not fit the graph.
    """
    graph = model.graph
    if len(inputs) != len(graph.inputs):
        raise GraphError(f"network has inputs {graph.inputs}, got {len(inputs)} arrays.")
    env, tapped = dict(zip(graph.inputs, inputs, strict=True)), {}
    for node in graph.nodes:
        slots: Slots = model.params.get(node.name, {})
        args = tuple(env[i] for i in node.inputs)
        if hook is not None:
            slots, args = hook(node, slots, args)
        if node.name in taps:
            tapped[node.name] = args[0]
        with jax.named_scope(node.name):  # node names appear in profiles and HLO
            env[node.name] = apply(node, slots, args)
    if missing := set(taps) - set(tapped):
        raise GraphError(f"taps {sorted(missing)} name no node of this graph.")
    return tuple(env[o] for o in graph.outputs), tapped


def apply_op(op: Op, p: Slots, *xs: Tensor) -> Tensor:  # noqa: C901 - one case per operator
    """The float semantics of every operator, on NHWC arrays."""
    match op:
        case Conv2d():
            return add_bias(convolve(xs[0], p["kernel"], op), p)
        case Linear():
            return add_bias(xs[0] @ p["kernel"], p)
        case BatchNorm():
            return batch_norm(op, p, xs[0])
        case Relu(ceiling):
            return jnp.clip(xs[0], 0.0, ceiling)
        case Add():
            return xs[0] + xs[1]
        case MaxPool(window, strides, padding):
            return pool(xs[0], -jnp.inf, lax.max, window, strides, padding)
        case AvgPool():
            return average_pool(op, xs[0])
        case GlobalAvgPool():
            return jnp.mean(xs[0], axis=(1, 2))
        case Flatten():
            return xs[0].reshape(xs[0].shape[0], -1)
        case Slice(bounds):
            return xs[0][tuple(slice(*b) for b in bounds)]
        case Pad(widths, value):
            return jnp.pad(xs[0], widths, constant_values=value)
        case _:
            assert_never(op)


def add_bias(x: Tensor, p: Slots) -> Tensor:
    """`x + bias` where the node has one."""
    return x + p["bias"] if "bias" in p else x


def batch_norm(op: BatchNorm, p: Slots, x: Tensor) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * scale + bias` as one multiply-add per element."""
    gain = lax.rsqrt(p["var"] + op.eps)
    if "scale" in p:
        gain = gain * p["scale"]
    shift = -p["mean"] * gain
    return x * gain + (shift + p["bias"] if "bias" in p else shift)


def pool(
    x: Tensor, start: float, combine: Callable, window: Pair, strides: Pair, padding: Pads
) -> Tensor:
    """Reduction over spatial windows."""
    return lax.reduce_window(
        x, start, combine, (1, *window, 1), (1, *strides, 1), ((0, 0), *padding, (0, 0))
    )


def average_pool(op: AvgPool, x: Tensor) -> Tensor:
    """Mean over windows, dividing by the window or by the pixels actually covered."""
    total = pool(x, 0.0, lax.add, op.window, op.strides, op.padding)
    if op.count_padding:
        return total / (op.window[0] * op.window[1])
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / pool(ones, 0.0, lax.add, op.window, op.strides, op.padding)
