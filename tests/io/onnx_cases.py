"""Cases of every operator over its attributes and layouts."""

import dataclasses
from collections.abc import Callable
from typing import get_args

import numpy as np
from hypothesis import strategies as st
from onnx_forms import (
    RNG,
    Case,
    Draw,
    alone,
    any_form,
    cuts,
    forms,
    image_forms,
    normal,
    numbers,
    pairs,
    prefix,
    shapes,
    wide,
)

from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    BatchNorm,
    Broadcast,
    Clip,
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
    Pad,
    Power,
    PRelu,
    Recurrent,
    Reduce,
    Relation,
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


def convolutions(draw: Draw) -> Case:
    groups = draw(st.sampled_from((1, 2, 4)))
    kernel, shape = draw(pairs), draw(shapes(4))
    op = Conv2d(draw(pairs), draw(wide), groups, draw(pairs) if draw(st.booleans()) else (1, 1))
    if max((k - 1) * d for k, d in zip(kernel, op.dilation, strict=True)) > 4:
        op = Conv2d(op.strides, op.padding, groups)
    slots = {"kernel": normal(*kernel, 4 // groups, 2 * groups)}
    if draw(st.booleans()):
        slots["bias"] = normal(2 * groups)
    return alone(op, draw(image_forms), shape, **slots)


def transposed_convolutions(draw: Draw) -> Case:
    groups = draw(st.sampled_from((1, 2, 4)))
    kernel, strides, dilation = draw(pairs), draw(pairs), draw(pairs)
    most = [max(s, d) for s, d in zip(strides, dilation, strict=True)]
    extra = (draw(st.integers(0, most[0] - 1)), draw(st.integers(0, most[1] - 1)))
    op = ConvTranspose2d(strides, draw(cuts), groups, dilation, extra)
    slots = {"kernel": normal(*kernel, 4 // groups, 3 * groups)}
    if draw(st.booleans()):
        slots["bias"] = normal(3 * groups)
    return alone(op, draw(image_forms), draw(shapes(4)), **slots)


def linears(draw: Draw) -> Case:
    shape, out = draw(shapes()), draw(st.integers(1, 5))
    slots = {"kernel": normal(shape[2], out)}
    if draw(st.booleans()):
        slots["bias"] = normal(out)
    return alone(Linear(), draw(forms), shape, **slots)


def matmuls(draw: Draw) -> Case:
    h, w, c = shape = draw(shapes())
    transposed = draw(st.booleans())
    if draw(st.booleans()):
        nodes = (Node("a", Reshape((h * w, c)), ("images",)),)
        names = ("a", "a") if transposed else ("a", "b")
        nodes += () if transposed else (Node("b", Transpose((0, 2, 1)), ("a",)),)
    else:
        nodes = (Node("a", LeakyRelu(), ("images",)),)
        names = ("images", "a") if transposed else ("images", "b")
        nodes += () if transposed else (Node("b", Transpose((0, 1, 3, 2)), ("a",)),)
    return Case((*nodes, Node("op", MatMul(transposed), names)), {}, shape)


def batch_norms(draw: Draw) -> Case:
    shape = draw(shapes())
    c = shape[2]
    slots = {"mean": normal(c), "var": normal(c) ** 2 + 0.1}
    for slot in draw(st.sets(st.sampled_from(("scale", "bias")))):
        slots[slot] = normal(c)
    return alone(BatchNorm(draw(st.sampled_from((1e-5, 1e-2)))), draw(forms), shape, **slots)


def normalisations(draw: Draw) -> Case:
    shape, eps = draw(shapes(6)), draw(st.sampled_from((1e-6, 1e-2)))
    op = draw(st.sampled_from((LayerNorm(eps), *(GroupNorm(g, eps) for g in (1, 2, 3)))))
    slots = {s: normal(6) for s in draw(st.sets(st.sampled_from(("scale", "bias"))))}
    return alone(op, draw(forms), shape, **slots)


def local_norms(draw: Draw) -> Case:
    op = LocalNorm(draw(st.sampled_from((1, 3, 7))), draw(st.sampled_from((1e-4, 2.0))), 0.75, 1.5)
    return alone(op, draw(image_forms), draw(shapes(5)))


def recurrences(draw: Draw) -> Case:
    cell, gates = draw(st.sampled_from((("lstm", 4), ("gru", 3), ("tanh", 1), ("relu", 1))))
    shape, hidden = draw(shapes()), draw(st.integers(1, 4))
    op = Recurrent(cell, draw(st.booleans()), draw(st.booleans()))
    if cell == "lstm":
        op = dataclasses.replace(op, remembers=draw(st.booleans()))
    rows = gates * hidden
    weights = {"input": 0.3 * normal(shape[2], rows), "state": 0.3 * normal(hidden, rows)}
    return alone(op, "tokens", shape, **weights, bias=normal(rows), state_bias=normal(rows))


def prelus(draw: Draw) -> Case:
    shape = draw(shapes())
    return alone(PRelu(), draw(forms), shape, slope=normal(draw(st.sampled_from((1, shape[2])))))


def clips(draw: Draw) -> Case:
    ends = st.none() | numbers
    low, high = draw(ends), draw(ends)
    if low is not None and high is not None:
        low, high = min(low, high), max(low, high)
    op = draw(
        st.sampled_from(
            (Clip(low, high), Relu(), Relu(1.5), LeakyRelu(0.3), Elu(0.3), Elu(1.6, 0.5))
        )
    )
    return alone(op, draw(forms), draw(shapes()))


def combinations(draw: Draw) -> Case:
    """Two tensors; the second is as large, has axes of size 1, or is a constant of one row."""
    h, w, c = shape = draw(shapes())
    op = draw(st.sampled_from((Add(), Sub(), Mul(), Div(), Maximum(), Minimum(), *COMPARISONS)))
    form = draw(forms)
    nodes, own = prefix(form, shape)
    first = nodes[-1].name if nodes else "images"
    kind = draw(st.sampled_from(("same", "thin", "constant", "other layout")))
    if kind == "constant":
        sizes = [draw(st.sampled_from((1, s))) for s in own]
        value = RNG.uniform(0.5, 2.0, size=(1, *sizes))
        extra, params = (Node("second", Constant(), ()),), {"second": {"value": value}}
    elif kind == "thin" and len(own) == 3:
        axes = draw(st.sampled_from(((1,), (2,), (3,), (1, 2), (-1, 1))))
        extra = (Node("thin", Reduce("l2", axes, True), (first,)),)
        extra, params = (*extra, Node("second", Scale(1.0, 0.5), ("thin",))), {}
    elif kind == "other layout" and form == "first":
        extra = (
            Node("flat", Reshape((c * h * w,)), ("images",)),
            Node("again", Reshape((h, w, c)), ("flat",)),
            Node("second", Activation("exp"), ("again",)),
        )
        params = {}
    else:
        extra, params = (Node("second", Activation("exp"), (first,)),), {}
    names = (first, "second") if draw(st.booleans()) or op == Div() else ("second", first)
    return Case((*nodes, *extra, Node("op", op, names)), params, shape)


def selections(draw: Draw) -> Case:
    """One of two tensors, by another; each is as large, has axes of size 1, or is a number."""
    form, shape = draw(forms), draw(shapes())
    nodes, own = prefix(form, shape)
    first = nodes[-1].name if nodes else "images"
    zero = Node("zero", Constant(), ())
    which = Node("which", Compare("greater"), (first, "zero"))
    row = Node("row", Constant(), ())
    far = Node("far", Activation("exp"), (first,))
    sizes = (1, *(draw(st.sampled_from((1, s))) for s in own))
    params = {"zero": {"value": np.zeros((1,) * len(sizes))}, "row": {"value": normal(*sizes)}}
    sources = draw(st.permutations((first, "row", "far")))[:2]
    op = Node("op", Select(), ("which", *sources))
    return Case((*nodes, zero, which, row, far, op), params, shape)


def pools(draw: Draw) -> Case:
    window, strides, shape = draw(pairs), draw(pairs), draw(shapes())
    inside = lambda size: st.integers(0, size - 1)
    padding = tuple((draw(inside(size)), draw(inside(size))) for size in window)
    if draw(st.booleans()):
        op = AvgPool(window, strides, (padding[0], padding[1]), draw(st.booleans()))
    else:
        dilation = draw(st.sampled_from(((1, 1), (2, 1), (1, 2))))
        edges = st.integers(-1, 0)
        crop = ((draw(edges), draw(edges)), (draw(edges), draw(edges)))
        pick = draw(st.booleans()) and dilation == (1, 1)
        op = MaxPool(window, strides, crop if pick else (padding[0], padding[1]), dilation)
    return alone(op, draw(image_forms), shape)


def whole_pools(draw: Draw) -> Case:
    shape = draw(shapes())
    size = st.integers(1, 10)
    adaptive = AdaptiveAvgPool((draw(size), draw(size)))
    op = draw(st.sampled_from((adaptive, GlobalAvgPool(), GlobalAvgPool(keepdims=True))))
    return alone(op, draw(image_forms), shape)


def reductions(draw: Draw) -> Case:
    shape, form = draw(shapes()), draw(forms)
    rank = 1 + len(prefix(form, shape)[1])
    axes = draw(st.sets(st.integers(1, rank - 1), min_size=1))
    signed = tuple(a - rank if draw(st.booleans()) else a for a in axes)
    kind = draw(st.sampled_from(("mean", "sum", "max", "l2")))
    return alone(Reduce(kind, signed, draw(st.booleans())), form, shape)


def softmaxes(draw: Draw) -> Case:
    shape, form = draw(shapes()), draw(forms)
    rank = 1 + len(prefix(form, shape)[1])
    axis = draw(st.integers(1, rank - 1))
    kind = draw(st.sampled_from((Softmax, LogSoftmax)))
    return alone(kind(axis - rank if draw(st.booleans()) else axis), form, shape)


def reshapes(draw: Draw) -> Case:
    h, w, c = shape = draw(st.sampled_from(((4, 6, 2), (6, 4, 3), (1, 1, 6))))
    options = ((h * w * c,), (h * w, c), (w, h, c), (c, h, w), (1, 1, h * w * c), (1, h, w, 1, c))
    op = Reshape(draw(st.sampled_from((*options, (h, w, c, 1)))))
    return alone(op, draw(st.sampled_from(("first", "stored", "tokens", "split", "cut"))), shape)


def transposes(draw: Draw) -> Case:
    """Two in a row, so that the second finds any layout."""
    shape, form = draw(shapes()), draw(forms)
    rank = 1 + len(prefix(form, shape)[1])
    orders = st.permutations(range(1, rank)).map(lambda p: (0, *p))
    case = alone(Transpose(draw(orders)), form, shape)
    second = (Node("again", Transpose(draw(orders)), ("op",)),)
    second += (Node("after", Relu(), ("again",)),) if draw(st.booleans()) else ()
    return Case(case.nodes + second, {}, shape)


def slices(draw: Draw) -> Case:
    shape, form = draw(shapes()), draw(forms)
    bounds: list[tuple[int, int | None, int]] = [(0, None, 1)]
    for size in prefix(form, shape)[1]:
        options = [(0, None, 1), (0, size, 1), (0, None, 2), (size - 1, None, -1), (-1, None, -2)]
        options += [(1, None, 1), (1, -1, 1)] if size > 2 else []
        bounds.append(draw(st.sampled_from(options)))
    return alone(Slice(tuple(bounds)), form, shape)


def concatenations(draw: Draw) -> Case:
    """Of tensors of several layouts, or with a constant of one row."""
    shape, form = draw(shapes()), draw(forms)
    nodes, own = prefix(form, shape)
    first = nodes[-1].name if nodes else "images"
    axis = draw(st.integers(1, len(own)))
    params = {}
    if draw(st.booleans()):
        value = normal(1, *own[: axis - 1], 2, *own[axis:])
        nodes, params = (*nodes, Node("second", Constant(), ())), {"second": {"value": value}}
    else:
        nodes = (*nodes, Node("second", LayerNorm(), (first,)))
    names = draw(st.permutations((first, "second", first)))
    axis = axis - 1 - len(own) if draw(st.booleans()) else axis
    return Case((*nodes, Node("op", Concat(axis), tuple(names))), params, shape)


def broadcasts(draw: Draw) -> Case:
    shape, form = draw(shapes(1)), draw(forms)
    nodes, own = prefix(form, shape)
    axes = draw(st.sets(st.integers(1, len(own)), min_size=1))
    first = nodes[-1].name if nodes else "images"
    thin = Node("thin", Reduce("mean", tuple(axes), True), (first,))
    return Case((*nodes, thin, Node("op", Broadcast(own), ("thin",))), {}, shape)


def paddings(draw: Draw) -> Case:
    shape, form = draw(shapes()), draw(forms)
    mode = draw(st.sampled_from(("constant", "reflect", "edge")))
    widths: list[tuple[int, int]] = [(0, 0)]
    for size in prefix(form, shape)[1]:
        most = st.integers(0, min(2, size - 1) if mode == "reflect" else 2)
        widths.append((draw(most), draw(most)))
    return alone(Pad(tuple(widths), draw(numbers), mode), form, shape)


def resizes(draw: Draw) -> Case:
    """Sizes that follow from a scale, scales that follow from a size, corners that meet."""
    h, w, c = draw(shapes())
    method = draw(st.sampled_from(("nearest", "bilinear", "bicubic")))
    inside = draw(st.booleans()) and method == "bicubic"
    smooth = draw(st.booleans()) and method == "bilinear"
    coordinates = draw(st.sampled_from(("half_pixel", "asymmetric", "align_corners")))
    if draw(st.booleans()):
        scales = st.sampled_from((0.5, 0.7, 1.0, 1.1, 1.3, 1.5, 2.0, 2.5, 3.0))
        scale = (draw(scales), draw(scales))
        size = (int(h * scale[0]), int(w * scale[1]))
    else:
        size = draw(st.tuples(st.integers(1, 17), st.integers(1, 17)))
        scale = (size[0] / h, size[1] / w)
    op = Resize(size, scale, method, coordinates, -0.6, inside, smooth)
    return alone(op, draw(image_forms), (h, w, c))


COMPARISONS = tuple(map(Compare, get_args(Relation)))
SCALES = (Scale(), Scale(2.0), Scale(1.0, -1.0), Scale(0.5, 3.0))
CASES: dict[str, Callable[[Draw], Case]] = {
    "convolution": convolutions,
    "transposed convolution": transposed_convolutions,
    "linear": linears,
    "matmul": matmuls,
    "batch norm": batch_norms,
    "layer and group norm": normalisations,
    "local norm": local_norms,
    "recurrent": recurrences,
    "prelu": prelus,
    "clip": clips,
    "scale": any_form(*SCALES, Power(2.0), Power(3.0)),
    "softmax": softmaxes,
    "two tensors": combinations,
    "selection": selections,
    "pool": pools,
    "whole pool": whole_pools,
    "reduction": reductions,
    "flatten": any_form(Flatten()),
    "reshape": reshapes,
    "transpose": transposes,
    "slice": slices,
    "concatenation": concatenations,
    "broadcast": broadcasts,
    "padding": paddings,
    "resize": resizes,
}
