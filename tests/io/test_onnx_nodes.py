"""Every operator, over its attributes and layouts: ONNX Runtime computes what we compute."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    BatchNorm,
    Broadcast,
    Clip,
    Concat,
    Constant,
    Conv2d,
    ConvTranspose2d,
    Curve,
    Div,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    LayerNorm,
    LeakyRelu,
    Linear,
    MatMul,
    Maximum,
    MaxPool,
    Mul,
    Op,
    Pad,
    Power,
    PRelu,
    Reduce,
    Relu,
    Reshape,
    Resize,
    Scale,
    Slice,
    Softmax,
    Sub,
    Transpose,
)
from dfq_jax.io import onnx_out
from dfq_jax.io.onnx_out import float_onnx, serialize
from dfq_jax.types import InputContract

EXAMPLES = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
RNG = np.random.default_rng(0)


Draw = Callable[[st.SearchStrategy], Any]


class Case(NamedTuple):
    """A small network around one operator."""

    nodes: tuple[Node, ...]
    params: dict[str, dict[str, np.ndarray]]
    shape: tuple[int, int, int]


def network(case: Case, *outputs: str) -> Model:
    """The network, returning its last node unless told otherwise."""
    h, w, c = case.shape
    params = {
        name: {slot: jnp.asarray(v, jnp.float32) for slot, v in slots.items()}
        for name, slots in case.params.items()
    }
    graph = Graph(case.nodes, ("images",), outputs or (case.nodes[-1].name,))
    return Model(graph, params, InputContract(h, w, (0.5,) * c, (0.25,) * c))


def agrees(onnx_nets: Any, model: Model, positive: bool = False) -> onnx.ModelProto:
    """Asserts that ONNX Runtime gives what `evaluate` gives, to 1e-5 of the largest output."""
    x = RNG.normal(size=(3, *model.contract.shape)).astype(np.float32)
    x = np.abs(x) + np.float32(0.5) if positive else x
    want = evaluate(model, jnp.asarray(x))[0]
    proto = float_onnx(model)
    for optimize in (False, True):
        found = onnx_nets.run_file(serialize(proto), x, optimize=optimize)
        for ours, theirs in zip(want, found, strict=True):
            largest = float(jnp.max(jnp.abs(ours)))
            assert np.isfinite(largest)
            np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5 * max(largest, 1e-3))
    return proto


def prefix(form: str, shape: tuple[int, int, int]) -> tuple[tuple[Node, ...], tuple[int, ...]]:
    """Nodes that bring images into a form, and the shape of the last one without rows."""
    h, w, c = shape
    match form:
        case "first":
            return (), shape
        case "stored":
            return (Node("in", Transpose((0, 2, 1, 3)), ("images",)),), (w, h, c)
        case "tokens":
            return (Node("in", Reshape((h * w, c)), ("images",)),), (h * w, c)
        case "split":
            return (Node("in", Reshape((h, w, 1, c)), ("images",)),), (h, w, 1, c)
        case "cut":
            return (Node("in", Reshape((1, h, w, c)), ("images",)),), (1, h, w, c)
        case _:
            return (Node("in", GlobalAvgPool(), ("images",)),), (c,)


def alone(op: Op, form: str, shape: tuple[int, int, int], **slots: np.ndarray) -> Case:
    """One operator behind its prefix."""
    nodes, _ = prefix(form, shape)
    name = nodes[-1].name if nodes else "images"
    return Case((*nodes, Node("op", op, (name,))), {"op": slots} if slots else {}, shape)


def normal(*shape: int) -> np.ndarray:
    """Normal numbers."""
    return RNG.normal(size=shape)


forms = st.sampled_from(("first", "stored", "tokens", "vector", "split", "cut"))
"""Images as they come; rank 4 held as stored; rank 3; rank 2; rank 5, held both ways."""
image_forms = st.sampled_from(("first", "stored"))
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
either_end = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))
wide = st.tuples(either_end(0, 2), either_end(0, 2))
cuts = st.tuples(either_end(0, 1), either_end(0, 1)) | st.tuples(
    either_end(-2, 1), either_end(-1, 1)
)
numbers = st.sampled_from((-2.0, -0.5, 0.0, 0.25, 1.0, 3.0))


def shapes(*channels: int) -> st.SearchStrategy[tuple[int, int, int]]:
    """(height, width, channels)."""
    size = st.integers(5, 9)
    return st.tuples(size, size, st.sampled_from(channels or (1, 4, 6)))


def any_form(*ops: Op) -> Callable[[Draw], Case]:
    """One of these operators in any form."""
    return lambda draw: alone(draw(st.sampled_from(ops)), draw(forms), draw(shapes()))


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


def prelus(draw: Draw) -> Case:
    shape = draw(shapes())
    return alone(PRelu(), draw(forms), shape, slope=normal(draw(st.sampled_from((1, shape[2])))))


def clips(draw: Draw) -> Case:
    ends = st.none() | numbers
    low, high = draw(ends), draw(ends)
    if low is not None and high is not None:
        low, high = min(low, high), max(low, high)
    op = draw(st.sampled_from((Clip(low, high), Relu(), Relu(1.5), LeakyRelu(0.3))))
    return alone(op, draw(forms), draw(shapes()))


def combinations(draw: Draw) -> Case:
    """Two tensors; the second is as large, has axes of size 1, or is a constant of one row."""
    h, w, c = shape = draw(shapes())
    op = draw(st.sampled_from((Add(), Sub(), Mul(), Div(), Maximum())))
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
    return alone(Softmax(axis - rank if draw(st.booleans()) else axis), form, shape)


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
    method = draw(st.sampled_from(("nearest", "bilinear")))
    coordinates = draw(st.sampled_from(("half_pixel", "asymmetric", "align_corners")))
    if draw(st.booleans()):
        scales = st.sampled_from((0.5, 0.7, 1.0, 1.1, 1.3, 1.5, 2.0, 2.5, 3.0))
        scale = (draw(scales), draw(scales))
        size = (int(h * scale[0]), int(w * scale[1]))
    else:
        size = draw(st.tuples(st.integers(1, 17), st.integers(1, 17)))
        scale = (size[0] / h, size[1] / w)
    return alone(Resize(size, scale, method, coordinates), draw(image_forms), (h, w, c))


CURVES = tuple(Activation(curve) for curve in get_args(Curve) if curve != "sqrt")
SCALES = (Scale(), Scale(2.0), Scale(1.0, -1.0), Scale(0.5, 3.0))
CASES: dict[str, Callable[[Draw], Case]] = {
    "convolution": convolutions,
    "transposed convolution": transposed_convolutions,
    "linear": linears,
    "matmul": matmuls,
    "batch norm": batch_norms,
    "layer and group norm": normalisations,
    "prelu": prelus,
    "clip": clips,
    "scale": any_form(*SCALES, Power(2.0), Power(3.0)),
    "softmax": softmaxes,
    "two tensors": combinations,
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


@pytest.mark.parametrize("name", CASES)
@EXAMPLES
@given(data=st.data())
def test_onnx_computes_the_operator(onnx_nets, name, data):
    agrees(onnx_nets, network(CASES[name](data.draw)))


@pytest.mark.parametrize("op", CURVES, ids=lambda op: op.curve)
@pytest.mark.parametrize("form", ["first", "tokens"])
def test_onnx_computes_the_curve(onnx_nets, op, form):
    agrees(onnx_nets, network(alone(op, form, (5, 7, 4))))


@pytest.mark.parametrize("op", [Activation("sqrt"), Power(0.5), Power(-1.0), Power(-2.5)])
def test_onnx_computes_curves_of_positive_numbers(onnx_nets, op):
    agrees(onnx_nets, network(alone(op, "first", (5, 7, 4))), positive=True)


TRANSPOSED = {
    "squeeze": 0,  # gates
    "convnext": 5,  # out of the stem, then in and out of each depthwise convolution
    "transformer": 6,  # patches, three heads, transposed keys, and back
    "dense": 0,
    "shuffle": 1,  # the shuffle itself
    "unet": 0,
    "windows": 5,  # into and out of windows, their layout, transposed keys
}


@pytest.mark.parametrize("net", TRANSPOSED)
def test_onnx_computes_whole_networks(onnx_nets, net):
    model = onnx_nets.NETS[net]()
    proto = agrees(onnx_nets, model)
    assert onnx_nets.kinds(proto)["Transpose"] == TRANSPOSED[net]


REDUCTIONS = [Reduce(kind, (1, 2)) for kind in ("mean", "sum", "max", "l2")]


@pytest.mark.parametrize("op", [*REDUCTIONS, GlobalAvgPool()])
def test_reductions_in_the_opset_of_4_bit_files(onnx_nets, op, monkeypatch):
    monkeypatch.setattr(onnx_out, "OPSET", onnx_out.OPSET_INT4)
    proto = agrees(onnx_nets, network(alone(op, "stored", (5, 7, 4))))
    assert proto.opset_import[0].version == 21


@pytest.mark.parametrize("net", ["residual", "option_a", "vgg", "extreme"])
def test_residual_networks_need_no_transposition(onnx_nets, net):
    assert "Transpose" not in onnx_nets.kinds(float_onnx(onnx_nets.NETS[net]()))


def test_outputs_of_every_kind_come_back(onnx_nets):
    """Held as stored, of rank 5, renamed only, constant, read inside, flattened."""
    n = onnx_nets.Net(size=6)
    x = n.conv("conv", "images", 3, 8, 3)
    stored = n.op("stored", LayerNorm(), x)
    split = n.op("split", Reshape((6, 6, 2, 4)), x)
    turned = n.op("turned", Transpose((0, 3, 1, 2)), x)
    back = n.op("back", Transpose((0, 2, 3, 1)), n.op("flipped", Transpose((0, 1, 3, 2)), turned))
    fixed = n.constant("fixed", 4, 2)
    image = n.constant("image", 6, 6, 8)
    inside = n.op("inside", Relu(), n.op("sum", Add(), x, image))
    flat = n.op("flat", Flatten(), inside)
    last = n.linear("last", flat, 288, 3)
    returned = (stored, split, turned, back, fixed, image, inside, flat, last)
    proto = agrees(onnx_nets, n.finish(*returned))
    names = [o.name for o in proto.graph.output]
    assert names == ["logits", *returned[1:]]


def test_the_batch_size_is_found_once(onnx_nets):
    n = onnx_nets.Net(size=6)
    x = n.op("tokens", Reshape((36, 3)), "images")
    token = n.constant("token", 1, 3)
    x = n.op("second", Concat(1), token, n.op("first", Concat(1), token, x))
    x = n.op("third", Concat(2), x, n.constant("wide", 38, 2))
    found = onnx_nets.kinds(agrees(onnx_nets, n.finish(x)))
    assert (found["Shape"], found["Expand"]) == (1, 2)


def test_one_transposition_serves_all_readers(onnx_nets):
    n = onnx_nets.Net(size=6)
    x = n.conv("conv", "images", 3, 8, 3)
    a, b = n.op("a", LayerNorm(), x), n.op("b", LayerNorm(0.1), x)
    proto = agrees(onnx_nets, n.finish(n.op("pool", GlobalAvgPool(), n.op("sum", Add(), a, b))))
    assert onnx_nets.kinds(proto)["Transpose"] == 1


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (Resize((12, 9), (2.0, 1.5)), "Resize"),
        (Resize((11, 17), (11 / 6, 17 / 6), "bilinear", "half_pixel"), "Resize"),
        (Resize((6, 6), (1.1, 1.1)), "Gather"),  # runtimes copy what has its size already
        (Resize((7, 7), (1.3, 1.3), "bilinear"), "Resize"),
        (Resize((8, 8), (1.3, 1.3), "bilinear"), "MatMul"),  # no scale gives that size
    ],
)
def test_resampling_is_a_resize_where_that_means_the_same(onnx_nets, op, kind):
    proto = agrees(onnx_nets, network(alone(op, "first", (6, 6, 2))))
    assert onnx_nets.kinds(proto)[kind]
