"""One graph for inputs of any size, out of graphs for several."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from dfq_jax.graph.graph import Graph
from dfq_jax.graph.ops import Op, Reshape, Resize

ArraysByNode = Mapping[str, Mapping[str, np.ndarray]]


def loosened(a: Graph, b: Graph) -> Graph | None:
    """The graph with open sizes in reshapes and resizes that differ; None if more is different."""
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
    """The operator both are, its sizes open where they differ; None if there is none."""
    if a == b:
        return a
    if isinstance(a, Resize) and isinstance(b, Resize):
        mine, other = (dataclasses.replace(op, size=None) for op in (a, b))
        return mine if mine == other and all(map(is_exact, a.scale)) else None
    if not (isinstance(a, Reshape) and isinstance(b, Reshape) and len(a.shape) == len(b.shape)):
        return None
    kept = tuple(n if n == m else -1 for n, m in zip(a.shape, b.shape, strict=True))
    return Reshape(kept) if kept.count(-1) == 1 else None


def is_exact(scale: float) -> bool:
    """Whether sizes times a scale are the same in any precision: it is whole, or a power of 2."""
    return (scale >= 1 and scale == int(scale)) or math.frexp(scale)[0] == 0.5


def same(a: ArraysByNode, b: ArraysByNode) -> bool:
    """Whether two sets of parameters are equal."""
    mine, other = ({(n, s): x[n][s] for n in x for s in x[n]} for x in (a, b))
    return mine.keys() == other.keys() and all(np.array_equal(mine[k], other[k]) for k in mine)
