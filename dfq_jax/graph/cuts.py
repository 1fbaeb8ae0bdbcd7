"""Cuts a network into blocks where exactly one tensor is alive; equal blocks become equal values.

Reconstruction works block by block, and a block renamed canonically shares its compiled program
with every other block of the same structure (ResNet-50: 16 blocks, 8 programs).
"""

import dataclasses
from itertools import pairwise
from math import prod

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import WEIGHTED, Combine, Norm, Pointwise
from dfq_jax.graph.query import ancestors, constants, consumers, output_shapes

NARROW = 2
"""How much more than necessary may pass from stage to stage."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A connected piece of a graph with one input tensor and, but for the last, one output tensor.

    Attributes:
      graph: the piece itself, under its original names.
      names: original node names in order; canonical name `n{i}` stands for `names[i]`.
    """

    graph: Graph
    names: tuple[str, ...]


def single_live_cuts(graph: Graph) -> tuple[str, ...]:
    """Tensors after which nothing else is alive, in order; the graph's input is not listed.

    What does not depend on the input needs not be kept alive: any block can have its own copy.
    """
    fixed = constants(graph)
    last_use = {name: -1 for name in (*graph.inputs, *(n.name for n in graph.nodes))}
    for index, node in enumerate(graph.nodes):
        for source in node.inputs:
            last_use[source] = index
    for name in graph.outputs:
        last_use[name] = len(graph.nodes)
    cuts, alive = [], set(graph.inputs)
    for index, node in enumerate(graph.nodes):
        if node.name in fixed:
            continue
        alive.add(node.name)
        alive = {name for name in alive if last_use[name] > index}
        if alive == {node.name}:
            cuts.append(node.name)
    return tuple(cuts)


def blocks(graph: Graph) -> tuple[Block, ...]:
    """Blocks between single-live cuts, each with at least one weighted node.

    A cut never separates a convolution, addition or pooling from the batch norm or activation
    that follows it; trailing nodes without weights belong to the block before them. Constants
    stand in every block that reads them.
    """
    fixed, cuts, readers = constants(graph), set(single_live_cuts(graph)), consumers(graph)
    nodes = [n for n in graph.nodes if n.name not in fixed]
    pieces: list[list[Node]] = [[]]
    for node, following in zip(nodes, [*nodes[1:], None], strict=True):
        pieces[-1].append(node)
        if following is None or node.name not in cuts:
            continue
        alone = all(reader.name == following.name for reader, _ in readers[node.name])
        if not (clings(following) and alone):
            pieces.append([])
    return tuple(as_block(graph, piece, fixed) for piece in merge_weightless(pieces))


def stage_sizes(model: Model) -> tuple[int, ...]:
    """How many consecutive blocks make up each stage: those whose tensors have as many positions.

    What has one position at most, a pooled vector or scores, belongs to the stage before. A stage
    ends where little passes to the next: at the last of its blocks that puts out at most `NARROW`
    times as many values as the one with the fewest, since networks widen before they shrink.
    """
    shapes = output_shapes(model)
    leaving = [shapes[block.graph.outputs[0]] for block in blocks(model.graph)]
    positions = [prod(shape[1:-1]) if len(shape) > 2 else 1 for shape in leaving]
    values = [prod(shape) for shape in leaving]
    ends, first = [], 0
    for index in range(1, len(leaving)):
        if positions[index] in (1, positions[index - 1]):
            continue
        most = NARROW * min(values[first:index])
        end = max(i for i in range(first, index) if values[i] <= most) + 1
        ends, first = [*ends, end], index
    return tuple(b - a for a, b in pairwise([0, *ends, len(leaving)]))


def clings(node: Node) -> bool:
    """Whether a node belongs to the block of the node before it, if nothing else reads that.

    A norm that begins a residual branch has the branch's other end beside it, and does not.
    """
    return isinstance(node.op, Pointwise | Norm | Combine)


def merge_weightless(pieces: list[list[Node]]) -> list[list[Node]]:
    """Joins pieces without weights to their predecessor (the first to its successor)."""
    merged: list[list[Node]] = []
    for piece in pieces:
        if merged and not (has_weights(piece) and has_weights(merged[-1])):
            merged[-1] = merged[-1] + piece
        else:
            merged.append(piece)
    return merged


def has_weights(piece: list[Node]) -> bool:
    """Whether any node of the piece has a kernel."""
    return any(isinstance(n.op, WEIGHTED) for n in piece)


def as_block(graph: Graph, piece: list[Node], fixed: frozenset[str]) -> Block:
    """A block from consecutive nodes with one tensor entering, and the constants they read."""
    inside = {n.name for n in piece}
    needed = {name for n in piece for i in n.inputs if i in fixed for name in ancestors(graph, i)}
    nodes = tuple(n for n in graph.nodes if n.name in inside | needed)
    entering = dict.fromkeys(i for n in piece for i in n.inputs if i not in inside | needed)
    later = {i for n in graph.nodes if n.name not in inside for i in n.inputs}
    answers = [name for name in graph.outputs if name in inside]  # the network's first comes first
    leaving = dict.fromkeys([*answers, *(n.name for n in piece if n.name in later)])
    leaving = tuple(leaving) or (piece[-1].name,)
    return Block(Graph(nodes, tuple(entering), leaving), tuple(n.name for n in nodes))


def canonical(block: Block, model: Model) -> Model:
    """The block as a stand-alone model whose names depend on its structure only.

    What it reads are tensors of the network, so it states no inputs.

    Two blocks that compute the same function of different weights give equal graphs, so one
    `jit` compilation serves both.
    """
    rename = canonical_names(block)
    pick = lambda table: {rename[k]: v for k, v in table.items() if k in block.names}
    return Model(canonical_graph(block), pick(model.params), (), pick(model.moments))


def canonical_graph(block: Block) -> Graph:
    """The block's graph under names that depend on its structure only."""
    rename = canonical_names(block)
    renamed = lambda names: tuple(rename[name] for name in names)
    graph = block.graph
    nodes = tuple(Node(rename[n.name], n.op, renamed(n.inputs)) for n in graph.nodes)
    return Graph(nodes, renamed(graph.inputs), renamed(graph.outputs))


def canonical_names(block: Block) -> dict[str, str]:
    """{tensor of the block: its name in the canonical block}."""
    inside = {old: f"n{i}" for i, old in enumerate(block.names)}
    return inside | {old: f"x{i}" for i, old in enumerate(block.graph.inputs)}
