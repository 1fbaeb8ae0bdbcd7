"""Factors of channels through slices, joins, gates and pixel shuffles: the function stays."""

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.channels import channel_groups
from dfq_jax.graph.factors import channel_factors, families
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Concat,
    Div,
    Flatten,
    GlobalAvgPool,
    LeakyRelu,
    Mul,
    Power,
    Relu,
    Reshape,
    Scale,
    Softmax,
    Sub,
    Transpose,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.passes.equalize import equalizable, equalize_cross_layer, with_tensors_divided
from dfq_jax.types import InputContract

CONTRACT = InputContract(4, 4)


@pytest.fixture(scope="module")
def distilling(nets):
    """Multi-distillation with contrast-aware attention, as in IMDN, and a pixel shuffle."""
    b = nets.Builder(CONTRACT, seed=1)
    x = b.conv("stem", "images", 6, bias=True)
    y = b.op("leak", LeakyRelu(0.1), b.conv("first", x, 6, bias=True))
    kept, y = b.part("kept", y, 0, 2), b.part("rest", y, 2, None)
    y = b.op("join", Concat(3), kept, b.conv("second", y, 4, bias=True))
    mean = b.op("wide", Reshape((1, 1, 6)), b.op("mean", GlobalAvgPool(), y))
    square = b.op("square", Power(2.0), b.op("apart", Sub(), y, mean))
    spread = b.op("spread", Activation("sqrt"), b.op("power", GlobalAvgPool(), square))
    seen = b.op("seen", Reshape((1, 1, 6)), b.op("sum", Add(), "mean", spread))
    gate = b.op("gate", Activation("sigmoid"), b.conv("ask", seen, 6, kernel=1))
    x = b.op("add", Add(), x, b.conv("third", b.op("gated", Mul(), y, gate), 6))
    x = b.op("shuffle", DepthToSpace(2), b.conv("up", x, 8))
    return b.done(b.conv("last", b.op("act", Relu(), x), 3))


def numbers_of(model, name):
    return channel_factors(model)[name].numbers.tolist()


def test_groups_of_a_distilling_block(distilling):
    found = [(g.producers, g.consumers, g.size) for g in channel_groups(distilling)]
    assert found == [
        (("stem", "third"), ("first", "up"), 6),
        (("first", "second"), ("second", "ask", "third"), 10),
        (("up",), ("last",), 2),
    ]
    found = channel_factors(distilling)
    np.testing.assert_array_equal(found["join"].numbers[:2], found["first"].numbers[:2])
    np.testing.assert_array_equal(found["join"].numbers[2:], found["second"].numbers)
    assert set(found["square"].powers) == {2.0}
    assert set(found["spread"].powers) == {1.0}
    assert not found["gate"].numbers.any()
    np.testing.assert_array_equal(found["up"].numbers.reshape(2, 4).T[0], found["act"].numbers)
    assert len(families(found)) == 3


def test_any_factors_keep_the_function(distilling, nets):
    rng, model = np.random.default_rng(0), distilling
    for group in channel_groups(model):
        s = jnp.asarray(10 ** rng.uniform(-1, 1, group.size), jnp.float32)
        model = with_tensors_divided(model, group, s)
    x = nets.images(model, 2)
    wanted = np.asarray(nets.run(distilling, x))
    np.testing.assert_allclose(nets.run(model, x), wanted, atol=2e-5 * np.abs(wanted).max())
    before, after = nets.forward(distilling, x), nets.forward(model, x)
    for name in ("join", "square", "act"):
        assert not np.allclose(before[name], after[name], rtol=0.1)


def test_equalization_reaches_through(distilling, nets):
    """What makes a factor's channels is, at its widest, as wide as what reads them."""
    balanced = equalize_cross_layer(distilling, reach="groups", sweeps=60, tolerance=1e-5)
    x = nets.images(distilling, 2)
    wanted = np.asarray(nets.run(distilling, x))
    np.testing.assert_allclose(nets.run(balanced, x), wanted, atol=2e-5 * np.abs(wanted).max())
    peak = lambda name, axis: np.abs(np.asarray(balanced.params[name]["kernel"])).max(axis)
    made, read = peak("first", (0, 1, 2)), peak("second", (0, 1, 3))
    np.testing.assert_allclose(made[2:], read, rtol=1e-3)
    read = np.maximum(peak("ask", (0, 1, 3)), peak("third", (0, 1, 3)))
    np.testing.assert_allclose(made[:2], read[:2], rtol=1e-3)
    up = peak("up", (0, 1, 2)).reshape(2, 4).max(1)
    np.testing.assert_allclose(up, peak("last", (0, 1, 3)), rtol=1e-3)
    assert len(equalizable(distilling, "groups")) == 3


@pytest.mark.parametrize(
    ("ops", "wanted"),
    [
        ([Mul()], "first"),  # of a product one side takes factors
        ([Div()], "first"),
        ([Add()], "both"),
        ([Concat(1)], "both"),
        ([Add(), Softmax(3)], "none"),
        ([Add(), Scale(2.0)], "both"),
        ([Add(), Scale(2.0, 1.0)], "none"),
        ([Add(), Activation("abs")], "both"),
        ([Add(), Activation("gelu")], "none"),
        ([Add(), Transpose((0, 2, 1, 3))], "both"),
        ([Add(), Transpose((0, 3, 1, 2))], "none"),
        ([Add(), Flatten()], "both"),
        ([Add(), Reshape((4, 4, 2, 2))], "none"),
    ],
    ids=repr,
)
def test_what_takes_factors_of_two_layers(ops, wanted, nets):
    b = nets.Builder(CONTRACT)
    joined = b.op("op0", ops[0], b.conv("a", "images", 4), b.conv("b", "images", 4))
    for i, op in enumerate(ops[1:], start=1):
        joined = b.op(f"op{i}", op, joined)
    model = b.done(b.linear("end", joined, 2))
    a, other = numbers_of(model, "a"), numbers_of(model, "b")
    assert all(a) == (wanted != "none")
    assert all(other) == (wanted == "both")
    assert (a == other) == (wanted != "first")


def test_a_square_of_one_tensor_and_a_ratio_without_factors(nets):
    b = nets.Builder(CONTRACT)
    x = b.conv("a", "images", 4)
    b.op("square", Mul(), x, x)
    b.op("ratio", Div(), x, x)
    model = b.done(b.linear("end", b.op("sum", Concat(3), "square", "ratio"), 2))
    found = channel_factors(model)
    assert set(found["square"].powers) == {2.0}
    assert found["a"].numbers.all()
    assert not found["ratio"].numbers.any()
    b.op("mixed", Add(), "square", x)  # s^2 and s: no factor does for both
    model = b.done(b.linear("end2", "mixed", 2))
    assert not channel_factors(model)["a"].numbers.any()
