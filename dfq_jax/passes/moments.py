"""Propagates batch-norm moments through a folded network, and corrects biases with them.

A network with parameters of NumPy is looked at in NumPy: many shapes of layers need no program.
"""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from jaxtyping import Float

from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import (
    WEIGHTED,
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    Broadcast,
    Clip,
    Concat,
    Constant,
    Conv2d,
    ConvTranspose2d,
    Elu,
    GlobalAvgPool,
    LeakyRelu,
    MaxPool,
    Mul,
    Op,
    Pad,
    PRelu,
    Reduce,
    Relu,
    Reshape,
    Resize,
    Scale,
    Slice,
    Sub,
    Transpose,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.query import constants, output_shapes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.semantics import Slots, bent, pointwise
from dfq_jax.graph.token_ops import Embed, Leading
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.numerics.affine import NumpyOrJax, namespace
from dfq_jax.numerics.gaussian import clipped_normal, curve_of_normal, leaky_normal
from dfq_jax.types import Moments
from dfq_jax.values import bound

Shape = tuple[int, ...]


class Around(NamedTuple):
    """What a node's moments depend on beside those of its inputs.

    Attributes:
      slots: its parameters.
      read: shapes of its inputs, batch first.
      made: shape of its output.
      fixed: for each input whether it is the same for every image.
    """

    slots: Slots
    read: tuple[Shape, ...]
    made: Shape
    fixed: tuple[bool, ...]


def expected_moments(model: Model) -> dict[str, Moments]:
    """{tensor: mean and variance per channel} wherever batch-norm statistics determine them.

    Channels are the last axis. A layer that had a batch norm restarts from the recorded moments.
    Activations take a normal variable through their curve; addition adds means and (as if
    independent) variances; concatenation and slices of channels, and their shuffling by reshape
    and transpose, move moments along; pooling keeps those of its input, which for max pooling is a
    lower bound of the mean. A product of two images has none, nor has a layer norm. What ids look
    up has those of its table.
    """
    known, shapes, fixed = dict(model.moments), output_shapes(model), constants(model.graph)
    for node in model.graph.nodes:
        told = isinstance(node.op, Embed | Leading) or all(i in known for i in node.inputs)
        if node.name in known or not told:
            continue
        read = tuple(shapes[i] for i in node.inputs)
        slots = model.params.get(node.name, {})
        around = Around(slots, read, shapes[node.name], tuple(i in fixed for i in node.inputs))
        moments = propagated(node.op, [known[i] for i in node.inputs if i in known], around)
        if moments is not None:
            known[node.name] = moments
    return {name: moments for name, moments in known.items() if moments.mean.ndim == 1}


def propagated(op: Op, inputs: list[Moments], around: Around) -> Moments | None:
    """Moments of an operator's output from those of its inputs, None if they do not tell.

    Moments are arrays over the last axis; between a reshape that splits channels and the one that
    joins them, over the last axes.
    """
    match op:
        case Constant() | Leading():
            value = around.slots["value"]
            axes = tuple(range(value.ndim - 1))
            return Moments(value.mean(axes), value.var(axes))
        case Embed():  # any row of its table may be looked up
            table = around.slots["table"]
            return Moments(table.mean(0), table.var(0))
        case Reshape() | Transpose() | Broadcast():
            return rearranged(op, inputs[0], around)
        case _ if any(m.mean.ndim != 1 for m in inputs):
            return None
        case Relu() | Clip() | LeakyRelu() | PRelu() | Elu() | Activation() | Scale():
            return bent_moments(op, inputs[0], around.slots)
        case Add() | Sub() | Mul():
            return combined(op, inputs, around.fixed)
        case _:
            return pooled_or_joined(op, inputs, around)


def bent_moments(
    op: Relu | Clip | LeakyRelu | PRelu | Elu | Activation | Scale, x: Moments, slots: Slots
) -> Moments | None:
    """Moments behind a function of each element alone."""
    match op:
        case Relu(ceiling):
            return clipped_normal(x, ceiling)
        case Clip(low, high):
            return limited_moments(x, low, high)
        case LeakyRelu(slope):
            return leaky_normal(x, slope)
        case PRelu():
            return leaky_normal(x, slots["slope"])
        case Activation("exp" | "sqrt" | "log"):
            return None
        case Activation(curve):
            return curve_of_normal(bound(bent, curve), x)
        case Elu():
            return curve_of_normal(bound(pointwise, op, {}), x)
        case Scale(factor, offset):
            return Moments(factor * x.mean + offset, factor**2 * x.var)


def limited_moments(x: Moments, low: float | None, high: float | None) -> Moments:
    """Moments of a normal variable limited to [low, high]; None leaves an end open."""
    if low is not None:
        above = clipped_normal(Moments(x.mean - low, x.var), None if high is None else high - low)
        return Moments(above.mean + low, above.var)
    if high is not None:
        below = clipped_normal(Moments(high - x.mean, x.var), None)
        return Moments(high - below.mean, below.var)
    return x


def combined(op: Add | Sub | Mul, inputs: list[Moments], fixed: tuple[bool, ...]) -> Moments | None:
    """Moments of two tensors taken together, as if independent."""
    a, b = inputs
    match op:
        case Add():
            return Moments(a.mean + b.mean, a.var + b.var)
        case Sub():
            return Moments(a.mean - b.mean, a.var + b.var)
        case Mul() if any(fixed):
            var = a.var * b.var + a.var * b.mean**2 + b.var * a.mean**2
            return Moments(a.mean * b.mean, var)
        case Mul():
            return None


def pooled_or_joined(op: Op, inputs: list[Moments], around: Around) -> Moments | None:
    """Moments behind operators that mix positions, or choose among channels."""
    x, last = inputs[0] if inputs else None, len(around.made) - 1
    match op:
        case MaxPool() | AvgPool() | AdaptiveAvgPool() | GlobalAvgPool() | Resize():
            return x
        case Reduce("mean" | "max", axes) if not {-1, len(around.read[0]) - 1} & set(axes):
            return x
        case DepthToSpace(block, inner) if x is not None:
            return mixture(x, block**2, inner=inner)
        case Slice(bounds) if x is not None:
            first, stop, step = bounds[-1]
            return Moments(x.mean[first:stop:step], x.var[first:stop:step])
        case Concat(axis) if axis in (-1, last):
            means, variances = zip(*inputs, strict=True)
            xp = namespace(*means)
            return Moments(xp.concatenate(means), xp.concatenate(variances))
        case Pad(widths, value, mode) if x is not None:
            if mode == "constant" and value == 0:
                return each(x, lambda v: namespace(v).pad(v, widths[-1]))
            return x if mode != "constant" and widths[-1] == (0, 0) else None
        case _:
            return None


def mixture(x: Moments, block: int, *, inner: bool) -> Moments:
    """Moments of channels that each hold the values of so many others, side by side or not."""
    parts = each(x, lambda v: v.reshape(-1, block) if inner else v.reshape(block, -1).T)
    return Moments(parts.mean.mean(1), parts.var.mean(1) + parts.mean.var(1))


def rearranged(op: Reshape | Transpose | Broadcast, x: Moments, around: Around) -> Moments | None:
    """Moments of the same values in another order, if the last axes still tell channels apart."""
    kept = x.mean.ndim
    match op:
        case Reshape():
            tail = next((t for t in tails(around.made) if prod(t) == x.mean.size), None)
            return None if tail is None else each(x, lambda v: v.reshape(tail))
        case Transpose(order):
            first = len(order) - kept
            moved = tuple(axis - first for axis in order[first:])
            return each(x, lambda v: v.transpose(moved)) if min(moved) >= 0 else None
        case Broadcast():
            return each(x, lambda v: namespace(v).broadcast_to(v, around.made[-kept:]))


def tails(shape: Shape) -> list[Shape]:
    """The last axis, the last two, … of a shape, without the batch."""
    return [shape[-count:] for count in range(1, len(shape))]


def each(moments: Moments, change) -> Moments:
    """Mean and variance changed alike."""
    return Moments(change(moments.mean), change(moments.var))


def correct_biases_analytically(
    model: Model, quantized_kernels: Mapping[str, Float[NumpyOrJax, "..."]]
) -> Model:
    """Removes the mean output shift that rounding the kernels causes, without any image.

    Args:
      model: folded float network with moments.
      quantized_kernels: {layer: kernel after quantization, as floats}.

    Returns:
      The network with `b -= sum (W_q - W) E[x]` in every layer whose input moments are known.

    Reference:
      Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction".
    """
    known = expected_moments(model)
    biases = {}
    for node in model.graph.nodes:
        if not isinstance(node.op, WEIGHTED) or node.name not in quantized_kernels:
            continue
        if node.inputs[0] not in known:
            continue
        slots = model.params[node.name]
        gap = quantized_kernels[node.name] - slots["kernel"]
        shift = mean_output(node, gap, known[node.inputs[0]].mean)
        biases[node.name] = {"bias": slots["bias"] - shift if "bias" in slots else -shift}
    return with_params(model, biases)


def mean_output(
    node: Node, kernel: Float[NumpyOrJax, "..."], mean: Float[NumpyOrJax, " cin"]
) -> Float[NumpyOrJax, " cout"]:
    """Mean output of a weighted node without bias for inputs of constant `mean`."""
    match node.op:
        case Conv2d(groups=groups) | Conv3d(groups=groups):
            return expected_output(kernel, mean, groups)
        case ConvTranspose2d(strides=strides, groups=groups):  # a tap reaches 1 pixel in so many
            return expected_output(kernel, mean, groups) / prod(strides)
        case _:
            return expected_output(kernel, mean)


def expected_output(
    kernel: Float[NumpyOrJax, "..."], mean: Float[NumpyOrJax, " cin"], groups: int = 1
) -> Float[NumpyOrJax, " cout"]:
    """Mean output of a layer for inputs of constant `mean`, borders ignored."""
    flat = kernel.reshape(-1, *kernel.shape[-2:]).sum(0)
    cin, cout = flat.shape
    per_group = flat.reshape(cin, groups, cout // groups)
    einsum = namespace(kernel, mean).einsum
    return einsum("kgo,gk->go", per_group, mean.reshape(groups, cin)).reshape(cout)
