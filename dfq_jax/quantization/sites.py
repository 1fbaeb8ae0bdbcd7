"""Where quantizers may sit, which edges share one grid, and what computes in float anyway.

The rules are those of `dfq_jax.quantization.plan`.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    WEIGHTED,
    Activation,
    Add,
    BatchNorm,
    Clip,
    Compare,
    Concat,
    Constant,
    Curve,
    Elu,
    GroupNorm,
    LayerNorm,
    LocalNorm,
    LogSoftmax,
    MatMul,
    Mul,
    Op,
    Pad,
    Power,
    Recurrent,
    Relu,
    Select,
    Softmax,
    Sub,
)
from dfq_jax.graph.query import consumers, keeps_values
from dfq_jax.graph.token_ops import Column, Embed, Leading, Present, RmsNorm, Rotary
from dfq_jax.quantization.standardised import standardising

ABSORBED = (Relu, Clip, BatchNorm)
"""Operators that the one before them absorbs: nothing is stored between the two."""

ON_THE_WAY = (Concat, Pad, Relu, Clip)
"""Beside operators that only move values: those that join, fill up or limit what they are given."""

PRODUCTS = (*WEIGHTED, MatMul)
"""Operators that multiply and accumulate: what coverage counts."""

PROBABLE = Activation("sigmoid")
"""What makes probabilities of scores, on the way to an output."""

FLOAT_CURVES: frozenset[Curve] = frozenset(
    {"gelu", "gelu_tanh", "mish", "softplus", "elu", "exp", "sqrt", "abs", "erf", "log", "round"}
)
"""Activations that runtimes have no good integer form of."""

NO_FORM = "no 8-bit form"
RECURRENT = "recurrent"
OF_IDS = "reads ids"
LONE_NORM = "not behind a convolution"
STREAM = "residual stream"
STATISTIC = "statistic of positions"


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """Where a quantizer sits: on what a node reads, or on its kernel.

    Attributes:
      node: its name.
      argument: which of its arguments, from 0; None for its kernel.
    """

    node: str
    argument: int | None = None

    @property
    def slot(self) -> str:
        """What it is called beside the node, in files: `kernel` or `input0`, `input1`, ..."""
        return "kernel" if self.argument is None else f"input{self.argument}"

    @property
    def path(self) -> str:
        """What it is called in files: the node and the slot."""
        return f"{self.node}.{self.slot}"

    def __lt__(self, other: "Site") -> bool:
        """The order of saved arrays: by node, then by slot."""
        return (self.node, self.slot) < (other.node, other.slot)


def float_reason(op: Op) -> str | None:
    """Why an operator computes in float wherever it stands; None if it need not."""
    match op:
        case Recurrent():
            return RECURRENT
        case Column() | Leading() | Embed() | Present():
            return OF_IDS
        case LayerNorm() | RmsNorm() | GroupNorm() | LocalNorm() | Softmax() | LogSoftmax():
            return NO_FORM
        case Elu() | Power() | Rotary():
            return NO_FORM
        case Compare() | Select():
            return NO_FORM
        case Activation(curve) if curve in FLOAT_CURVES:
            return NO_FORM
        case BatchNorm():
            return LONE_NORM
        case _:
            return None


def float_operators(graph: Graph) -> dict[str, str]:
    """{node: reason} of the operators that compute in float under every plan, in order."""
    stream = residual_stream(graph)
    reasons = {n.name: STREAM if n.name in stream else float_reason(n.op) for n in graph.nodes}
    own = {name: reason for name, reason in reasons.items() if reason is not None}
    spelled = standardising(graph)
    among = spelled | statistics(graph, own.keys() | spelled)
    return {n.name: own.get(n.name, STATISTIC) for n in graph.nodes if n.name in {*own, *among}}


def statistics(graph: Graph, floats: Collection[str]) -> frozenset[str]:
    """What computes deviations beside powers, as a norm does: in float, like a norm.

    A difference that only powers read, and what stands between float operators without a kernel,
    as the mean of squares does. On a grid the squares of small deviations would vanish beside those
    of large ones.

    Args:
      graph: the network.
      floats: operators that compute in float anyway.
    """
    readers = {n: [r.name for r, _ in found] for n, found in consumers(graph).items()}
    nodes, ends = graph.by_name, {*graph.inputs, *graph.outputs}
    powers = {n.name for n in graph.nodes if isinstance(n.op, Power)}
    read = lambda name: readers[name] and name not in ends
    own = {n.name for n in graph.nodes if isinstance(n.op, Sub) and read(n.name)}
    squared = {name for name in own if powers.issuperset(readers[name])}
    fixed = {n.name for n in graph.nodes if isinstance(n.op, Constant)}
    around = {*floats, *squared}
    kept = {n.name for n in graph.nodes if not isinstance(n.op, PRODUCTS) and read(n.name)}
    kept -= {*around, *fixed}
    settled = False
    while not settled:
        inside = {*kept, *around}
        sources = {name: [s for s in nodes[name].inputs if s not in fixed] for name in kept}
        left = {n for n in kept if sources[n] and inside.issuperset([*sources[n], *readers[n]])}
        kept, settled = left, left == kept
    return frozenset(squared | {name for name in kept if not keeps_values(nodes[name].op)})


def residual_stream(graph: Graph) -> frozenset[str]:
    """Sums (and differences, products) that a layer norm reads: they stay in float.

    The stream of a transformer grows from block to block, a few of its channels far more than the
    others; on one 8-bit grid the others would vanish, and the norm would show it.
    """
    origin = origins(graph)
    normed = {origin[n.inputs[0]] for n in graph.nodes if isinstance(n.op, LayerNorm | RmsNorm)}
    return frozenset(
        n.name for n in graph.nodes if n.name in normed and isinstance(n.op, Add | Sub | Mul)
    )


def origins(graph: Graph) -> dict[str, str]:
    """{tensor: the tensor whose values it holds}: itself, unless an operator only moves values."""
    origin = {name: name for name in graph.inputs}
    for node in graph.nodes:
        moves = keeps_values(node.op) and len(node.inputs) == 1
        origin[node.name] = origin[node.inputs[0]] if moves else node.name
    return origin


def idle_moves(graph: Graph, floats: dict[str, str]) -> frozenset[str]:
    """Operators that only move values from where they are float to where they stay float."""
    readers, idle = consumers(graph), set()
    unread = lambda node: (
        node.name in idle or (node.name in floats and not isinstance(node.op, BatchNorm))
    )
    for node in reversed(graph.nodes):
        moves = keeps_values(node.op) and node.name not in graph.outputs
        if moves and readers[node.name] and all(unread(n) for n, _ in readers[node.name]):
            idle.add(node.name)
    return frozenset(idle)


def ways_out(graph: Graph) -> frozenset[str]:
    """Operators that values leave for an output of the network, merely moved, joined or clipped.

    No later layer asks for a grid there, and none could hold what an output joins: boxes in pixels
    beside scores below 1. That other layers may read the same values makes no difference: those
    edges have grids of their own. Probabilities are made of scores as they are, too: where images
    show nothing, a grid of scores would end at 0, and nothing be found with more than one half.
    """
    readers, found = consumers(graph), set()
    for node in reversed(graph.nodes):
        moves = keeps_values(node.op) or isinstance(node.op, ON_THE_WAY) or node.op == PROBABLE
        leads = node.name in graph.outputs or any(n.name in found for n, _ in readers[node.name])
        if moves and leads:
            found.add(node.name)
    return frozenset(found)


def leading_to(graph: Graph, layers: Collection[str]) -> frozenset[str]:
    """Operators that only move values, and only to these layers."""
    readers, found = consumers(graph), set()
    for node in reversed(graph.nodes):
        moves = keeps_values(node.op) and node.name not in graph.outputs
        if moves and all(n.name in layers or n.name in found for n, _ in readers[node.name]):
            found.add(node.name)
    return frozenset(found)


EdgeReaders = Literal["all", "rectified", "layers"]
"""Whose edges carry values on a grid; see `tensor_groups`."""
READING: Mapping[str, EdgeReaders] = {"zsq_all_low": "layers", "zsq_all_rectified": "rectified"}
"""{preset of layers that has no ends at 8 bits: whose edges it quantizes}."""


def tensor_groups(graph: Graph, reading: EdgeReaders = "all") -> dict[str, list[Site]]:
    """{tensor: edges that carry its values on a grid}, in execution order.

    Args:
      graph: the folded network.
      reading: whose edges; of `rectified` tensors those behind a ReLU alone, and of `layers` these
        where convolutions and linear layers read them.

    Returns:
      The groups; each shares one grid.
    """
    origin, floats = origins(graph), float_operators(graph)
    skipped = idle_moves(graph, floats) | ways_out(graph) | set(floats)
    groups: dict[str, list[Site]] = {}
    for node in graph.nodes:
        if isinstance(node.op, ABSORBED) or node.name in skipped:
            continue
        for index, source in enumerate(node.inputs):
            groups.setdefault(origin[source], []).append(Site(node.name, index))
    groups = {t: sites for t, sites in groups.items() if not rounded_twice(graph, t, sites)}
    rectified = {n.name for n in graph.nodes if isinstance(n.op, Relu)}
    if reading == "rectified":
        return {tensor: sites for tensor, sites in groups.items() if tensor in rectified}
    return read_by_layers(graph, groups, rectified) if reading == "layers" else groups


def rounded_twice(graph: Graph, tensor: str, sites: Iterable[Site]) -> bool:
    """Whether what has grids is joined, and read by no layer that needs one grid for all of it.

    A grid as wide as the widest part would only round the others again, and more coarsely.
    """
    nodes = graph.by_name
    joined = tensor in nodes and isinstance(nodes[tensor].op, Concat)
    return joined and not any(isinstance(nodes[s.node].op, (*PRODUCTS, Concat)) for s in sites)


def read_by_layers(
    graph: Graph, groups: dict[str, list[Site]], rectified: Collection[str]
) -> dict[str, list[Site]]:
    """The groups of rectified tensors, less the edges that no weighted layer reads."""
    readers = {n.name for n in graph.nodes if isinstance(n.op, WEIGHTED)}
    return {
        tensor: kept
        for tensor, sites in groups.items()
        if tensor in rectified and (kept := [s for s in sites if s.node in readers])
    }


def products(graph: Graph) -> tuple[Node, ...]:
    """Convolutions, linear layers and products of two tensors, in execution order."""
    return tuple(n for n in graph.nodes if isinstance(n.op, PRODUCTS))


def operands(node: Node) -> tuple[Site, Site]:
    """The two sites that a layer, or product of two tensors, multiplies."""
    second = 1 if isinstance(node.op, MatMul) else None
    return Site(node.name, 0), Site(node.name, second)
