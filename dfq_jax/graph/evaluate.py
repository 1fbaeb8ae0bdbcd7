"""Runs a graph. Fake quantization, statistics, pruning masks are hooks of this one evaluator."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import jax

from dfq_jax.errors import GraphError
from dfq_jax.graph.graph import Edge, Model, Node
from dfq_jax.graph.lowering import convolve_tiled
from dfq_jax.graph.ops import Conv2d
from dfq_jax.graph.semantics import Slots, Tensor, apply_op, weighted_layer

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
    return applied(node.op, slots, *args)


applied = jax.jit(apply_op, static_argnums=0, inline=True)
"""`apply_op`, traced once for each operator and shape; on arrays, one program."""


def apply_tiled(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
    """The float semantics where convolutions may be off by 1e-5: faster on CPU."""
    if isinstance(node.op, Conv2d):
        return applied_tiled(node.op, slots, args[0], convolve_tiled)
    return apply_node(node, slots, args)


applied_tiled = jax.jit(weighted_layer, static_argnums=(0, 3), inline=True)


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
    graph, wanted = model.graph, frozenset(taps)
    found: dict[Any, Tensor] = {}
    made: dict[str, Tensor] = {}
    for name, args, value in walked(model, *inputs, hook=hook, apply=apply):
        if wanted:
            edges = (Edge(name, index) for index in range(len(args)))
            found |= {e: x for e, x in zip(edges, args, strict=True) if e in wanted}
        if name in wanted:
            found[name] = value
        if name in graph.outputs:
            made[name] = value
    if missing := wanted - set(found):
        told = ", ".join(sorted(map(str, missing)))
        raise GraphError(f"the graph has no {told}, which the caller wants to look at.")
    return tuple(made[o] for o in graph.outputs), found


def walked(
    model: Model, *inputs: Tensor, hook: Hook | None = None, apply: Apply = apply_node
) -> Iterator[tuple[str, tuple[Tensor, ...], Tensor]]:
    """Runs a network step by step, its inputs first: (name of a tensor, what was read, value).

    No tensor is held for longer than others read it. See `evaluate`.
    """
    graph = model.graph
    if len(inputs) != len(graph.inputs):
        raise GraphError(f"network has inputs {graph.inputs}, got {len(inputs)} arrays.")
    env: dict[str, Tensor] = dict(zip(graph.inputs, inputs, strict=True))
    yield from ((name, (), env[name]) for name in graph.inputs)
    last = {name: node.name for node in graph.nodes for name in node.inputs}
    for node in graph.nodes:
        slots: Slots = model.params.get(node.name, {})
        args = tuple(env[i] for i in node.inputs)
        if hook is not None:
            slots, args = hook(node, slots, args)
        with jax.named_scope(node.name):  # node names appear in profiles and HLO
            value = apply(node, slots, args)
        for name in node.inputs:
            if last[name] == node.name:
                env.pop(name, None)
        env[node.name] = value
        yield node.name, args, value
