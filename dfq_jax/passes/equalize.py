"""Cross-layer equalization: moves scale between layers so that channels use similar ranges."""

import dataclasses
from collections.abc import Iterable
from functools import reduce
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dfq_jax.graph.channel_flow import homogeneous
from dfq_jax.graph.channels import (
    ChannelGroup,
    channel_groups,
    groups_of,
    is_depthwise,
    joints,
)
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import Clip, Op, Relu
from dfq_jax.graph.rewrite import replace_nodes, with_params
from dfq_jax.numerics.channels import balancing, input_ranges, output_ranges, scaled_inputs
from dfq_jax.types import Moments

Reach = Literal["pairs", "groups"]
Carry = tuple[Model, Float[Array, ""], Int[Array, ""]]


def equalize_cross_layer(
    model: Model, *, reach: Reach = "pairs", sweeps: int = 20, tolerance: float = 1e-3
) -> Model:
    """Equalizes layers that share channels until their ranges settle.

    A depthwise convolution is both the second of one pair and the first of the next, so a
    pointwise-depthwise-pointwise chain converges to three equal ranges, `(r1 r2 r3)^(1/3)`. ReLU6
    is not homogeneous: layers across it are left alone, and the function stays exactly the same.

    Args:
      model: folded network.
      reach: `pairs`: two layers joined by nothing but a (leaky) ReLU, as in the paper; `groups`:
        also all layers that add into one tensor or read it, through sums, pooling and resizing;
        the widest of them counts on either side.
      sweeps: most passes over all of them.
      tolerance: stops when no multiplier differs from 1 by more.

    Returns:
      The same function; `moments` follow their channels.

    Reference:
      Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization ..."; its
      extension to more than two layers is ours.
    """
    groups = equalizable(model, reach)
    if not groups:
        return model

    def sweep(carry: Carry) -> Carry:
        swept, _, count = carry
        largest = jnp.zeros(())
        for group in groups:
            swept, change = equalize_group(swept, group)
            largest = jnp.maximum(largest, change)
        return swept, largest, count + 1

    unsettled = lambda carry: (carry[1] > tolerance) & (carry[2] < sweeps)
    start = (model, jnp.full((), jnp.inf), jnp.zeros((), jnp.int32))
    return lax.while_loop(unsettled, sweep, start)[0]


def equalizable(model: Model, reach: Reach) -> tuple[ChannelGroup, ...]:
    """What takes common factors, in execution order; see `equalize_cross_layer`."""
    if reach == "groups":
        return channel_groups(model)
    return tuple(
        ChannelGroup(tuple(n.name for n in (first, between) if n), (first.name,), (second.name,))
        for first, between, second in joints(model.graph)
        if (between is None or homogeneous(between.op)) and joins(model, second)
    )


def joins(model: Model, consumer: Node) -> bool:
    """Whether a pair may end in this layer: it is ungrouped or depthwise."""
    shape = model.params[consumer.name]["kernel"].shape
    return groups_of(consumer.op) == 1 or is_depthwise(consumer, shape)


def equalize_group(model: Model, group: ChannelGroup) -> tuple[Model, Float[Array, ""]]:
    """Equalizes one group; also returns how far its multipliers were from 1."""
    graph, params = model.graph, model.params
    made = [group.widest(name, output_ranges(params[name]["kernel"])) for name in group.producers]
    read = []
    for node in (graph[name] for name in group.consumers):
        ranges = input_ranges(params[node.name]["kernel"], groups_of(node.op))
        read.append(group.widest(node.inputs[0], ranges))
    s = balancing(reduce(jnp.maximum, made), reduce(jnp.maximum, read))
    return with_tensors_divided(model, group, s), jnp.max(jnp.abs(jnp.log(s)))


def with_tensors_divided(model: Model, group: ChannelGroup, s: Float[Array, " c"]) -> Model:
    """The same function with all tensors of a group divided by its factors `s`."""
    by = {tensor: group.spread(tensor, s) for tensor in group.tensors}
    for name in group.producers:  # one may be a consumer as well: it reads what it adds to
        model = with_params(model, {name: {k: v / by[name] for k, v in model.params[name].items()}})
    for node in (model.graph[name] for name in group.consumers):
        kernel, read = model.params[node.name]["kernel"], node.inputs[0]
        factors = by.get(read, s)  # of a pair, what lies between is in no group
        kernel = scaled_inputs(kernel, factors, groups_of(node.op))
        model = with_params(model, {node.name: {"kernel": kernel}})
    moments = {
        name: Moments(mean / by[name], var / by[name] ** 2) if name in by else Moments(mean, var)
        for name, (mean, var) in model.moments.items()
    }
    return dataclasses.replace(model, moments=moments)


# ReLU6


def capped_between(model: Model, reach: Reach) -> tuple[str, ...]:
    """ReLU6 and its kind, as far as nothing else keeps the layers around from equalization."""
    graph = uncapped(model, (n.name for n in model.graph.nodes if capped(n.op)))
    inside = {t for group in equalizable(graph, reach) for t in group.tensors}
    return tuple(n.name for n in model.graph.nodes if capped(n.op) and n.name in inside)


def capped(op: Op) -> bool:
    """Whether an operator is a ReLU but for its ceiling."""
    match op:
        case Relu(ceiling):
            return ceiling is not None
        case Clip(low, high):
            return low == 0 and high is not None
        case _:
            return False


def uncapped(model: Model, names: Iterable[str]) -> Model:
    """The network with some nodes replaced by ReLUs without a ceiling: a function of its own.

    Reference:
      Nagel et al. 2019, section 5: MobileNetV2 has ReLU6 replaced before equalization.
    """
    nodes = {name: dataclasses.replace(model.graph[name], op=Relu()) for name in names}
    return dataclasses.replace(model, graph=replace_nodes(model.graph, nodes))
