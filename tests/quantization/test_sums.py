"""Sums of more products than 32 bits hold: found from the codes, and cut to fit."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integers import integer_predict

from dfq_jax.api.grids import within_sums
from dfq_jax.api.request import Follow
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Flatten, Linear, MatMul
from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.io.verification.verify import verify
from dfq_jax.numerics.affine import Affine
from dfq_jax.optim.progress import Watcher
from dfq_jax.quantization.plan import Scheme, Site, resolve
from dfq_jax.quantization.simulate import QuantizedModel, simulate
from dfq_jax.quantization.sums import overflowing
from dfq_jax.recipes.dfq import dfq
from dfq_jax.types import InputContract

TERMS = 70_000
CONTRACT = InputContract(1, TERMS, (0.0,), (1.0,))


def long_net(kernel, bias=None):
    """A linear layer that reads all pixels."""
    nodes = (Node("flat", Flatten(), ("images",)), Node("head[1]", Linear(), ("flat",)))
    slots = {"kernel": jnp.asarray(kernel, jnp.float32)}
    if bias is not None:
        slots["bias"] = jnp.asarray(bias, jnp.float32)
    return Model(Graph(nodes, ("images",), ("head[1]",)), {"head[1]": slots}, (CONTRACT,))


def on_unit_grids(model, zero_point=0, scheme=(8, 8)):
    """Every code is its own value."""
    plan = resolve(model.graph, Scheme(*scheme))
    affine = lambda site, spec: Affine(
        jnp.float32(1),
        jnp.asarray(zero_point if site.argument == 0 else 0, spec.grid.dtype),
    )
    return QuantizedModel(model, plan, {site: affine(site, spec) for site, spec in plan.entries})


def images(value, n=2):
    return jnp.full((n, *CONTRACT.shape), value, jnp.float32)


@pytest.mark.parametrize(
    ("weight", "bias", "zero_point", "largest"),
    [
        (127, None, 0, 127 * 255 * TERMS),
        (-127, None, 0, 127 * 255 * TERMS),
        (127, None, 100, 127 * 155 * TERMS),
        (120, None, 0, 120 * 255 * TERMS),
        (120, 2**30, 0, 120 * 255 * TERMS + 2**30),
        (120, -(2**30), 0, 120 * 255 * TERMS - 2**30),
    ],
)
def test_the_largest_sum_follows_from_the_codes(weight, bias, zero_point, largest):
    bias = None if bias is None else np.full(1, bias)
    q = on_unit_grids(long_net(np.full((TERMS, 1), weight), bias), zero_point)
    found = overflowing(q)
    if largest < 2**31:
        assert found == ()
    else:
        assert [(x.layer, x.terms, x.largest) for x in found] == [("head[1]", TERMS, largest)]
        assert "70,000 products for each output, which may come to " in str(found[0])


def test_products_of_two_tensors_count_too():
    graph = Graph((Node("p", MatMul(True), ("a", "a")),), ("a",), ("p",))
    model = Model(graph, {}, (InputContract(1, 2, (0.0,) * 40_000, (1.0,) * 40_000),))
    plan = resolve(Graph((*graph.nodes, Node("w", Linear(), ("p",))), ("a",), ("w",)), Scheme(8, 8))
    for zero_point, long in ((0, 1), (128, 0)):
        affine = Affine(jnp.float32(1), jnp.uint8(zero_point))
        qparams = {Site("p", i): affine for i in range(2)}
        entries = tuple(e for e in plan.entries if e[0] in qparams)
        q = QuantizedModel(model, dataclasses.replace(plan, entries=entries), qparams)
        assert len(overflowing(q)) == long


def test_long_sums_that_fit_run_in_integers():
    rng = np.random.default_rng(0)
    q = on_unit_grids(long_net(rng.integers(0, 110, (TERMS, 2))))
    x = jnp.asarray(rng.integers(0, 256, (2, *CONTRACT.shape)), jnp.float32)
    exact = np.asarray(x, np.int64).reshape(2, -1) @ np.asarray(
        q.model.params["head[1]"]["kernel"], np.int64
    )
    assert overflowing(q) == ()
    np.testing.assert_array_equal(integer_predict(q, x), exact.astype(np.float32))
    assert not np.array_equal(simulate(q, x), exact)  # floats round


@pytest.mark.onnx
@pytest.mark.parametrize("hostile", [False, True])
def test_codes_are_made_smaller_where_sums_would_leave_32_bits(hostile):
    """Equal weights and white images: what runtimes add up is then as large as it can be."""
    rng = np.random.default_rng(0)
    kernel = np.full((TERMS, 2), 1e-4) if hostile else rng.standard_normal((TERMS, 2)) / 300
    model, said = long_net(kernel), []
    on_grids = partial(dfq, model, images(1.0), Scheme(8, 8), bias="none")
    first = on_grids(rules=())
    assert len(overflowing(first.quantized)) == hostile
    made, notes = within_sums(first, (), on_grids, Follow(Watcher(said.append)))
    spec = made.quantized.plan.spec(Site("head[1]"))
    assert overflowing(made.quantized) == ()
    assert said == list(notes)
    if hostile:
        assert spec is None or spec.grid.bits < 8
        assert "layer 'head[1]' sums 70,000 products" in notes[0]
    else:
        assert spec is not None
        assert (spec.grid.bits, notes) == (8, ())
    found = verify(made.quantized, serialize(quantized_onnx(made.quantized)), images(1.0))
    assert found.passed, found.failures
    assert not any("32 bits" in warning for warning in found.warnings)


@pytest.mark.onnx
def test_what_32_bits_do_not_hold_is_said_when_it_is_verified():
    q = on_unit_grids(long_net(np.full((TERMS, 2), 127)))
    jax.clear_caches()
    found = verify(q, serialize(quantized_onnx(q)), images(255.0))
    assert "32 bits hold 2,147,483,647" in found.warnings[-1]
    assert {check.integer_steps for check in found.layers} == {None}
