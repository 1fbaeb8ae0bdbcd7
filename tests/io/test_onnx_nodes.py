"""Every operator, over its attributes and layouts: ONNX Runtime computes what we compute."""

from typing import Any, get_args

import jax
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_cases import CASES
from onnx_forms import RNG, alone, network

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Concat,
    Curve,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Power,
    Reduce,
    Relu,
    Reshape,
    Resize,
    Transpose,
)
from dfq_jax.io.onnx import export as onnx_out
from dfq_jax.io.onnx.export import float_onnx, serialize

EXAMPLES = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


run = jax.jit(lambda model, images: evaluate(model, images)[0])
"""One program a network: each is drawn once, so none would share those of its operators."""


def agrees(onnx_nets: Any, model: Model, positive: bool = False) -> onnx.ModelProto:
    """Asserts that ONNX Runtime gives what `evaluate` gives, to 1e-5 of the largest output."""
    x = RNG.normal(size=(3, *model.contract.shape)).astype(np.float32)
    x = np.abs(x) + np.float32(0.5) if positive else x
    want = [np.asarray(ours) for ours in run(model, x)]
    proto = float_onnx(model)
    for optimize in (False, True):
        found = onnx_nets.run_file(serialize(proto), x, optimize=optimize)
        for ours, theirs in zip(want, found, strict=True):
            largest = float(np.max(np.abs(ours)))
            assert np.isfinite(largest)
            np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5 * max(largest, 1e-3))
    return proto


CURVES = tuple(Activation(curve) for curve in get_args(Curve) if curve not in ("sqrt", "log"))


@pytest.mark.parametrize("name", CASES)
@EXAMPLES
@given(data=st.data())
def test_onnx_computes_the_operator(onnx_nets, name, data):
    agrees(onnx_nets, network(CASES[name](data.draw)))


@pytest.mark.parametrize("op", CURVES, ids=lambda op: op.curve)
@pytest.mark.parametrize("form", ["first", "tokens"])
def test_onnx_computes_the_curve(onnx_nets, op, form):
    agrees(onnx_nets, network(alone(op, form, (5, 7, 4))))


@pytest.mark.parametrize(
    "op", [Activation("sqrt"), Activation("log"), Power(0.5), Power(-1.0), Power(-2.5)]
)
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
    monkeypatch.setattr(onnx_out, "OPSET", onnx_out.OPSET_NEW)
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
