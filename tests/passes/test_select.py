"""Channels removed from small networks with every kind of operator."""

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.graph.channels import groups_of
from dfq_jax.graph.coupling import coupled_channels
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Broadcast,
    Compare,
    Concat,
    Conv2d,
    Div,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    LayerNorm,
    Linear,
    LocalNorm,
    LogSoftmax,
    MatMul,
    Mul,
    Pad,
    Power,
    PRelu,
    Recurrent,
    Reduce,
    Relu,
    Reshape,
    Scale,
    Select,
    Slice,
    Softmax,
    Sub,
    Transpose,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.query import output_shapes
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.select import masked, select
from dfq_jax.types import InputContract

ALL = (0, None, 1)
NONE = (0, 0)
CONTRACT = InputContract(6, 6)


def plain(b):
    """A chain with biases."""
    x = b.op("relu", Relu(), b.conv("a", "images", 6, bias=True))
    return b.conv("b", x, 5, bias=True), {("a",): 6}


def residual(b):
    """A sum ties what it adds; the padded shortcut adds channels of zeros."""
    x = b.unit("stem", "images", 4)
    y = b.bn("out.bn", b.conv("out", b.unit("in", x, 5, stride=2), 8))
    x = b.op("thin", Slice((ALL, (0, None, 2), (0, None, 2), ALL)), x)
    x = b.op("short", Pad((NONE, NONE, NONE, (2, 2))), x)
    x = b.conv("last", b.op("sum", Add(), y, x), 3)
    return x, {("stem", "out"): 4, ("in",): 5, ("out",): 4}


def joined(b):
    """Channels beside others keep their place among them."""
    x = b.op("join", Concat(-1), b.conv("a", "images", 3), b.conv("b", "images", 4))
    x = b.bn("norm", x)
    return b.conv("c", x, 2), {("a",): 3, ("b",): 4}


def flattened(b):
    """A linear layer reads each channel from many positions."""
    x = b.conv("a", "images", 4, stride=2)
    return b.linear("b", b.op("flat", Flatten(), x), 3), {("a",): 4}


def apart(b):
    """Flattened, and put back in an image."""
    x = b.op("flat", Flatten(), b.conv("a", "images", 4, stride=2))
    return b.conv("b", b.op("back", Reshape((3, 3, 4)), x), 3), {("a",): 4}


def shuffled_up(b):
    """Pixel shuffle: four channels make one."""
    x = b.op("split", Reshape((6, 6, 3, 2, 2)), b.conv("a", "images", 12))
    x = b.op("order", Transpose((0, 1, 4, 2, 5, 3)), x)
    return b.conv("b", b.op("image", Reshape((12, 12, 3)), x), 2), {("a",): 3}


def blocks(b):
    """Four channels make one, side by side or far apart."""
    x = b.op("near", DepthToSpace(2), b.conv("a", "images", 12))
    x = b.op("far", DepthToSpace(2, inner=False), b.conv("b", x, 12))
    return b.conv("c", x, 2), {("a",): 3, ("b",): 3}


def repeated(b):
    """Every channel twice."""
    x = b.op("wide", Reshape((6, 6, 4, 1)), b.conv("a", "images", 4))
    x = b.op("copies", Broadcast((6, 6, 4, 2)), x)
    return b.conv("b", b.op("flat", Reshape((6, 6, 8)), x), 2), {("a",): 4}


def depthwise(b):
    """Depthwise with a multiplier, through PReLU."""
    x = b.conv("b", b.conv("a", "images", 4), 8, groups=4, bias=True)
    x = b.op("act", PRelu(), x, slope=b.rng.uniform(0.1, 0.3, 8))
    return b.conv("c", x, 3), {("a", "b"): 4}


def grouped(b):
    """Few groups of many channels lose as many of each, transposed ones too."""
    x = b.conv("b", b.conv("a", "images", 6), 8, groups=2)
    x = b.upscale("c", x, 6, groups=2)
    return b.conv("d", x, 3), {("a",): 3, ("b",): 4, ("c",): 3}


def normed(b):
    """Group norms lose whole groups."""
    x = b.norm("norm", b.conv("a", "images", 6, bias=True), GroupNorm(3))
    return b.conv("b", b.op("relu", Relu(), x), 3), {("a",): 3}


def gated(b):
    """Squeeze and excite, with a gate that is not zero for zero."""
    x = b.unit("a", "images", 6, Activation("silu"))
    g = b.conv("up", b.conv("down", b.op("pool", GlobalAvgPool(True), x), 3, 1), 6, 1)
    x = b.op("mul", Mul(), x, b.op("gate", Activation("sigmoid"), g))
    return b.conv("b", x, 3), {("a", "up"): 6, ("down",): 3}


