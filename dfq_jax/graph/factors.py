"""How positive factors on channels pass through operators, channel by channel.

A channel of a tensor that is divided by `s > 0` where it is made, and multiplied in the kernels
that read it, changes nothing as long as all in between commutes with it. Slices and concatenations
move channels about, a root or a square takes the factor to a power, and a gate leaves the factors
of what it gates alone. So each channel of each tensor has the number of a factor and a power of it;
number 0 is of channels that no factor may touch.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dfq_jax.graph.coupling import channel_flows
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.labels import Flow, Tied
from dfq_jax.graph.ops import (
    WEIGHTED,
    Activation,
    Concat,
    Div,
    Flatten,
    Mul,
    Power,
    Reshape,
    Scale,
    Slice,
    Transpose,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.query import output_shapes

Shape = tuple[int, ...]


class ChannelFactors(NamedTuple):
    """The factors of the channels (last axis) of a tensor.

    Attributes:
      numbers: that of each channel's factor, from 1; 0 for none.
      powers: to which it is taken; 1 where it is none.
    """

    numbers: Int[np.ndarray, " c"]
    powers: Float[np.ndarray, " c"]

    def picked(self, at: Int[np.ndarray, " k"] | slice) -> "ChannelFactors":
        """Those of some channels."""
        return ChannelFactors(self.numbers[at], self.powers[at])


Ties = tuple[tuple[ChannelFactors, ChannelFactors], ...]
"""Channels that take the same factors, place by place."""


def no_factors(width: int) -> ChannelFactors:
    """Channels that no factor may touch."""
    return ChannelFactors(np.zeros(width, np.int64), np.ones(width))


def channel_factors(model: Model) -> dict[str, ChannelFactors]:
    """{tensor: the factors its channels may have}; numbers need not be consecutive.

    Layers make channels with factors of their own. What the network reads or returns has none, and
    neither has what an operator touches that does not commute with them.
    """
    graph, shapes = model.graph, output_shapes(model)
    flows, _ = channel_flows(model, shapes)
    found = {name: no_factors(shapes[name][-1]) for name in graph.inputs if shapes[name]}
    tied, first = Tied(), 1
    for node in graph.nodes:
        shape = shapes[node.name]
        width = shape[-1] if shape else 1
        if isinstance(node.op, WEIGHTED):
            found[node.name] = ChannelFactors(np.arange(first, first + width), np.ones(width))
            first += width
            continue
        xs = tuple(settled(found[name], tied) for name in node.inputs)
        read = tuple(shapes[name] for name in node.inputs)
        made, ties = passed(node, xs, read, shape, flows[node.name])
        for one, other in ties:
            tie(tied, one, other)
        found[node.name] = made
    for name in graph.outputs:
        tie(tied, found[name], no_factors(len(found[name].numbers)))
    return {name: settled(powers, tied) for name, powers in found.items()}


def settled(found: ChannelFactors, tied: Tied) -> ChannelFactors:
    """The same after all ties so far."""
    numbers = tied.resolved(found.numbers)
    alive = (numbers > 0) & (found.powers != 0)
    return ChannelFactors(np.where(alive, numbers, 0), np.where(alive, found.powers, 1.0))


def tie(tied: Tied, one: ChannelFactors, other: ChannelFactors) -> None:
    """Makes factors the same; of channels with several powers none is left."""
    alike = one.powers == other.powers
    tied.tie([(np.where(alike, one.numbers, 0), np.where(alike, other.numbers, 0))])
    apart = ~alike
    nothing = np.zeros(int(apart.sum()), np.int64)
    tied.tie([(x.numbers[apart], nothing) for x in (one, other)])


def passed(
    node: Node, xs: tuple[ChannelFactors, ...], read: tuple[Shape, ...], shape: Shape, flow: Flow
) -> tuple[ChannelFactors, Ties]:
    """Factors of what an operator makes, and which of all have to be the same.

    Args:
      node: the operator, no layer.
      xs: factors of what it reads.
      read: shapes of that.
      shape: of what it makes.
      flow: what it does to channels.
    """
    alike = all(r[-1:] == shape[-1:] for r in read)
    match node.op:
        case _ if flow.factors and alike:
            return xs[0], tuple((xs[0], x) for x in xs[1:])
        case Slice(bounds):
            start, stop, step = bounds[-1]
            return xs[0].picked(slice(start, stop, step)), ()
        case Concat(axis):
            return joined(xs, axis % len(shape) == len(shape) - 1)
        case Mul() | Div():
            return multiplied(xs, alike, 1.0 if isinstance(node.op, Mul) else -1.0)
        case Power(exponent):
            return ChannelFactors(xs[0].numbers, xs[0].powers * exponent), ()
        case Activation("sqrt"):
            return ChannelFactors(xs[0].numbers, xs[0].powers / 2), ()
        case Activation("abs") | Scale(_, 0.0):
            return xs[0], ()
        case Flatten() | Reshape() | Transpose() | DepthToSpace():
            return moved(node.op, xs[0], shape)
        case _:
            return no_factors(shape[-1] if shape else 1), untouched(xs)


def moved(
    op: Flatten | Reshape | Transpose | DepthToSpace, x: ChannelFactors, shape: Shape
) -> tuple[ChannelFactors, Ties]:
    """Values with other sizes, in another order, or as pixels: those of a block are alike."""
    count = len(x.numbers)
    match op:
        case Flatten() | Reshape() if shape[-1] % count == 0:
            return x.picked(np.arange(shape[-1]) % count), ()
        case Transpose(order) if order[-1] == len(order) - 1:
            return x, ()
        case DepthToSpace(block, inner):
            places = np.arange(count)
            rows = places.reshape(-1, block**2).T if inner else places.reshape(block**2, -1)
            first = x.picked(rows[0])
            return first, tuple((first, x.picked(row)) for row in rows[1:])
        case _:
            return no_factors(shape[-1] if shape else 1), untouched((x,))


def joined(xs: tuple[ChannelFactors, ...], channels: bool) -> tuple[ChannelFactors, Ties]:
    """Tensors side by side; along other axes than channels all have the same factors."""
    if not channels:
        return xs[0], tuple((xs[0], x) for x in xs[1:])
    return ChannelFactors(*map(np.concatenate, zip(*xs, strict=True))), ()


def multiplied(
    xs: tuple[ChannelFactors, ...], alike: bool, sign: float
) -> tuple[ChannelFactors, Ties]:
    """A product or quotient: of two different factors the second tensor's goes."""
    x, y = xs
    if not alike:
        if len(y.numbers) == 1:
            return x, untouched((y,))
        return no_factors(max(len(x.numbers), len(y.numbers))), untouched(xs)
    none = y.numbers == 0
    same = (x.numbers == y.numbers) & ~none
    alone = (x.numbers == 0) & ~none
    gone = ~(none | same | alone)
    powers = np.where(none | gone, x.powers, np.where(same, x.powers, 0.0) + sign * y.powers)
    numbers = np.where(alone, y.numbers, x.numbers)
    return ChannelFactors(numbers, powers), untouched((y.picked(np.flatnonzero(gone)),))


def untouched(xs: Iterable[ChannelFactors]) -> Ties:
    """None of these channels may have a factor."""
    return tuple((x, ChannelFactors(np.zeros_like(x.numbers), x.powers)) for x in xs)


def families(found: Mapping[str, ChannelFactors]) -> list[tuple[int, ...]]:
    """Factors that meet in one tensor, transitively, as ascending numbers; in execution order."""
    tied = Tied()
    for powers in found.values():
        here = np.unique(powers.numbers[powers.numbers > 0])
        tied.tie([(here[:1].repeat(len(here)), here)] if len(here) else [])
    every = np.unique(np.concatenate([p.numbers for p in found.values()] or [np.zeros(1, int)]))
    gathered: dict[int, list[int]] = {}
    for number in every[every > 0].tolist():
        gathered.setdefault(tied.root(number), []).append(number)
    return [tuple(numbers) for numbers in gathered.values()]
