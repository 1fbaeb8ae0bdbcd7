"""Edits of a graph that keep it valid."""

import dataclasses
from collections.abc import Iterable, Mapping

from dfq_jax.graph.graph import Graph, Model, Node, Params


def replace_nodes(graph: Graph, new: Mapping[str, Node]) -> Graph:
    """The graph with the nodes named in `new` replaced in place."""
    return dataclasses.replace(graph, nodes=tuple(new.get(n.name, n) for n in graph.nodes))


def bypass(graph: Graph, names: Iterable[str]) -> Graph:
    """The graph without the nodes `names`; their readers read the nodes' first inputs instead."""
    gone = set(names)
    source: dict[str, str] = {}
    kept: list[Node] = []
    for node in graph.nodes:
        inputs = tuple(source.get(i, i) for i in node.inputs)
        if node.name in gone:
            source[node.name] = inputs[0]
        else:
            kept.append(dataclasses.replace(node, inputs=inputs))
    outputs = tuple(source.get(o, o) for o in graph.outputs)
    return Graph(tuple(kept), graph.inputs, outputs)


def with_params(model: Model, new: Mapping[str, Mapping]) -> Model:
    """The model with the slots in `new` added or replaced, node by node."""
    merged: dict[str, Mapping] = {k: dict(v) for k, v in model.params.items()}
    for name, slots in new.items():
        merged[name] = {**merged.get(name, {}), **slots}
    return dataclasses.replace(model, params=merged)


def drop_params(params: Params, names: Iterable[str]) -> Params:
    """The parameters without those of the nodes `names`."""
    gone = set(names)
    return {k: v for k, v in params.items() if k not in gone}
