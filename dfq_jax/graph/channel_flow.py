"""How every operator maps the channels of what it reads to those of what it makes.

Every position along every axis of a tensor bears a label. Positions with one label can be removed
only together; label 0 marks those that stay. An operator passes labels on as they are (pointwise,
pooling), beside others (concat), a part of them (slice), several times (flatten), in another order
(transpose), ties some together (sums; grouped convolutions and norms), or makes them stay, since
it mixes positions in a way that a missing one would change (softmax, layer norm).
"""

from collections.abc import Iterable, Mapping
from typing import assert_never

from dfq_jax.graph.channel_moves import beside, cut, padded_labels, regrouped, repeated_labels
from dfq_jax.graph.labels import (
    Axes,
    Flow,
    Labels,
    Read,
    alike,
    alone,
    broadcast_labels,
    fixed,
    labelled,
    own_labels,
    stay,
)
from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    BatchNorm,
    Broadcast,
    Clip,
    Combine,
    Compare,
    Concat,
    Constant,
    Conv2d,
    ConvTranspose2d,
    Div,
    Elu,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    LayerNorm,
    LeakyRelu,
    Linear,
    LocalNorm,
    LogSoftmax,
    MatMul,
    Maximum,
    MaxPool,
    Minimum,
    Mul,
    Op,
    Pad,
    Pointwise,
    Power,
    PRelu,
    Recurrent,
    Reduce,
    Relu,
    Reshape,
    Resize,
    Scale,
    Select,
    Slice,
    Softmax,
    Sub,
    Transpose,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.token_ops import Column, Embed, Leading, Present, RmsNorm, Rotary
from dfq_jax.graph.volume_ops import Conv3d

Shapes = Mapping[str, tuple[int, ...]]
"""{slot: shape}"""


def channel_flow(  # noqa: C901 - one case per family
    op: Op, xs: tuple[Read, ...], slots: Shapes, shape: tuple[int, ...], first: int
) -> Flow:
    """What one operator does to the channels of its inputs.

    Args:
      op: the operator.
      xs: what it reads.
      slots: shapes of its parameters.
      shape: of what it makes.
      first: the first label nobody has; those it makes count from there.
    """
    match op:
        case Conv2d() | ConvTranspose2d() | Conv3d():
            return convolved(op.groups, xs[0], slots, shape, first)
        case Linear():
            return multiplied(xs[0], slots, shape, first)
        case MatMul(transposed):
            return product_of(xs[0], xs[1], transposed)
        case Recurrent():
            return remembered(xs[0], slots, shape)
        case BatchNorm():
            return standardised(xs[0], slots)
        case GroupNorm(groups):
            return normed(groups, xs[0], slots, shape)
        case LayerNorm() | RmsNorm() | LocalNorm():
            return whole(xs[0], (-1,), shape)
        case Softmax(axis) | LogSoftmax(axis):
            return whole(xs[0], (axis,), shape)
        case Relu() | LeakyRelu() | PRelu() | Clip() | Elu() | Activation() | Scale() | Power():
            return pointwise(op, xs[0], slots)
        case Add() | Sub() | Mul() | Div() | Maximum() | Minimum() | Compare():
            return combined(op, xs[0], xs[1])
        case Select():
            return chosen(xs)
        case MaxPool() | AvgPool() | AdaptiveAvgPool() | Resize():
            return whole(xs[0], (1, 2), shape)._replace(silent=xs[0].silent, factors=True)
        case GlobalAvgPool(keepdims):
            return reduced("mean", (1, 2), keepdims, xs[0])
        case Reduce(kind, axes, keepdims):
            return reduced(kind, axes, keepdims, xs[0])
        case Flatten() | Reshape() | DepthToSpace():
            return in_blocks(op, xs[0], shape)
        case Transpose(order):
            return Flow(tuple(xs[0].axes[axis] for axis in order), xs[0].silent)
        case Slice(bounds):
            return cut(bounds, xs[0])
        case Concat(axis):
            return beside(axis % len(shape), xs)
        case Broadcast():
            return repeated_labels(xs[0], shape, first)
        case Pad():
            return padded_labels(op, xs[0], first)
        case Column() | Leading() | Embed() | Present() | Rotary():
            return Flow(tuple(map(stay, shape)), ties=fixed(*xs[0].axes))
        case Constant():
            axes = own_labels(shape, first)
            return Flow(axes, slots={"value": axes})
        case _:
            assert_never(op)


