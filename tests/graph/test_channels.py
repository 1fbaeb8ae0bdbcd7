import pytest

from dfq_jax.graph.channel_flow import channel_flow
from dfq_jax.graph.channels import channel_groups, joints
from dfq_jax.graph.labels import Read, own_labels
from dfq_jax.graph.ops import (
    Activation,
    AvgPool,
    Clip,
    Flatten,
    GlobalAvgPool,
    LeakyRelu,
    Mul,
    Pad,
    PRelu,
    Reduce,
    Relu,
    Slice,
)
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.types import InputContract

ALL = (0, None, 1)


def sides(model):
    return [(g.producers, g.consumers) for g in channel_groups(model)]


def test_what_a_sum_adds_together_is_one_group(tiny_net, nets):
    folded = fold_batch_norm(tiny_net)
    assert sides(folded) == [
        (("conv1", "project"), ("depthwise", "conv2")),
        (("conv2",), ("fc",)),
    ]
    first = channel_groups(folded)[0]
    assert first.tensors == ("conv1", "relu1", "project", "add", "relu3", "maxpool")
    wide = [(("conv1", "conv3"), ("conv2", "conv4")), (("conv2",), ("conv3",))]
    wide += [(("conv4",), ("conv5",)), (("conv5",), ("fc",))]
    assert sides(fold_batch_norm(nets.wide())) == wide


def test_norms_ends_and_strangers_keep_tensors_out(tiny_net, nets):
    assert sides(tiny_net) == []  # batch norms in between
    b = nets.Builder(InputContract(6, 6))
    x = b.op("mul", Mul(), b.conv("a", "images", 4), b.conv("b", "images", 4))
    x = b.op("flat", Flatten(), b.conv("c", x, 4))
    model = b.done(b.linear("e", b.linear("d", x, 3), 2))
    behind = [(("c",), ("d",)), (("d",), ("e",))]
    assert sides(model) == [(("a",), ("c",)), *behind]  # of a product one side takes factors
    assert sides(b.done("e", "d")) == [(("a",), ("c",)), (("c",), ("d",))]


@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        (Relu(), True),
        (Relu(6.0), False),
        (Clip(0.0, 6.0), False),
        (LeakyRelu(0.1), True),
        (PRelu(), True),
        (Activation("silu"), False),
        (AvgPool((2, 2), (2, 2)), True),
        (GlobalAvgPool(), True),
        (Pad(((0, 0), (1, 1), (0, 0), (0, 0))), True),
        (Pad(((0, 0), (1, 1), (0, 0), (0, 0)), 0.5), False),
        (Pad(((0, 0), (1, 1), (0, 0), (0, 0)), 0.5, "edge"), True),
        (Pad(((0, 0), (0, 0), (0, 0), (1, 1))), False),
        (Slice((ALL, (0, None, 2), ALL, ALL)), True),
        (Slice((ALL, ALL, ALL, (-1, None, -1))), False),
        (Reduce("mean", (1, 2)), True),
        (Reduce("l2", (1, 2)), True),
        (Reduce("mean", (-1,)), False),
        (Reduce("mean", (3,), True), False),
    ],
)
def test_what_commutes_with_factors(op, wanted):
    x = Read(own_labels((1, 4, 4, 4), 1), True)
    made = {"mean": (1, 4, 4, 1)}.get(getattr(op, "kind", ""), (1, 4, 4, 4))
    assert channel_flow(op, (x,), {}, made, 13).factors is wanted


def test_joints_of_a_chain(nets):
    b = nets.Builder(InputContract(6, 6))
    x = b.op("r1", Relu(6.0), b.conv("a", "images", 4))
    x = b.op("r3", Relu(), b.op("r2", Relu(), b.conv("c", b.conv("b", x, 4), 4)))
    found = joints(b.done(b.conv("d", x, 4)).graph)
    names = [(j.first.name, j.between and j.between.name, j.second.name) for j in found]
    assert names == [("a", "r1", "b"), ("b", None, "c")]