def constants(b):
    """Factors and shifts a channel, one channel broadcast over all, a map over all positions."""
    x = b.op("mul", Mul(), b.conv("a", "images", 4), b.constant("gain", np.full((1, 1, 1, 4), 1.5)))
    x = b.op("sub", Sub(), x, b.constant("shift", b.rng.normal(size=(1, 1, 1, 4))))
    x = b.op("map", Mul(), x, b.op("act", Activation("sigmoid"), b.conv("one", "images", 1)))
    return b.conv("b", x, 3), {("a",): 4}


def attention(b):
    """Two heads: what a score sums over is removed from both sides, of each head."""
    x = b.op("tokens", Reshape((36, 3)), "images")
    parts = [b.op(f"{n}.heads", Reshape((36, 2, 4)), b.linear(n, x, 8)) for n in "qkv"]
    q, k, v = (b.op(f"{p}.order", Transpose((0, 2, 1, 3)), p) for p in parts)
    scores = b.op("scores", MatMul(True), b.op("scaled", Scale(0.5), q), k)
    x = b.op("values", MatMul(), b.op("weights", Softmax(), scores), v)
    x = b.op("flat", Reshape((36, 8)), b.op("back", Transpose((0, 2, 1, 3)), x))
    return b.linear("out", x, 3), {("q", "k"): 4, ("v",): 4}


def summed(b):
    """A sum over channels does not miss those that are zero."""
    x = b.op("norm", Reduce("l2", (3,), True), b.conv("a", "images", 4))
    x = b.op("unit", Div(), "a", b.op("some", Scale(1.0, 0.1), x))
    return b.conv("b", x, 3), {("a",): 4}


def picked(b):
    """The larger of two tensors, chosen by comparing them, with another value for some."""
    x, y = b.conv("a", "images", 4), b.conv("c", "images", 4)
    x = b.op("pick", Select(), b.op("more", Compare("greater"), x, y), x, y)
    return b.conv("b", x, 3), {("a", "c"): 4}


def sliced(b):
    """Parts of a tensor, shifted by what is gone before them."""
    x = b.conv("a", "images", 7)
    x = b.op("join", Concat(3), b.part("last", x, 4, None), b.part("middle", x, 1, -3))
    return b.conv("b", x, 3), {("a",): 7}


def transposed(b):
    """Channels first, a linear layer over positions, a norm over positions."""
    x = b.op("rows", Reshape((36, 4)), b.conv("a", "images", 4))
    x = b.op("first", Transpose((0, 2, 1)), x)
    x = b.norm("norm", b.linear("mix", x, 9))
    x = b.op("back", Transpose((0, 2, 1)), x)
    return b.linear("b", x, 3), {("a",): 4}


NETS = (
    plain,
    residual,
    joined,
    flattened,
    apart,
    shuffled_up,
    blocks,
    repeated,
    depthwise,
    grouped,
    normed,
    gated,
    constants,
    attention,
    summed,
    picked,
    sliced,
    transposed,
)


def built(make, nets):
    """A network with what is expected of it: how many sets each group of layers makes."""
    b = nets.Builder(CONTRACT)
    end, wanted = make(b)
    return b.done(end), wanted


def some(coupled):
    """A third of the sets goes, none of a group wholly."""
    kept = np.arange(len(coupled)) % 3 != 1
    for numbers in coupled.groups().values():
        kept[numbers[0]] |= not kept[list(numbers)].any()
    return kept


def checked(model, nets, forward=None):
    """Removes channels; what is left computes what the network with zeros does."""
    forward = forward or (lambda m, x: nets.forward(m, x)[m.graph.outputs[0]])
    coupled = coupled_channels(model)
    kept, images = some(coupled), nets.images(model, 2)
    small, zeros = select(model, coupled, kept), masked(model, coupled, kept)
    found, wanted = forward(small, images), forward(zeros, images)
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert np.abs(found - forward(model, images)).max() > 1e-3 * np.abs(found).max()
    return coupled, kept, small, zeros


@pytest.mark.parametrize("make", NETS, ids=lambda make: make.__name__)
def test_removed_is_masked(make, nets):
    model, wanted = built(make, nets)
    coupled, *_ = checked(model, nets)
    assert {makers: len(sets) for makers, sets in coupled.groups().items()} == wanted


@pytest.mark.parametrize("index", range(8))
def test_removed_is_masked_in_every_family(index, nets):
    checked(nets.MODERN[index](), nets)


