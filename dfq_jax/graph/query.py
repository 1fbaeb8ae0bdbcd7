"""Questions about a network: who reads what, which shapes, how much work."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dfq_jax.errors import GraphError
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import WEIGHTED, BatchNorm, Conv2d, Linear
from dfq_jax.graph.semantics import apply_op


def consumers(graph: Graph) -> dict[str, tuple[tuple[Node, int], ...]]:
    """{tensor: ((node, argument index), ...)} for every tensor, unread ones included."""
    found: dict[str, list[tuple[Node, int]]] = {n: [] for n in graph.inputs}
    for node in graph.nodes:
        found[node.name] = []
        for index, source in enumerate(node.inputs):
            found[source].append((node, index))
    return {name: tuple(readers) for name, readers in found.items()}


def only_consumer(graph: Graph, readers: Mapping[str, tuple], name: str) -> Node | None:
    """The single node reading `name`, or None if several do or the graph returns it."""
    if name in graph.outputs or len(readers[name]) != 1:
        return None
    return readers[name][0][0]


def weighted_nodes(graph: Graph) -> tuple[Node, ...]:
    """Convolutions and linear layers, in execution order."""
    return tuple(n for n in graph.nodes if isinstance(n.op, WEIGHTED))


def batch_norms(graph: Graph) -> tuple[Node, ...]:
    """Batch norms, in execution order."""
    return tuple(n for n in graph.nodes if isinstance(n.op, BatchNorm))


def output_shapes(model: Model, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} for a batch of the contract's images, without computing anything.

    Raises:
      GraphError: naming the first node whose inputs do not fit it.
    """
    image = jax.ShapeDtypeStruct((batch, *model.contract.shape), jnp.float32)
    env = dict.fromkeys(model.graph.inputs, image)
    for node in model.graph.nodes:
        slots = model.params.get(node.name, {})
        args = tuple(env[i] for i in node.inputs)
        try:
            out = jax.eval_shape(lambda p, xs, op=node.op: apply_op(op, p, *xs), slots, args)
        except (TypeError, ValueError, KeyError) as error:
            shapes = [a.shape for a in args]
            raise GraphError(
                f"node {node} cannot read inputs of shapes {shapes}: {error}"
            ) from None
        env[node.name] = out
    return {name: value.shape for name, value in env.items()}


def macs(model: Model) -> dict[str, int]:
    """{weighted node: multiply-accumulates for one image}."""
    shapes = output_shapes(model)
    return {
        n.name: work(n, model.params[n.name]["kernel"].shape, shapes[n.name])
        for n in weighted_nodes(model.graph)
    }


def work(node: Node, kernel: tuple[int, ...], output: tuple[int, ...]) -> int:
    """Multiply-accumulates of one weighted node."""
    match node.op:
        case Conv2d():
            kh, kw, cin, cout = kernel
            return output[1] * output[2] * cout * cin * kh * kw
        case Linear():
            positions = 1
            for size in output[1:-1]:
                positions *= size
            return positions * kernel[0] * kernel[1]
        case _:
            raise GraphError(f"node {node} has no kernel.")


def parameter_count(model: Model) -> int:
    """Number of stored values, batch norm statistics included."""
    return sum(x.size for slots in model.params.values() for x in slots.values())


def describe(model: Model) -> str:
    """One line a node: name, operator, inputs and output shape."""
    shapes = output_shapes(model)
    size = lambda name: "x".join(map(str, shapes[name][1:]))
    lines = [f"{name}: input {size(name)}" for name in model.graph.inputs]
    lines += [f"{n} : {size(n.name)}" for n in model.graph.nodes]
    return "\n".join([*lines, f"returns {', '.join(model.graph.outputs)}"])
