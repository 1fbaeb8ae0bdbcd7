"""Questions about a network: who reads what, which shapes, how much work."""

import dataclasses
from collections.abc import Mapping
from math import prod
from typing import Any

import jax
from jaxtyping import Array, Float

from dfq_jax.errors import GraphError
from dfq_jax.graph.evaluate import applied
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    WEIGHTED,
    BatchNorm,
    Broadcast,
    Conv2d,
    ConvTranspose2d,
    Flatten,
    Linear,
    MatMul,
    MaxPool,
    Op,
    Pad,
    Recurrent,
    Reshape,
    Resize,
    Slice,
    Transpose,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.semantics import Slots
from dfq_jax.graph.volume_ops import Conv3d


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


def last_weighted(graph: Graph) -> tuple[str, ...]:
    """For each output the last convolution or linear layer it depends on, without repetition."""
    weighted = [n.name for n in weighted_nodes(graph)]
    found: dict[str, None] = {}
    for output in graph.outputs:
        needed = ancestors(graph, output)
        found |= dict.fromkeys([name for name in weighted if name in needed][-1:])
    return tuple(found)


def ancestors(graph: Graph, name: str) -> set[str]:
    """The tensors that `name` depends on, itself included."""
    needed = {name}
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed |= set(node.inputs)
    return needed


def constants(graph: Graph) -> frozenset[str]:
    """Tensors that do not depend on the graph's input."""
    fixed: set[str] = set()
    for node in graph.nodes:
        if all(i in fixed for i in node.inputs):
            fixed.add(node.name)
    return frozenset(fixed)


def batch_norms(graph: Graph) -> tuple[Node, ...]:
    """Batch norms, in execution order."""
    return tuple(n for n in graph.nodes if isinstance(n.op, BatchNorm))


