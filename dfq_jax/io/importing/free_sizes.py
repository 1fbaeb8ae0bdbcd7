"""One graph for inputs of any size, out of graphs for several."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dfq_jax.graph.graph import Graph
from dfq_jax.graph.ops import Op, Reshape

ArraysByNode = Mapping[str, Mapping[str, np.ndarray]]


def loosened(a: Graph, b: Graph) -> Graph | None:
    """The graph with an open axis in reshapes that differ in one; None if more is different."""
    if (a.inputs, a.outputs, len(a.nodes)) != (b.inputs, b.outputs, len(b.nodes)):
        return None
    nodes = []
    for mine, other in zip(a.nodes, b.nodes, strict=True):
        op = opened(mine.op, other.op)
        if op is None or (mine.name, mine.inputs) != (other.name, other.inputs):
            return None
        nodes.append(dataclasses.replace(mine, op=op))
    return dataclasses.replace(a, nodes=tuple(nodes))


def opened(a: Op, b: Op) -> Op | None:
    """The operator both are, a reshape with an open axis among them; None if there is none."""
    if a == b:
        return a
    if not (isinstance(a, Reshape) and isinstance(b, Reshape) and len(a.shape) == len(b.shape)):
        return None
    kept = tuple(n if n == m else -1 for n, m in zip(a.shape, b.shape, strict=True))
    return Reshape(kept) if kept.count(-1) == 1 else None


def same(a: ArraysByNode, b: ArraysByNode) -> bool:
    """Whether two sets of parameters are equal."""
    mine, other = ({(n, s): x[n][s] for n in x for s in x[n]} for x in (a, b))
    return mine.keys() == other.keys() and all(np.array_equal(mine[k], other[k]) for k in mine)
