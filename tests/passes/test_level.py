"""Channels on one width: the function stays, widths are equal, ceilings become ends of grids."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Add, Conv2d, Relu
from dfq_jax.passes.level import LEAST, level_channels
from dfq_jax.types import InputContract, Moments

CONTRACT = InputContract(8, 8, mean=(0.5,) * 3, std=(0.25,) * 3)
POINT = Conv2d((1, 1), ((0, 0), (0, 0)), 1)


def layer(rng, shape):
    slots = {
        "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
    }
    return slots


def moments(rng, width):
    mean, var = rng.normal(size=width), rng.uniform(0.01, 4, width)
    return Moments(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32))


def bottleneck(ceiling):
    """Two layers that add into one tensor, a capped pair of layers in between, a reader behind."""
    rng = np.random.default_rng(0)
    nodes = (
        Node("stem", POINT, ("images",)),
        Node("expand", POINT, ("stem",)),
        Node("cap", Relu(ceiling), ("expand",)),
        Node("project", POINT, ("cap",)),
        Node("sum", Add(), ("stem", "project")),
        Node("head", POINT, ("sum",)),
    )
    shapes = {"stem": (3, 4), "expand": (4, 6), "project": (6, 4), "head": (4, 5)}
    params = {name: layer(rng, (1, 1, *shape)) for name, shape in shapes.items()}
    known = {name: moments(rng, shape[1]) for name, shape in shapes.items()}
    return Model(Graph(nodes, ("images",), ("head",)), params, (CONTRACT,), known)


def images():
    return jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 3)), jnp.float32)


@pytest.mark.parametrize("ceiling", [None, 6.0])
def test_the_function_stays_but_for_ceilings(ceiling):
    model = bottleneck(ceiling)
    levelled, ends = level_channels(model, 4.0)
    plain = dataclasses.replace(model, graph=levelled.graph)  # without the ceiling
    expected, found = (np.asarray(evaluate(m, images())[0][0]) for m in (plain, levelled))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert sorted(ends) == ([] if ceiling is None else ["cap"])
    assert levelled.graph["cap"].op == Relu()


def test_channels_are_as_wide_as_the_widest():
    model = bottleneck(None)
    levelled, _ = level_channels(model, 3.0)
    before, after = model.moments, levelled.moments
    width = lambda m: np.asarray(m.mean + 3 * jnp.sqrt(m.var))
    wanted = np.maximum(width(before["expand"]), LEAST * width(before["expand"]).max())
    np.testing.assert_allclose(width(after["expand"]), width(before["expand"]).max(), rtol=1e-5)
    assert (wanted > 0).all()
    factor = np.asarray(before["stem"].mean / after["stem"].mean)  # a sum ties what it adds
    np.testing.assert_allclose(
        np.asarray(before["project"].mean / after["project"].mean), factor, rtol=1e-5
    )
    assert factor.std() > 0.01


def test_a_ceiling_ends_the_grid_of_the_widest_channel():
    model = bottleneck(6.0)
    _, ends = level_channels(model, 4.0)
    expand = model.moments["expand"]
    width = np.minimum(np.asarray(expand.mean + 4 * jnp.sqrt(expand.var)), 6.0)
    np.testing.assert_allclose(float(ends["cap"]), width.max(), rtol=1e-6)
    high = dataclasses.replace(model, moments={**model.moments, "expand": Moments(*expand)})
    assert float(level_channels(high, 1e3)[1]["cap"]) == 6.0


def test_only_groups_that_are_asked_for():
    model = bottleneck(6.0)
    same, ends = level_channels(model, 4.0, only=("images",))
    assert same.graph == model.graph
    assert not ends
    for name, slots in model.params.items():
        np.testing.assert_array_equal(same.params[name]["kernel"], slots["kernel"])
    other, ends = level_channels(model, 4.0, only=("cap",))
    assert list(ends) == ["cap"]
    np.testing.assert_array_equal(other.params["stem"]["kernel"], model.params["stem"]["kernel"])
