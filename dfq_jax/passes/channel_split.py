"""Outlier channel splitting in the network: wide input channels of a layer are read from copies.

Copies are made where channels are made, by repeating filters, so nothing is gathered at run time.
"""

import dataclasses
from collections.abc import Mapping
from math import ceil
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dfq_jax.errors import UsageError
from dfq_jax.graph.channels import groups_of, is_depthwise
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    WEIGHTED,
    Activation,
    AdaptiveAvgPool,
    AvgPool,
    Clip,
    Conv2d,
    GlobalAvgPool,
    LeakyRelu,
    MaxPool,
    Op,
    PRelu,
    Relu,
    Resize,
    Scale,
)
from dfq_jax.graph.query import consumers, only_consumer, weighted_nodes
from dfq_jax.graph.rewrite import replace_nodes, with_params
from dfq_jax.numerics.channels import input_ranges
from dfq_jax.numerics.splitting import plan_splits, split_inputs
from dfq_jax.types import Moments


class SplittableLayer(NamedTuple):
    """A layer whose input channels can be split, with all that must be repeated for that.

    Attributes:
      layer: the layer.
      repeated: nodes from the one that makes its input up to the layer before it.
    """

    layer: str
    repeated: tuple[str, ...]


def split_channels(
    model: Model, ratio: float, *, steps: Mapping[str, Float[Array, "..."]] | None = None
) -> Model:
    """Splits the input channels with the largest weights of every layer where that is possible.

    Args:
      model: folded network.
      ratio: share of input channels to add to each layer, rounded up.
      steps: {layer: step of its kernel's grid, after splitting}: halves are then so far apart that
        splitting adds no rounding error; None for equal halves.

    Returns:
      The same function with more channels; `moments` follow. `unsplit` names the layers left.

    Raises:
      UsageError: for a ratio outside [0, 1].

    Reference:
      Zhao et al. 2019, "Improving Neural Network Quantization without Retraining using Outlier
      Channel Splitting", sections 3.1-3.3 (expansion ratio r, `ceil(r * channels)` splits).
    """
    if not 0 <= ratio <= 1:
        raise UsageError(f"split_channels() got ratio={ratio}; it is a share in [0, 1], e.g. 0.02.")
    if ratio == 0:
        return model
    for run in reversed(runs(model)):  # a layer's outputs are repeated before its inputs are split
        kernel = model.params[run.layer]["kernel"]
        splits = plan_splits(input_ranges(kernel), ceil(ratio * kernel.shape[-2]))
        for name in run.repeated:
            model = repeated(model, name, splits.source, kernel.shape[-2])
        step = None if steps is None else steps[run.layer]
        model = with_params(model, {run.layer: {"kernel": split_inputs(kernel, splits, step)}})
    return model


def runs(model: Model) -> tuple[SplittableLayer, ...]:
    """The layers that can be split, in execution order."""
    found = {n.name: run_before(model, n) for n in weighted_nodes(model.graph)}
    return tuple(SplittableLayer(k, v) for k, v in found.items() if not isinstance(v, str))


def unsplit(model: Model) -> dict[str, str]:
    """{layer: why its input channels are not split}."""
    found = {n.name: run_before(model, n) for n in weighted_nodes(model.graph)}
    return {k: v for k, v in found.items() if isinstance(v, str)}


def run_before(model: Model, layer: Node) -> tuple[str, ...] | str:
    """Names of the nodes to repeat channels of for a layer, or why that cannot be done."""
    graph = model.graph
    readers, names = consumers(graph), []
    if groups_of(layer.op) > 1:
        return "it has groups"
    source = layer.inputs[0]
    while True:
        if source in graph.inputs:
            return "it reads the image"
        if only_consumer(graph, readers, source) is None:
            return f"{source} is read or returned elsewhere too"
        node = graph[source]
        names.append(source)
        if isinstance(node.op, WEIGHTED) and groups_of(node.op) == 1:
            return tuple(reversed(names))
        if not by_channel(node.op) and not repeatable(model, node):
            return f"channels of {source} cannot be repeated"
        source = node.inputs[0]


def repeatable(model: Model, node: Node) -> bool:
    """Whether a node is a depthwise convolution: its channels may be repeated with those read."""
    return isinstance(node.op, Conv2d) and is_depthwise(
        node, model.params[node.name]["kernel"].shape
    )


def by_channel(op: Op) -> bool:
    """Whether each channel of an operator's output comes from the same channel of its input."""
    pools = MaxPool | AvgPool | AdaptiveAvgPool | GlobalAvgPool | Resize
    return isinstance(op, Relu | LeakyRelu | PRelu | Clip | Activation | Scale | pools)


def repeated(model: Model, name: str, source: Int[Array, " m"], width: int) -> Model:
    """The network with the output channels `source` of one node in place of its `width` ones."""
    graph, slots = model.graph, model.params.get(name, {})
    taken = {k: v[..., source] if v.shape[-1] == width else v for k, v in slots.items()}
    model = with_params(model, {name: taken} if taken else {})
    if name in model.moments:
        moments = Moments(*(jnp.take(v, source) for v in model.moments[name]))
        model = dataclasses.replace(model, moments={**model.moments, name: moments})
    return dataclasses.replace(model, graph=regrouped(graph, name, source.shape[0]))


def regrouped(graph: Graph, name: str, channels: int) -> Graph:
    """The graph with as many groups in a depthwise convolution as it has channels now."""
    node = graph[name]
    if not isinstance(node.op, Conv2d) or node.op.groups == 1:
        return graph
    op = dataclasses.replace(node.op, groups=channels)
    return replace_nodes(graph, {name: dataclasses.replace(node, op=op)})