def output_shapes(model: Model, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} for a batch of what the network reads, without computing anything.

    Raises:
      GraphError: naming the first node whose inputs do not fit it, or that leaves nothing of them.
    """
    read = [jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for x in model.inputs]
    env = dict(zip(model.graph.inputs, read, strict=True))
    for node in model.graph.nodes:
        slots = model.params.get(node.name, {})
        args = tuple(env[i] for i in node.inputs)
        try:
            out = applied.eval_shape(node.op, slots, *args)
        except (TypeError, ValueError, KeyError) as error:
            shapes = [a.shape for a in args]
            raise GraphError(
                f"node {node} cannot read inputs of shapes {shapes}: {error}"
            ) from None
        if 0 in out.shape:
            shapes = [a.shape for a in args]
            raise GraphError(f"node {node} leaves nothing of inputs of shapes {shapes}.")
        env[node.name] = out
    return {name: value.shape for name, value in env.items()}


def refusal_of_half(model: Model) -> str | None:
    """Why a network cannot read images of half its size; None if it can."""
    contract = model.contract
    height, width = contract.height // 2, contract.width // 2
    try:
        half = dataclasses.replace(contract, height=height, width=width)
        output_shapes(dataclasses.replace(model, inputs=(half,)))
    except (GraphError, ValueError) as error:
        return f"the network cannot read images of {height}x{width}, half its size ({error})"
    return None


def classes_of(model: Model) -> int:
    """How many classes a network tells apart; 0 for one that is no classifier."""
    if len(model.graph.outputs) != 1:
        return 0
    shape = output_shapes(model)[model.graph.outputs[0]]
    return shape[1] if len(shape) == 2 and shape[1] > 1 else 0


def macs(model: Model) -> dict[str, int]:
    """{layer or product of two tensors: multiply-accumulates for one image}, recurrent ones too."""
    shapes, found = output_shapes(model), {}
    for node in model.graph.nodes:
        read = [shapes[i] for i in node.inputs]
        if isinstance(node.op, WEIGHTED):
            kernel = model.params[node.name]["kernel"].shape
            found[node.name] = work(node, kernel, read[0], shapes[node.name])
        elif isinstance(node.op, MatMul):
            found[node.name] = work(node, read[1], read[0], shapes[node.name])
        elif isinstance(node.op, Recurrent):
            found[node.name] = read[0][1] * recurrent_weights(node.op, model.params[node.name])
    return found


def recurrent_weights(op: Recurrent, slots: Mapping[str, Float[Array, "..."]]) -> int:
    """How many weights each step of a recurrent layer multiplies with.

    What an LSTM keeps to itself is computed with its outputs, and counts nothing of its own.
    """
    return 0 if op.remembers else slots["input"].size + slots["state"].size


def work(node: Node, kernel: tuple[int, ...], read: tuple[int, ...], made: tuple[int, ...]) -> int:
    """Multiply-accumulates of one layer for one image.

    Args:
      node: a weighted node or a product of two tensors.
      kernel: shape of its kernel, or of its second tensor.
      read: shape of its (first) input, batch first.
      made: shape of its output.

    Returns:
      How many; padding counts as if it were computed.

    Raises:
      GraphError: for any other node.
    """
    match node.op:
        case Conv2d():
            return prod(made[1:3]) * prod(kernel)
        case Conv3d():
            return prod(made[1:4]) * prod(kernel)
        case ConvTranspose2d():
            return prod(read[1:3]) * prod(kernel)
        case Linear():
            return prod(made[1:-1]) * prod(kernel)
        case MatMul():
            return prod(made[1:]) * read[-1]
        case _:
            raise GraphError(f"node {node} multiplies nothing.")


def parameter_count(model: Model) -> int:
    """Number of stored values, batch norm statistics included."""
    return sum(x.size for slots in model.params.values() for x in slots.values())


def describe(model: Model) -> str:
    """One line a node: name, operator as far as it is unusual, output shape, what it reads."""
    shapes = output_shapes(model)
    size = lambda name: "x".join(map(str, shapes[name][1:])) or "1"
    rows = [(name, "input", size(name), "") for name in model.graph.inputs]
    rows += [
        (n.name, brief(n.op, model.params.get(n.name, {})), size(n.name), ", ".join(n.inputs))
        for n in model.graph.nodes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for *columns, read in rows:
        line = "  ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True))
        lines.append(in_line(f"{line}  <- {read}" if read else line).rstrip())
    return "\n".join([*lines, in_line(f"returns {', '.join(model.graph.outputs)}")])


def in_line(text: str) -> str:
    """Text whose line breaks and control characters are escaped: files name nodes as they like."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


PAIRS = ("strides", "padding", "dilation", "window", "size", "scale", "extra")
"""Attributes with one value for height and one for width."""


def brief(op: Op, slots: Slots) -> str:
    """An operator with its kernel's window and those of its attributes that are not the usual."""
    images = isinstance(op, Conv2d | ConvTranspose2d | Conv3d) and "kernel" in slots
    told = ["x".join(map(str, slots["kernel"].shape[:-2]))] if images else []
    for field in dataclasses.fields(op):
        value = getattr(op, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            told.append(f"{field.name}={shortened(field.name, value)}")
    return f"{type(op).__name__}({', '.join(told)})" if told else type(op).__name__


def shortened(name: str, value: Any) -> str:
    """An attribute as text; of equal numbers for height and width, one speaks for both."""
    if name == "bounds":
        ends = [("" if v in (0, None) else str(v) for v in bound[:2]) for bound in value]
        steps = ["" if bound[2] == 1 else f":{bound[2]}" for bound in value]
        return f"[{', '.join(':'.join(e) + s for e, s in zip(ends, steps, strict=True))}]"
    if name in PAIRS and all(v == value[0] for v in value):
        return shortened(name, value[0]) if isinstance(value[0], tuple) else str(value[0])
    return str(value)


def keeps_values(op: Op) -> bool:
    """Whether every output value of `op` is one of its input's values (or 0): no new scale."""
    match op:
        case MaxPool() | Flatten() | Reshape() | Transpose() | Slice() | Broadcast():
            return True
        case DepthToSpace():
            return True
        case Pad(_, value, mode):
            return value == 0 or mode != "constant"
        case Resize(method="nearest"):
            return True
        case _:
            return False