def whole(x: Read, axes: Iterable[int], shape: tuple[int, ...]) -> Flow:
    """An operator that mixes positions along some axes, and treats those of others alike."""
    mixed = {axis % len(shape) for axis in axes}
    made = [stay(shape[a]) if a in mixed else labels for a, labels in enumerate(x.axes)]
    return Flow(tuple(made), ties=fixed(*(x.axes[a] for a in mixed)))


# Layers


def in_blocks(op: Flatten | Reshape | DepthToSpace, x: Read, shape: tuple[int, ...]) -> Flow:
    """Values with other sizes; of channels that become pixels all of a block go together."""
    if not isinstance(op, DepthToSpace):
        return regrouped(x, shape)
    block = op.block**2
    channels = x.axes[-1]
    rows = channels.reshape(-1, block).T if op.inner else channels.reshape(block, -1)
    ties = (*fixed(*x.axes[1:-1]), *alike(rows))
    return Flow((*map(stay, shape[:-1]), rows[0]), x.silent, ties)


def convolved(groups: int, x: Read, slots: Shapes, shape: tuple[int, ...], first: int) -> Flow:
    """A convolution makes channels; one in groups loses as many of each, or whole groups.

    Of both it is what leaves more to choose from: whole groups where there are many, as in a
    depthwise convolution.
    """
    made = own_labels((1, shape[-1]), first)[-1]
    channels, ties = x.axes[-1], fixed(*x.axes[1:-1])
    kernel = (*map(stay, slots["kernel"][:-2]), channels, made)
    if groups > 1:
        read, written = channels.reshape(groups, -1), made.reshape(groups, -1)
        if groups >= read.shape[1] + written.shape[1]:
            ties += (*alike(read.T), *alike(written.T), (read[:, 0], written[:, 0]))
            kernel = (*kernel[:-2], stay(read.shape[1]), made)
        else:
            ties += (*alike(read), *alike(written))
            kernel = (*kernel[:-2], read[0], made)
    axes = (*map(stay, shape[:-1]), made)
    return Flow(axes, True, ties, {"kernel": kernel, **bias(slots, made)})


def bias(slots: Shapes, made: Labels) -> dict[str, Axes]:
    """The bias of a layer that makes these channels, where it has one."""
    return {"bias": (made,)} if "bias" in slots else {}


def multiplied(x: Read, slots: Shapes, shape: tuple[int, ...], first: int) -> Flow:
    """A linear layer makes channels, and passes on all axes but the last."""
    made = own_labels((1, shape[-1]), first)[-1]
    silent = alone(x.axes) or (x.silent and "bias" not in slots)
    kernel = (x.axes[-1], made)
    return Flow((*x.axes[:-1], made), silent, slots={"kernel": kernel, **bias(slots, made)})


def product_of(x: Read, y: Read, transposed: bool) -> Flow:
    """A product of two tensors: what it sums over is removed from both of them."""
    columns, summed = (-2, -1) if transposed else (-1, -2)
    inner = (x.axes[-1], y.axes[summed])
    ties = (inner,) if x.silent or y.silent else fixed(*inner)
    axes, more = broadcast_labels(x.axes[:-2], y.axes[:-2])
    made = (*axes, x.axes[-2], y.axes[columns])
    silent = (x.silent or not x.axes[-2].any()) and (y.silent or not y.axes[columns].any())
    return Flow(made, silent and (x.silent or y.silent or not labelled(axes)), ties + more)


def remembered(x: Read, slots: Shapes, shape: tuple[int, ...]) -> Flow:
    """A recurrent layer reads channels; its own feed each other and stay."""
    weights = (x.axes[-1], stay(slots["input"][-1]))
    made = tuple(map(stay, shape))
    return Flow(made, ties=fixed(*x.axes[1:-1]), slots={"input": weights})


def standardised(x: Read, slots: Shapes) -> Flow:
    """A batch norm treats every channel by itself."""
    silent = alone(x.axes) and (x.silent or "scale" in slots)
    return Flow(x.axes, silent, slots={slot: x.axes[-1:] for slot in slots})


