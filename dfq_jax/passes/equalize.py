"""Cross-layer equalization: moves scale between layers so that channels use similar ranges."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    WEIGHTED,
    Conv2d,
    ConvTranspose2d,
    LeakyRelu,
    Op,
    PRelu,
    Relu,
)
from dfq_jax.graph.query import consumers, only_consumer, weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.types import Moments

Kernel = Float[Array, "..."]
Carry = tuple[Model, Float[Array, ""], Int[Array, ""]]


def equalize_cross_layer(model: Model, *, sweeps: int = 20, tolerance: float = 1e-3) -> Model:
    """Equalizes all pairs of layers joined by nothing but a (leaky) ReLU, until ranges settle.

    A depthwise convolution is both the second of one pair and the first of the next, so a
    pointwise-depthwise-pointwise chain converges to three equal ranges. ReLU6 is not homogeneous:
    pairs across it are left alone, and the function stays exactly the same.

    Args:
      model: folded network.
      sweeps: most passes over all pairs.
      tolerance: stops when no multiplier differs from 1 by more.

    Returns:
      The same function; `moments` follow their channels.

    Reference:
      Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization ...", Eq. 11.
    """
    pairs = equalizable_pairs(model)
    if not pairs:
        return model

    def sweep(carry: Carry) -> Carry:
        swept, _, count = carry
        largest = jnp.zeros(())
        for first, second in pairs:
            swept, change = equalize_in(swept, first, second)
            largest = jnp.maximum(largest, change)
        return swept, largest, count + 1

    unsettled = lambda carry: (carry[1] > tolerance) & (carry[2] < sweeps)
    start = (model, jnp.full((), jnp.inf), jnp.zeros((), jnp.int32))
    return lax.while_loop(unsettled, sweep, start)[0]


def equalizable_pairs(model: Model) -> tuple[tuple[Node, Node], ...]:
    """(producer, consumer) layers with one path between them, through at most one activation."""
    graph: Graph = model.graph
    readers = consumers(graph)
    pairs = []
    for node in weighted_nodes(graph):
        reader = only_consumer(graph, readers, node.name)
        if reader is not None and homogeneous(reader.op):
            reader = only_consumer(graph, readers, reader.name)
        if reader is not None and isinstance(reader.op, WEIGHTED) and joins(model, reader):
            pairs.append((node, reader))
    return tuple(pairs)


def homogeneous(op: Op) -> bool:
    """Whether `f(s x) = s f(x)` for every channel and every s > 0."""
    return isinstance(op, LeakyRelu | PRelu) or (isinstance(op, Relu) and op.ceiling is None)


def joins(model: Model, consumer: Node) -> bool:
    """Whether the input channels of `consumer` can be rescaled: ungrouped or depthwise."""
    if groups_of(consumer) == 1:
        return True
    kernel = model.params[consumer.name]["kernel"]
    return kernel.shape[2] == 1 and kernel.shape[3] == groups_of(consumer)


def groups_of(node: Node) -> int:
    """Groups of a convolution, 1 for a linear layer."""
    return node.op.groups if isinstance(node.op, Conv2d | ConvTranspose2d) else 1


def equalize_in(model: Model, first: Node, second: Node) -> tuple[Model, Float[Array, ""]]:
    """Equalizes one pair; also returns how far its multipliers were from 1."""
    a, b = model.params[first.name], model.params[second.name]
    depthwise = groups_of(second) > 1
    w1, w2, s = equalize_pair(a["kernel"], b["kernel"], depthwise=depthwise)
    new_first = {"kernel": w1}
    if "bias" in a:
        new_first["bias"] = a["bias"] / s
    model = with_params(model, {first.name: new_first, second.name: {"kernel": w2}})
    if first.name in model.moments:
        mean, var = model.moments[first.name]
        rescaled = {**model.moments, first.name: Moments(mean / s, var / s**2)}
        model = dataclasses.replace(model, moments=rescaled)
    return model, jnp.max(jnp.abs(jnp.log(s)))


def equalize_pair(
    w1: Kernel, w2: Kernel, *, depthwise: bool = False
) -> tuple[Kernel, Kernel, Float[Array, " mid"]]:
    """Balances the channel ranges of two layers joined by a positive-homogeneous activation.

    Args:
      w1: producer kernel, output channels last.
      w2: consumer kernel, its input channels (the producer's outputs) second to last, or last for
        a depthwise consumer.
      depthwise: whether the consumer is depthwise.

    Returns:
      `w1 / s`, `w2 * s` and `s > 0` (dimensionless), with the per-channel abs-max of both equal;
      s = 1 where either range is 0.

    Raises:
      ValueError: if the kernels disagree on the number of shared channels.

    Reference:
      Nagel et al. 2019, Eq. 11.
    """
    shared = w2.ndim - (1 if depthwise else 2)
    if w1.shape[-1] != w2.shape[shared]:
        raise ValueError(
            f"equalize_pair() got {w1.shape[-1]} and {w2.shape[shared]} shared channels."
        )
    r1 = jnp.max(jnp.abs(w1), axis=tuple(range(w1.ndim - 1)))
    r2 = jnp.max(jnp.abs(w2), axis=tuple(i for i in range(w2.ndim) if i != shared))
    alive = (r1 > 0) & (r2 > 0)
    s = jnp.where(alive, jnp.sqrt(r1 / jnp.where(alive, r2, 1.0)), 1.0)
    s = jnp.clip(s, 1e-8, 1e8)
    return w1 / s, w2 * (s if depthwise else s[:, None]), s
