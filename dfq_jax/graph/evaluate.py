"""Runs a graph. Fake quantization, statistics, pruning masks are hooks of this one evaluator."""

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import jax

from dfq_jax.errors import GraphError
from dfq_jax.graph.graph import Edge, Model, Node
from dfq_jax.graph.lowering import convolve_tiled
from dfq_jax.graph.ops import Conv2d
from dfq_jax.graph.semantics import Slots, Tensor, apply_op, weighted

Hook = Callable[[Node, Slots, tuple[Tensor, ...]], tuple[Slots, tuple[Tensor, ...]]]
"""Rewrites the (parameters, arguments) of a node before it is applied."""
Apply = Callable[[Node, Slots, tuple[Tensor, ...]], Tensor]
"""Computes the output of a node."""
Tap = TypeVar("Tap", bound=str | Edge)
"""What is looked at while a network runs: a tensor by its name, or what a node reads."""


def chained(*hooks: Hook) -> Hook:
    """The hook that applies some from left to right, each to what the one before left."""

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        for one in hooks:
            slots, args = one(node, slots, args)
        return slots, args

    return hook


def apply_node(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
    """The float semantics of a node."""
    return apply_op(node.op, slots, *args)


def apply_tiled(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
    """The float semantics where convolutions may be off by 1e-5: faster on CPU."""
    if isinstance(node.op, Conv2d):
        return weighted(node.op, slots, args[0], convolve_tiled)
    return apply_op(node.op, slots, *args)


def evaluate(
    model: Model,
    *inputs: Tensor,
    taps: Collection[Tap] = (),
    hook: Hook | None = None,
    apply: Apply = apply_node,
) -> tuple[tuple[Tensor, ...], dict[Tap, Tensor]]:
    """Runs a network.

    Args:
      model: the network.
      *inputs: one array per graph input, images NHWC and normalised.
      taps: what is wanted beside the outputs: tensors, inputs included, and what nodes read, as
        `hook` leaves it.
      hook: rewrites parameters and arguments of each node; build it inside the jitted function.
      apply: the semantics of a node; `quantization.integer` replaces the float ones.

    Returns:
      The graph outputs, and {tap: its value} in the order of execution.

    Raises:
      GraphError: if the number of inputs or a tap does not fit the graph.
    """
    graph = model.graph
    if len(inputs) != len(graph.inputs):
        raise GraphError(f"network has inputs {graph.inputs}, got {len(inputs)} arrays.")
    env, wanted = dict(zip(graph.inputs, inputs, strict=True)), frozenset(taps)
    tapped: dict[Any, Tensor] = {name: env[name] for name in graph.inputs if name in wanted}
    for node in graph.nodes:
        slots: Slots = model.params.get(node.name, {})
        args = tuple(env[i] for i in node.inputs)
        if hook is not None:
            slots, args = hook(node, slots, args)
        if wanted:
            edges = (Edge(node.name, index) for index in range(len(args)))
            tapped |= {e: x for e, x in zip(edges, args, strict=True) if e in wanted}
        with jax.named_scope(node.name):  # node names appear in profiles and HLO
            env[node.name] = apply(node, slots, args)
        if node.name in wanted:
            tapped[node.name] = env[node.name]
    if missing := wanted - set(tapped):
        told = ", ".join(sorted(map(str, missing)))
        raise GraphError(f"the graph has no {told}, which the caller wants to look at.")
    return tuple(env[o] for o in graph.outputs), tapped