def normed(groups: int, x: Read, slots: Shapes, shape: tuple[int, ...]) -> Flow:
    """A group norm loses whole groups, as their statistics are their own."""
    mixed = range(1, len(shape) - 1)
    if groups == 1:
        return whole(x, (*mixed, -1), shape)
    ties = fixed(*(x.axes[a] for a in mixed)) + alike(x.axes[-1].reshape(groups, -1).T)
    axes = (*map(stay, shape[:-1]), x.axes[-1])
    silent = x.silent or "scale" in slots
    return Flow(axes, silent, ties, {slot: x.axes[-1:] for slot in slots})


# Elementwise


def pointwise(op: Pointwise, x: Read, slots: Shapes) -> Flow:
    """A function of each element alone."""
    zero = at_zero(op)
    if zero is None:
        return Flow(tuple(stay(len(labels)) for labels in x.axes), ties=fixed(*x.axes))
    slopes = {s: x.axes[-1:] for s, (size,) in slots.items() if size == len(x.axes[-1])}
    return Flow(x.axes, x.silent and zero == 0, slots=slopes, factors=homogeneous(op))


def homogeneous(op: Op) -> bool:
    """Whether an activation has `f(s x) = s f(x)` for every channel and every s > 0."""
    return isinstance(op, LeakyRelu | PRelu) or (isinstance(op, Relu) and op.ceiling is None)


def at_zero(op: Pointwise) -> float | None:
    """Zero where a function maps zero to it, None where it has no value there, else 1."""
    match op:
        case Relu() | LeakyRelu() | PRelu() | Elu():
            return 0.0
        case Clip(low, high):
            return float((low is not None and low > 0) or (high is not None and high < 0))
        case Scale(_, offset):
            return float(offset != 0)
        case Power(exponent):
            return None if exponent < 0 else float(exponent == 0)
        case Activation(curve):
            if curve == "log":
                return None
            return float(curve in ("sigmoid", "hard_sigmoid", "softplus", "exp"))
        case _:
            assert_never(op)


def combined(op: Combine, x: Read, y: Read) -> Flow:
    """Two tensors, element by element; what one of them broadcasts is not removed from it."""
    axes, ties = broadcast_labels(x.axes, y.axes)
    zeros = [silent_along(axes, part) for part in (x, y)]
    match op:
        case Add() | Sub() | Maximum() | Minimum():
            return Flow(axes, all(zeros), ties, factors=True)
        case Mul():
            return Flow(axes, any(zeros), ties)
        case Div():
            nothing = fixed(*x.axes, *y.axes) if y.silent and labelled(y.axes) else ()
            return Flow(axes, zeros[0], ties + nothing)
        case Compare(relation):
            return Flow(axes, all(zeros) and relation in ("greater", "less"), ties)
        case _:
            assert_never(op)


def chosen(xs: tuple[Read, ...]) -> Flow:
    """One of two tensors, element by element, as a third says."""
    axes, ties = broadcast_labels(xs[1].axes, xs[2].axes)
    axes, more = broadcast_labels(axes, xs[0].axes)
    return Flow(axes, all(silent_along(axes, part) for part in xs[1:]), ties + more)


def silent_along(axes: Axes, part: Read) -> bool:
    """Whether an operand is zero where positions along these axes could be removed.

    It is not where it is broadcast.
    """
    removable = [at - len(axes) for at, labels in enumerate(axes) if labels.any()]
    full = (len(part.axes) >= -at and len(part.axes[at]) == len(axes[at]) for at in removable)
    return part.silent and all(full)


def reduced(kind: str, axes: tuple[int, ...], keepdims: bool, x: Read) -> Flow:
    """One value for all positions along some axes; a sum does not miss those that are zero."""
    rank = len(x.axes)
    gone = {axis % rank for axis in axes}
    spared = kind in ("sum", "l2") and x.silent
    ties = () if spared else fixed(*(x.axes[a] for a in gone))
    left = [stay(1) if a in gone else v for a, v in enumerate(x.axes) if keepdims or a not in gone]
    return Flow(tuple(left), x.silent, ties, factors=rank - 1 not in gone)
