"""Padding of height and width that the windows behind it can do themselves."""

import dataclasses
import math
from collections.abc import Iterable

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import Conv2d, MaxPool, Pad
from dfq_jax.graph.query import consumers
from dfq_jax.graph.rewrite import bypass


def pads_into_windows(graph: Graph) -> Graph:
    """Padding of height and width becomes that of what alone reads it.

    Zeros do if convolutions read them, and -inf if maxima do, which never is one.
    """
    readers, changed, gone = consumers(graph), {}, set()
    for node in graph.nodes:
        op = node.op
        if not isinstance(op, Pad) or op.mode != "constant" or node.name in graph.outputs:
            continue
        users = [changed.get(r.name, r) for r, _ in readers[node.name]]
        wider = [widened(user, op) for user in users]
        if wider and None not in wider:
            changed |= {user.name: user for user in wider if user is not None}
            gone.add(node.name)
    nodes = tuple(changed.get(n.name, n) for n in graph.nodes)
    return bypass(dataclasses.replace(graph, nodes=nodes), gone)


def widened(node: Node, pad: Pad) -> Node | None:
    """A node that pads by itself what was padded before it; None for one that cannot."""
    op = node.op
    if len(pad.widths) != 4 or {pad.widths[0], pad.widths[3]} != {(0, 0)}:
        return None
    match op:
        case Conv2d() if pad.value == 0:
            pass
        case MaxPool() if pad.value == -math.inf and not smaller(pad.widths):
            pass
        case _:
            return None
    rows, columns = (
        (mine[0] + more[0], mine[1] + more[1])
        for mine, more in zip(op.padding, pad.widths[1:3], strict=True)
    )
    return dataclasses.replace(node, op=dataclasses.replace(op, padding=(rows, columns)))


def smaller(widths: Iterable[tuple[int, int]]) -> bool:
    """Whether a padding cuts something off."""
    return any(n < 0 for pair in widths for n in pair)
