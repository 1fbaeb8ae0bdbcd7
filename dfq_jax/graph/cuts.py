"""Cuts a network into blocks where exactly one tensor is alive; equal blocks become equal values.

Reconstruction works block by block, and a block renamed canonically shares its compiled program
with every other block of the same structure (ResNet-50: 16 blocks, 8 programs).
"""

import dataclasses

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import WEIGHTED, Add, BatchNorm, Relu


@dataclasses.dataclass(frozen=True)
class Block:
    """A connected piece of a graph with one input tensor and one output tensor.

    Attributes:
      graph: the piece itself, under its original names.
      names: original node names in order; canonical name `n{i}` stands for `names[i]`.
    """

    graph: Graph
    names: tuple[str, ...]


def single_live_cuts(graph: Graph) -> tuple[str, ...]:
    """Tensors after which nothing else is alive, in order; the graph's input is not listed."""
    last_use = {name: -1 for name in (*graph.inputs, *(n.name for n in graph.nodes))}
    for index, node in enumerate(graph.nodes):
        for source in node.inputs:
            last_use[source] = index
    for name in graph.outputs:
        last_use[name] = len(graph.nodes)
    cuts, alive = [], set(graph.inputs)
    for index, node in enumerate(graph.nodes):
        alive.add(node.name)
        alive = {name for name in alive if last_use[name] > index}
        if alive == {node.name}:
            cuts.append(node.name)
    return tuple(cuts)


def blocks(graph: Graph) -> tuple[Block, ...]:
    """Blocks between single-live cuts, each with at least one weighted node.

    A cut never separates a convolution, addition or pooling from the batch norm or activation
    that follows it; trailing nodes without weights belong to the block before them.
    """
    cuts = set(single_live_cuts(graph))
    pieces: list[list[Node]] = [[]]
    for index, node in enumerate(graph.nodes):
        pieces[-1].append(node)
        following = graph.nodes[index + 1] if index + 1 < len(graph.nodes) else None
        if node.name in cuts and following is not None and not clings(following):
            pieces.append([])
    return tuple(as_block(piece) for piece in merge_weightless(pieces))


def clings(node: Node) -> bool:
    """Whether a node belongs to the block of the node before it."""
    return isinstance(node.op, Relu | BatchNorm | Add)


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


def as_block(piece: list[Node]) -> Block:
    """A block from consecutive nodes with one tensor entering and one leaving."""
    inside = {n.name for n in piece}
    entering = dict.fromkeys(i for n in piece for i in n.inputs if i not in inside)
    graph = Graph(tuple(piece), tuple(entering), (piece[-1].name,))
    return Block(graph, tuple(n.name for n in piece))


def canonical(block: Block, model: Model) -> Model:
    """The block as a stand-alone model whose names depend on its structure only.

    Two blocks that compute the same function of different weights give equal graphs, so one
    `jit` compilation serves both.
    """
    rename = {old: f"n{i}" for i, old in enumerate(block.names)}
    rename |= {old: f"x{i}" for i, old in enumerate(block.graph.inputs)}
    nodes = tuple(
        Node(rename[n.name], n.op, tuple(rename[i] for i in n.inputs)) for n in block.graph.nodes
    )
    graph = Graph(
        nodes,
        tuple(rename[i] for i in block.graph.inputs),
        tuple(rename[o] for o in block.graph.outputs),
    )
    pick = lambda table: {rename[k]: v for k, v in table.items() if k in block.names}
    return Model(graph, pick(model.params), model.contract, pick(model.moments))
