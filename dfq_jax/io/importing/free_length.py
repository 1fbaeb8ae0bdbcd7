"""One graph for rows of any number of tokens, out of graphs for several lengths.

The network is imported for two lengths and has to come out the same, but for sizes that follow
from the length. Constants that are longer for longer rows (positions, masks, angles) have to begin
alike: then the longest of them is kept, and cut at every run to as many tokens as there are.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from dfq_jax.errors import DfqError
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import Broadcast, Compare, Constant, Op, Slice
from dfq_jax.graph.token_ops import Column, Leading
from dfq_jax.io.frontends.program import Program
from dfq_jax.io.importing.builder import HostSlots
from dfq_jax.io.importing.engine import OperatorTable
from dfq_jax.io.importing.free_sizes import opened, same
from dfq_jax.io.importing.token_rows import ImportedRows, import_rows

MOST_TOKENS = 2048
"""Places that are written down where nothing in the network says how many there are."""


class Loosened(NamedTuple):
    """A network for rows of any length.

    Attributes:
      rows: the network.
      longest: tokens that it has places for; None where it needs none.
    """

    rows: ImportedRows
    longest: int | None


def of_any_length(
    program: Program, table: OperatorTable, found: ImportedRows, length: int
) -> Loosened | None:
    """The network for rows of any length; None if its operators are others for other lengths.

    Args:
      program: the network in the operators of its source.
      table: what those operators mean.
      found: the network for rows of `length`.
      length: tokens of a row, at least 2.
    """
    other = tried(program, table, length - 1) if length > 1 else None
    if other is None:
        return None
    nodes = alike(found.graph, other.graph, length)
    grown = axes_of_length(found, other)
    if nodes is None or grown is None:
        return None
    rest = [{n: s for n, s in x.params.items() if n not in grown} for x in (found, other)]
    if not same(rest[0], rest[1]):
        return None
    graph, params = dataclasses.replace(found.graph, nodes=nodes), rest[0]
    if not grown:
        return Loosened(found._replace(graph=graph), None)
    longest = longest_of(program, table, length)
    whole = found if longest == length else tried(program, table, longest)
    if whole is None or [n.name for n in whole.graph.nodes] != [n.name for n in nodes]:
        return None
    tables = {name: whole.params[name]["value"] for name in grown}
    if not all(begins(tables[n], found.params[n]["value"], grown[n]) for n in grown):
        return None
    graph, params = with_tables(graph, params, tables, grown)
    return Loosened(ImportedRows(graph, params, found.vocabularies), longest)


def tried(program: Program, table: OperatorTable, length: int) -> ImportedRows | None:
    """The network for rows of another length; None where there is none."""
    try:
        return import_rows(program, table, length)
    except DfqError:
        return None


def alike(a: Graph, b: Graph, length: int) -> tuple[Node, ...] | None:
    """The nodes of two graphs, for rows of `length` and one token less, for any; None if apart."""
    if (a.outputs, len(a.nodes)) != (b.outputs, len(b.nodes)):
        return None
    nodes = []
    for mine, other in zip(a.nodes, b.nodes, strict=True):
        op = freed(mine.op, other.op, length)
        if op is None or (mine.name, mine.inputs) != (other.name, other.inputs):
            return None
        nodes.append(dataclasses.replace(mine, op=op))
    return tuple(nodes)


def freed(a: Op, b: Op, length: int) -> Op | None:
    """The operator that both are, for rows of any length; None if there is none."""
    if isinstance(a, Slice) and isinstance(b, Slice) and len(a.bounds) == len(b.bounds):
        pairs = zip(a.bounds, b.bounds, strict=True)
        bounds = [counted(mine, other, length) for mine, other in pairs]
        return None if None in bounds else Slice(tuple(x for x in bounds if x is not None))
    if isinstance(a, Broadcast) and isinstance(b, Broadcast) and len(a.shape) == len(b.shape):
        pairs = [*zip(a.shape, b.shape, strict=True)]
        if any(n != m and (n, m) != (length, length - 1) for n, m in pairs):
            return None
        return Broadcast(tuple(n if n == m else -1 for n, m in pairs))
    return opened(a, b)


def counted(
    mine: tuple[int, int | None, int], other: tuple[int, int | None, int], length: int
) -> tuple[int, int | None, int] | None:
    """Bounds of a slice, counted from the end where they follow it; None if they do not."""
    ends: list[int | None] = []
    for a, b in zip(mine[:2], other[:2], strict=True):
        if a == b:
            ends.append(a)
        elif a is not None and b is not None and a - length == b - (length - 1) < 0:
            ends.append(a - length)
        else:
            return None
    start, stop = ends
    return None if start is None or mine[2] != other[2] else (start, stop, mine[2])


def axes_of_length(found: ImportedRows, other: ImportedRows) -> dict[str, tuple[int, ...]] | None:
    """{constant: its axes that are longer in longer rows}; None if something else differs."""
    grown: dict[str, tuple[int, ...]] = {}
    for node in found.graph.nodes:
        if not isinstance(node.op, Constant):
            continue
        mine = found.params[node.name]["value"]
        theirs = other.params.get(node.name, {}).get("value")
        if theirs is None or mine.ndim != theirs.ndim:
            return None
        pairs = zip(mine.shape, theirs.shape, strict=True)
        axes = tuple(axis for axis, (n, m) in enumerate(pairs) if n != m)
        if axes:
            grown[node.name] = axes
    return grown


def longest_of(program: Program, table: OperatorTable, length: int) -> int:
    """The longest rows that a network has places for, `MOST_TOKENS` where nothing ends them.

    Its tables end at the size of one of its arrays.
    """
    if tried(program, table, MOST_TOKENS) is not None:
        return MOST_TOKENS
    sizes = {n for array in program.arrays.values() for n in array.shape}
    for size in sorted(n for n in sizes if length <= n < MOST_TOKENS):
        if tried(program, table, size + 1) is None:
            return size if tried(program, table, size) is not None else length
    return length


def begins(whole: np.ndarray, part: np.ndarray, axes: tuple[int, ...]) -> bool:
    """Whether a table begins with a part of it, shorter along some axes."""
    if whole.ndim != part.ndim:
        return False
    ends = [n if axis in axes else None for axis, n in enumerate(part.shape)]
    return np.array_equal(whole[tuple(map(slice, ends))], part)


def with_tables(
    graph: Graph,
    params: dict[str, HostSlots],
    tables: dict[str, np.ndarray],
    grown: dict[str, tuple[int, ...]],
) -> tuple[Graph, dict[str, HostSlots]]:
    """The network with the beginnings of tables for its longer constants, equal ones once.

    A mask by which no token looks at later ones is a comparison of two lists of places.
    """
    first = next((n.name for n in graph.nodes if isinstance(n.op, Column)), graph.inputs[0])
    nodes, known, stands = [], {}, {}
    for node in graph.nodes:
        if node.name not in tables:
            inputs = tuple(stands.get(i, i) for i in node.inputs)
            nodes.append(dataclasses.replace(node, inputs=inputs))
            continue
        value, axes = tables[node.name], grown[node.name]
        key = (axes, value.shape, value.tobytes())
        if key in known:
            stands[node.name] = known[key]
            continue
        known[key] = node.name
        if not is_causal(value, axes):
            nodes.append(Node(node.name, Leading(axes), (first,)))
            params[node.name] = {"value": value}
            continue
        sides = []
        for side, axis in zip(("row", "column"), axes, strict=True):
            shape = [n if a == axis else 1 for a, n in enumerate(value.shape)]
            sides.append(f"{node.name}.{side}")
            nodes.append(Node(sides[-1], Leading((axis,)), (first,)))
            places = np.arange(value.shape[axis], dtype=np.float32).reshape(shape)
            params[sides[-1]] = {"value": places}
        nodes.append(Node(node.name, Compare("greater_equal"), tuple(sides)))
    outputs = tuple(stands.get(o, o) for o in graph.outputs)
    return Graph(tuple(nodes), graph.inputs, outputs), params


def is_causal(value: np.ndarray, axes: tuple[int, ...]) -> bool:
    """Whether a mask is 1 where the place along its last axis is no later than that before."""
    rank = value.ndim
    if axes != (rank - 2, rank - 1) or value.size != value.shape[-1] * value.shape[-2]:
        return False
    square = value.reshape(value.shape[-2:])
    return np.array_equal(square, np.tril(np.ones(square.shape, np.float32)))
