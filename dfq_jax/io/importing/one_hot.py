"""Ids of tokens compared with every id that there is: rows of ones and zeros, looked up.

Files of JAX and TensorFlow have `ids == [0, 1, 2, ...]`, PyTorch and ONNX an operator. What a layer
makes of such rows are rows of its kernel.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import Broadcast, Linear, Reshape
from dfq_jax.graph.token_ops import Embed
from dfq_jax.io.importing.arrange import unsqueezed
from dfq_jax.io.importing.builder import Builder, HostSlots
from dfq_jax.io.importing.gathers import looked_up
from dfq_jax.io.importing.values import Value

MOST = 8192
"""Ids whose rows of ones and zeros are made."""


def counted(numbers: np.ndarray) -> int | None:
    """Along which axis a constant counts 0, 1, 2, ... and along no other; None if it does not."""
    long = [axis for axis, n in enumerate(numbers.shape) if n > 1]
    for axis in long:
        size = numbers.shape[axis]
        line = np.arange(size).reshape([size if a == axis else 1 for a in range(numbers.ndim)])
        if size > 2 and np.array_equal(numbers, np.broadcast_to(line, numbers.shape)):
            return axis
    return None


def compared_with_all(b: Builder, ids: Value, numbers: np.ndarray) -> Value | None:
    """Where ids equal each of the numbers 0, 1, 2, ... along an axis; None for other numbers.

    Args:
      b: the graph.
      ids: of tokens, of size 1 along that axis, or repeated along it.
      numbers: a constant that fits them.

    Raises:
      UnsupportedModelError: if there are too many.
    """
    numbers = numbers.reshape(*(1,) * (len(ids.dims) - numbers.ndim), *numbers.shape)
    axis = counted(numbers) if numbers.ndim == len(ids.dims) else None
    once = None if axis is None else unrepeated(b, ids, axis)
    if axis is None or once is None:
        return None
    return one_hot(b, once, numbers.shape[axis], axis)


def unrepeated(b: Builder, x: Value, axis: int) -> Value | None:
    """The value before it was repeated along one axis and no other; None if it was not."""
    if x.shape[axis] == 1:
        return x
    node = b.maker(x.name)
    before = None if node is None else b.maker(node.inputs[0])
    if node is None or before is None or not isinstance(before.op, Reshape):
        return None
    if not isinstance(node.op, Broadcast) or x.axes[0] != x.dims[axis]:
        return None
    if before.op.shape != (1, *node.op.shape[1:]):
        return None
    dims = tuple(() if i == axis else dim for i, dim in enumerate(x.dims))
    return Value(before.inputs[0], x.axes[1:], dims)


def one_hot(b: Builder, ids: Value, count: int, axis: int) -> Value:
    """A row of zeros for each of some ids, with a one at its number.

    Args:
      b: the graph.
      ids: of tokens.
      count: how many ids there are.
      axis: which of `ids`, of size 1, the row takes the place of.

    Raises:
      UnsupportedModelError: if the network computes the numbers, or there are too many.
    """
    if not 2 <= count <= MOST:
        raise UnsupportedModelError(f"{count} numbers of which one is 1; up to {MOST} are read.")
    found = looked_up(b, np.eye(count, dtype=np.float32), ids)
    dims, row = found.dims[:-1], found.dims[-1]
    return Value(found.name, found.axes, tuple(row if i == axis else d for i, d in enumerate(dims)))


def marked(b: Builder, ids: Value, count: int, axis: int = -1) -> Value:
    """A new axis with a row of zeros and a one for each id."""
    rank = len(ids.dims) + 1
    return one_hot(b, unsqueezed(ids, axis % rank), count, axis % rank)


def of_pytorch(b: Builder, x: Value, num_classes: int = -1) -> Value:
    """one_hot: as long as is said."""
    if num_classes < 0:
        raise UnsupportedModelError(
            "one_hot of as many classes as the largest id asks for; state num_classes."
        )
    return marked(b, x, num_classes)


def tables_of_one_hot(
    graph: Graph, params: Mapping[str, HostSlots]
) -> tuple[Graph, dict[str, HostSlots]]:
    """Kernels of layers that read rows of zeros and a one, looked up in their place."""
    made, by_name = dict(params), graph.by_name
    nodes = []
    for node in graph.nodes:
        rows = by_name.get(node.inputs[0]) if isinstance(node.op, Linear) else None
        if rows is not None and rows.op == Embed() and is_eye(made[rows.name]["table"]):
            slots = made[node.name]
            made[node.name] = {"table": slots["kernel"] + slots.get("bias", np.float32(0))}
            node = Node(node.name, Embed(), rows.inputs)
        nodes.append(node)
    return dataclasses.replace(graph, nodes=tuple(nodes)), made


def is_eye(table: np.ndarray) -> bool:
    """Whether row i of a table has a one at i and zeros elsewhere."""
    square = table.shape[0] == table.shape[1]
    return square and np.array_equal(table, np.eye(len(table), dtype=table.dtype))
