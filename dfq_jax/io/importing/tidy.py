"""Makes an imported graph readable: few nodes, and the names that people use for them.

Every rule keeps the function computed. What exporters spell out (`x * sigmoid(x)`) becomes the
operator it is (SiLU); what the layout needed and no longer needs disappears.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Clip,
    Constant,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    Mul,
    Op,
    Power,
    Relu,
    Reshape,
    Scale,
    Transpose,
)
from dfq_jax.graph.query import consumers
from dfq_jax.graph.rewrite import bypass
from dfq_jax.io.importing.builder import HostSlots
from dfq_jax.io.importing.hidden import chosen_where_hidden
from dfq_jax.io.importing.one_hot import tables_of_one_hot
from dfq_jax.io.importing.paddings import pads_into_windows
from dfq_jax.io.importing.spelled_norms import spelled_norms
from dfq_jax.io.importing.spelled_softmax import spelled_softmax

HostParams = Mapping[str, HostSlots]
Found = Mapping[str, Node]
TidyRule = Callable[[Node, Found], Node | None]


def tidy(graph: Graph, params: HostParams) -> tuple[Graph, dict[str, HostSlots]]:
    """The same function with fewer, better known operators.

    Args:
      graph: as imported.
      params: its parameters.

    Returns:
      A graph whose nodes all contribute to its outputs, and their parameters.
    """
    before = None
    while graph != before:
        before = graph
        graph = without_dead(rewritten(graph))
    graph, params = moved_constants(graph, dict(params))
    graph, params = chosen_where_hidden(graph, params)
    graph, params = spelled_norms(graph, params)
    graph = pads_into_windows(kept_dimensions(graph))
    graph, params = biases_into_layers(graph, params)
    graph, params = tables_of_one_hot(graph, params)
    graph = without_dead(spelled_softmax(graph))
    return graph, {n.name: params[n.name] for n in graph.nodes if n.name in params}


def rewritten(graph: Graph) -> Graph:
    """Every node replaced by what the first rule that knows it makes of it."""
    found: dict[str, Node] = {}
    for node in graph.nodes:
        better = next((new for rule in RULES if (new := rule(node, found)) is not None), node)
        found[node.name] = better
    return Graph(tuple(found.values()), graph.inputs, graph.outputs)


def without_dead(graph: Graph) -> Graph:
    """The graph less nodes that no output depends on."""
    alive, kept = set(graph.outputs), []
    for node in reversed(graph.nodes):
        if node.name in alive:
            alive.update(node.inputs)
            kept.append(node)
    return Graph(tuple(reversed(kept)), graph.inputs, graph.outputs)


def made_by(found: Found, name: str, kind: type) -> Node | None:
    """The node called `name` if its operator is of that kind."""
    node = found.get(name)
    return node if node is not None and isinstance(node.op, kind) else None


def is_scale(found: Found, name: str, factor: float, offset: float) -> str | None:
    """What a `Scale` of just these numbers reads; None if `name` is no such node."""
    node = made_by(found, name, Scale)
    if node is None or not isinstance(node.op, Scale):
        return None
    close = math.isclose(node.op.factor, factor, rel_tol=1e-5)
    return node.inputs[0] if close and math.isclose(node.op.offset, offset, rel_tol=1e-5) else None


def becomes(node: Node, op: Op, source: str) -> Node:
    """The node with another operator, reading one tensor."""
    return dataclasses.replace(node, op=op, inputs=(source,))


def merged_scales(node: Node, found: Found) -> Node | None:
    """Two multiply-adds in a row are one."""
    if not isinstance(node.op, Scale):
        return None
    first = made_by(found, node.inputs[0], Scale)
    if first is None or not isinstance(first.op, Scale):
        return None
    op = Scale(node.op.factor * first.op.factor, node.op.factor * first.op.offset + node.op.offset)
    return becomes(node, op, first.inputs[0])


def merged_reshapes(node: Node, found: Found) -> Node | None:
    """Of two reshapes in a row, or two transposes, only the result counts."""
    if isinstance(node.op, Reshape | Flatten):
        first = made_by(found, node.inputs[0], Reshape) or made_by(found, node.inputs[0], Flatten)
        return None if first is None else becomes(node, node.op, first.inputs[0])
    if isinstance(node.op, Transpose):
        first = made_by(found, node.inputs[0], Transpose)
        if first is not None and isinstance(first.op, Transpose):
            order = tuple(first.op.order[i] for i in node.op.order)
            return becomes(node, Transpose(order), first.inputs[0])
    return None


def limits(op: Op) -> tuple[float, float] | None:
    """(low, high) between which an operator limits values, None if it does something else."""
    match op:
        case Relu(ceiling):
            return 0.0, math.inf if ceiling is None else ceiling
        case Clip(low, high):
            return -math.inf if low is None else low, math.inf if high is None else high
        case _:
            return None


def merged_limits(node: Node, found: Found) -> Node | None:
    """Two limits in a row are one: max(x, 0), then min(x, 6)."""
    outer, before = limits(node.op), found.get(node.inputs[0]) if node.inputs else None
    inner = None if before is None else limits(before.op)
    if outer is None or inner is None or before is None:
        return None
    low, high = max(outer[0], inner[0]), min(outer[1], inner[1])
    if low > high:
        return None
    if low == 0 and high > 0:
        return becomes(node, Relu(None if high == math.inf else high), before.inputs[0])
    ends = (None if math.isinf(e) else e for e in (low, high))
    return becomes(node, Clip(*ends), before.inputs[0])


def shifted_relu6(found: Found, name: str) -> str | None:
    """x of `relu6(x + 3)`, None if `name` is something else."""
    node = found.get(name)
    if node is None or node.op not in (Relu(6.0), Clip(0.0, 6.0)):
        return None
    return is_scale(found, node.inputs[0], 1.0, 3.0)


def hard_sigmoid(node: Node, found: Found) -> Node | None:
    """relu6(x + 3) / 6."""
    clipped = is_scale({**found, node.name: node}, node.name, 1 / 6, 0.0)
    source = None if clipped is None else shifted_relu6(found, clipped)
    return None if source is None else becomes(node, Activation("hard_sigmoid"), source)


def gated(node: Node, found: Found) -> Node | None:
    """x * sigmoid(x), x * hard_sigmoid(x)."""
    if not isinstance(node.op, Mul):
        return None
    for x, gate in (node.inputs, node.inputs[::-1]):
        made = made_by(found, gate, Activation)
        if made is None or made.inputs[0] != x:
            continue
        match made.op:
            case Activation("sigmoid"):
                return becomes(node, Activation("silu"), x)
            case Activation("hard_sigmoid"):
                return becomes(node, Activation("hard_swish"), x)
            case _:
                pass
    return None


def mish(node: Node, found: Found) -> Node | None:
    """x * tanh(softplus(x))."""
    for x, gate in (node.inputs, node.inputs[::-1]) if isinstance(node.op, Mul) else ():
        made = found.get(gate)
        inner = found.get(made.inputs[0]) if made and made.op == Activation("tanh") else None
        if inner is not None and inner.op == Activation("softplus") and inner.inputs == (x,):
            return becomes(node, Activation("mish"), x)
    return None


def hard_swish(node: Node, found: Found) -> Node | None:
    """x * relu6(x + 3) / 6, the division last."""
    product = is_scale({**found, node.name: node}, node.name, 1 / 6, 0.0)
    made = None if product is None else made_by(found, product, Mul)
    for x, gate in (made.inputs, made.inputs[::-1]) if made is not None else ():
        if shifted_relu6(found, gate) == x:
            return becomes(node, Activation("hard_swish"), x)
    return None


def gelu(node: Node, found: Found) -> Node | None:
    """0.5 x (1 + erf(x / sqrt 2)), the half wherever it is; or its approximation by tanh."""
    half = is_scale({**found, node.name: node}, node.name, 0.5, 0.0)
    outer, share = (found.get(half), 1.0) if half is not None else (node, 0.5)
    if outer is None or not isinstance(outer.op, Mul):
        return None
    for left, right in (outer.inputs, outer.inputs[::-1]):
        erf = is_scale(found, right, share, share)
        x: str | None = left
        if erf is None and share == 0.5:
            erf, x = is_scale(found, right, 1.0, 1.0), is_scale(found, left, 0.5, 0.0)
        made = None if erf is None else made_by(found, erf, Activation)
        if x is None or made is None:
            continue
        inner = made.inputs[0]
        if made.op == Activation("erf") and is_scale(found, inner, 1 / math.sqrt(2), 0.0) == x:
            return becomes(node, Activation("gelu"), x)
        if made.op == Activation("tanh") and is_cubic(found, inner, x):
            return becomes(node, Activation("gelu_tanh"), x)
    return None


def is_cubic(found: Found, name: str, x: str) -> bool:
    """Whether a tensor is sqrt(2 / pi) (x + 0.044715 x^3)."""
    inner = is_scale(found, name, math.sqrt(2 / math.pi), 0.0)
    total = None if inner is None else made_by(found, inner, Add)
    for first, other in (total.inputs, total.inputs[::-1]) if total is not None else ():
        factor, power = monomial(found, other, x) or (0.0, 0.0)
        if first == x and power == 3 and math.isclose(factor, 0.044715, rel_tol=1e-5):
            return True
    return False


def monomial(found: Found, name: str, x: str) -> tuple[float, float] | None:
    """(factor, power) of a tensor that is `factor * x^power`, None if it is something else."""
    if name == x:
        return 1.0, 1.0
    node = found.get(name)
    match node and node.op:
        case Scale(factor, 0.0):
            by: tuple[float, float] = (factor, 1.0)
        case Power(power) if power > 0:
            by = (1.0, power)
        case Mul():
            by = (1.0, 1.0)
        case _:
            return None
    parts = [monomial(found, source, x) for source in node.inputs] if node is not None else []
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    factor = by[0] * math.prod(f for f, _ in known) ** by[1]
    return factor, by[1] * sum(power for _, power in known)


def softplus(node: Node, found: Found) -> Node | None:
    """max(x, 0) + log(1 + exp(-|x|))."""
    if not isinstance(node.op, Add):
        return None
    for limit, rest in (node.inputs, node.inputs[::-1]):
        relu, log = made_by(found, limit, Relu), made_by(found, rest, Activation)
        if relu is None or relu.op != Relu() or log is None or log.op != Activation("log"):
            continue
        inner = is_scale(found, log.inputs[0], 1.0, 1.0)
        shares = None if inner is None else made_by(found, inner, Activation)
        if shares is None or shares.op != Activation("exp"):
            continue
        size = is_scale(found, shares.inputs[0], -1.0, 0.0)
        made = None if size is None else made_by(found, size, Activation)
        if made is not None and made.op == Activation("abs") and made.inputs == relu.inputs:
            return becomes(node, Activation("softplus"), relu.inputs[0])
    return None


RULES: tuple[TidyRule, ...] = (
    *(merged_scales, merged_reshapes, merged_limits),
    *(hard_sigmoid, gated, mish, hard_swish, gelu, softplus),
)


def kept_dimensions(graph: Graph) -> Graph:
    """Global pooling keeps its two axes where all its readers want them back."""
    readers, by_name = consumers(graph), {n.name: n for n in graph.nodes}
    pools, gone = {}, set()
    for node in graph.nodes:
        wanted = {r.name for r, _ in readers[node.name]}
        restored = all(
            isinstance(op := by_name[r].op, Reshape)
            and len(op.shape) == 3
            and op.shape[:2] == (1, 1)
            for r in wanted
        )
        if node.op == GlobalAvgPool() and wanted and restored and node.name not in graph.outputs:
            pools[node.name] = dataclasses.replace(node, op=GlobalAvgPool(keepdims=True))
            gone |= wanted
    nodes = tuple(pools.get(n.name, n) for n in graph.nodes)
    return bypass(dataclasses.replace(graph, nodes=nodes), gone - set(graph.outputs))


def moved_constants(
    graph: Graph, params: dict[str, HostSlots]
) -> tuple[Graph, dict[str, HostSlots]]:
    """Constants in the order of axes and with the sizes in which they are read."""
    fixed = {n.name for n in graph.nodes if isinstance(n.op, Constant)}
    nodes = []
    for node in graph.nodes:
        known = bool(node.inputs) and node.inputs[0] in fixed
        moved = moved_by(node.op, params[node.inputs[0]]["value"]) if known else None
        if moved is not None:
            fixed.add(node.name)
            params[node.name] = {"value": moved}
            node = Node(node.name, Constant(), ())
        nodes.append(node)
    return dataclasses.replace(graph, nodes=tuple(nodes)), params


def moved_by(op: Op, value: np.ndarray) -> np.ndarray | None:
    """A constant as an operator leaves it that only names its axes anew; None for any other."""
    match op:
        case Reshape(shape):
            return value.reshape(value.shape[0], *shape)
        case Flatten():
            return value.reshape(value.shape[0], -1)
        case Transpose(order):
            return np.ascontiguousarray(value.transpose(order))
        case _:
            return None


def biases_into_layers(graph: Graph, params: HostParams) -> tuple[Graph, dict[str, HostSlots]]:
    """A constant per channel added right after a layer without a bias becomes its bias."""
    readers, by_name = consumers(graph), {n.name: n for n in graph.nodes}
    merged, gone = dict(params), []
    for node in graph.nodes:
        if not isinstance(node.op, Add) or node.name in graph.outputs:
            continue
        for source, other in (node.inputs, node.inputs[::-1]):
            layer, constant = by_name.get(source), by_name.get(other)
            if layer is None or constant is None or not isinstance(constant.op, Constant):
                continue
            value, slots = params[other]["value"], params.get(source, {})
            alone = len(readers[source]) == 1 and source not in graph.outputs
            fits = alone and isinstance(layer.op, Linear | Conv2d) and "bias" not in slots
            if fits and value.size == value.shape[-1] == slots["kernel"].shape[-1]:
                merged[source] = {**slots, "bias": value.reshape(-1)}
                gone.append((node.name, source))
                break
    for name, source in gone:
        graph = bypass(with_first_input(graph, name, source), [name])
    return graph, merged


def with_first_input(graph: Graph, name: str, source: str) -> Graph:
    """The graph with a node reading `source` alone."""
    nodes = tuple(
        dataclasses.replace(n, inputs=(source,)) if n.name == name else n for n in graph.nodes
    )
    return dataclasses.replace(graph, nodes=nodes)