def test_sizes_follow_what_is_gone(nets):
    model, _ = built(residual, nets)
    coupled, kept, small, _ = checked(model, nets)
    shapes, before = output_shapes(small), output_shapes(model)
    stays = np.concatenate([[True], kept])
    for name, axes in coupled.tensors.items():
        assert shapes[name] == tuple(int(stays[labels].sum()) for labels in axes)
        assert before[name] == tuple(map(len, axes))
    assert small.graph["short"].op != model.graph["short"].op


def test_whole_groups_and_parts_of_groups(nets):
    small = checked(built(grouped, nets)[0], nets)[2]
    assert (groups_of(small.graph["b"].op), groups_of(small.graph["c"].op)) == (2, 2)
    small = checked(built(depthwise, nets)[0], nets)[2]
    assert groups_of(small.graph["b"].op) == 3
    assert small.params["b"]["kernel"].shape == (3, 3, 1, 6)
    small = checked(built(normed, nets)[0], nets)[2]
    assert small.graph["norm"].op == GroupNorm(2)


def test_moments_follow(nets):
    folded = fold_batch_norm(nets.tiny())
    coupled, kept, small, zeros = checked(folded, nets)
    shapes = output_shapes(small)
    assert all(mean.shape == shapes[n][-1:] for n, (mean, _) in small.moments.items())
    stays = np.concatenate([[True], kept])[coupled.tensors["conv1"][-1]]
    np.testing.assert_array_equal(small.moments["conv1"].var, folded.moments["conv1"].var[stays])
    assert not np.any(np.asarray(zeros.moments["conv1"].mean)[~stays])


def test_recurrent_layers_read_fewer_channels(nets):
    b = nets.Builder(CONTRACT)
    x = b.op("tokens", Reshape((36, 4)), b.conv("a", "images", 4))
    b.params["cells"] = {"input": b.rng.normal(size=(4, 15)), "state": np.eye(5, 15)}
    b.params["cells"] |= {name: b.rng.normal(size=15) for name in ("bias", "state_bias")}
    b.nodes.append(Node("cells", Recurrent("gru"), (x,)))
    model = b.done("cells")
    coupled = checked(model, nets, lambda m, x: np.asarray(nets.run(m, x)))[0]
    assert list(coupled.groups()) == [("a",)]


MIXING = (
    LayerNorm(),
    LocalNorm(3),
    GroupNorm(1),
    Softmax(),
    LogSoftmax(3),
    Reduce("mean", (3,), True),
    Reduce("max", (3,), True),
    Pad((NONE, NONE, NONE, (1, 1)), mode="edge"),
    Slice((ALL, ALL, ALL, (0, None, 2))),
    Activation("log"),
    Power(-1.0),
)


@pytest.mark.parametrize("op", MIXING, ids=str)
def test_what_mixes_channels_keeps_them(op, nets):
    graph = Graph(
        (
            Node("a", Conv2d(), ("images",)),
            Node("op", op, ("a",)),
            Node("b", Linear(), ("op",)),
        ),
        ("images",),
        ("b",),
    )
    wide = {"mean": 1, "max": 1}.get(getattr(op, "kind", ""), 4)
    wide = {Pad: 6, Slice: 2}.get(type(op), wide)
    params = {"a": {"kernel": jnp.ones((1, 1, 3, 4))}, "b": {"kernel": jnp.ones((wide, 2))}}
    assert len(coupled_channels(Model(graph, params, (CONTRACT,)))) == 0


def test_a_sum_of_gates_keeps_them(nets):
    """Zeros before a sigmoid are no zeros behind it, and a sum has no kernel to leave them out."""
    b = nets.Builder(CONTRACT)
    x = b.op("gate", Activation("sigmoid"), b.conv("a", "images", 4))
    model = b.done(b.linear("b", b.op("sum", Reduce("sum", (3,), True), x), 2))
    assert len(coupled_channels(model)) == 0


def test_sets_say_all_they_touch(nets):
    model, _ = built(flattened, nets)
    one = coupled_channels(model).sets()[1]
    assert one.makers == ("a",)
    assert one.tensors == (("a", 3, 1), *(("flat", 1, 1 + 4 * i) for i in range(9)))
    assert one.slots == (("a", "kernel", 3, 1), *(("b", "kernel", 0, 1 + 4 * i) for i in range(9)))


def test_refusals(nets):
    model, _ = built(plain, nets)
    coupled = coupled_channels(model)
    with pytest.raises(UsageError, match="got 2 values of `kept`, expected one a set: 6"):
        select(model, coupled, np.ones(2, bool))
    with pytest.raises(UsageError, match=r"nothing would be left of 'a'.*one of .* made by a"):
        select(model, coupled, np.zeros(6, bool))
