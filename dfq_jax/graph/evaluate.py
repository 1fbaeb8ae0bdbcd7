"""Runs a graph. Fake quantization, statistics, pruning masks are hooks of this one evaluator."""

from collections.abc import Callable, Collection

import jax

from dfq_jax.errors import GraphError
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.lowering import convolve_tiled
from dfq_jax.graph.ops import Conv2d
from dfq_jax.graph.semantics import Slots, Tensor, apply_op, weighted

Hook = Callable[[Node, Slots, tuple[Tensor, ...]], tuple[Slots, tuple[Tensor, ...]]]
"""Rewrites the (parameters, arguments) of a node before it is applied."""
Apply = Callable[[Node, Slots, tuple[Tensor, ...]], Tensor]
"""Computes the output of a node."""


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


def values_at(
    model: Model,
    images: Tensor,
    names: Collection[str],
    *,
    hook: Hook | None = None,
    apply: Apply = apply_node,
) -> dict[str, Tensor]:
    """{node: its output} for some nodes, in execution order; otherwise as `evaluate`."""
    kept: dict[str, Tensor] = {}

    def keep(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
        out = apply(node, slots, args)
        if node.name in names:
            kept[node.name] = out
        return out

    evaluate(model, images, hook=hook, apply=keep)
    return kept
