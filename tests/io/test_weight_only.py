"""Kernels in few bits whose layers compute in float, on grids of 16 bits, or with one scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from integers import integer_predict

from dfq_jax.allocation import costs
from dfq_jax.allocation.costs import cost_of
from dfq_jax.errors import ExportError
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Conv2d, ConvTranspose2d, Linear, Relu, Reshape
from dfq_jax.io.artifacts.graph_json import plan_from_json, plan_to_json
from dfq_jax.io.artifacts.quantized_tensors import pack_network, unpack_network
from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.io.runtime.session import open_session, run
from dfq_jax.io.verification.verify import verify
from dfq_jax.numerics.signs import Signs
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.in_float import float_layers
from dfq_jax.quantization.plan import (
    STORES,
    Rule,
    Site,
    on_other_levels,
    parse_scheme,
    resolve,
    stored_as,
)
from dfq_jax.quantization.simulate import simulate
from dfq_jax.types import InputContract

simulated = jax.jit(simulate)
SHAPES = {"conv": (3, 3, 3, 10), "deep": (3, 3, 5, 6), "fc": (6 * 16, 7), "head": (7, 5)}
SCHEMES = ("w8", "w4", "w2", "w4g4", "w8g7", "w8t", "w4t", "w8a16", "w4g4a16", "w4g4a8", "w8ta8")


def network():
    """Two convolutions, one in groups, a flattened image and two linear layers."""
    rng = np.random.default_rng(0)
    same = ((1, 1), (1, 1))
    nodes = (
        Node("conv", Conv2d(padding=same), ("x",)),
        Node("relu", Relu(), ("conv",)),
        Node("deep", Conv2d(padding=same, groups=2), ("relu",)),
        Node("flat", Reshape((96,)), ("deep",)),
        Node("fc", Linear(), ("flat",)),
        Node("rectified", Relu(), ("fc",)),
        Node("head", Linear(), ("rectified",)),
    )
    params = {
        name: {
            "kernel": jnp.asarray(rng.normal(size=s) / np.sqrt(np.prod(s[:-1])), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=s[-1]) / 4, jnp.float32),
        }
        for name, s in SHAPES.items()
    }
    return Model(Graph(nodes, ("x",), ("head",)), params, (InputContract(4, 4),))


def photos(count=4):
    return np.random.default_rng(1).normal(size=(count, 4, 4, 3)).astype(np.float32)


def made(scheme, store="packed", rules=()):
    model = network()
    uniform = [Rule("*", parse_scheme(scheme).weight_bits, sharing=parse_scheme(scheme).sharing)]
    plan = resolve(model.graph, parse_scheme(scheme), rules=[*uniform, *rules])
    return calibrate(model, stored_as(plan, store), jnp.asarray(photos(8)))


@pytest.fixture(scope="module")
def networks():
    return {scheme: made(scheme) for scheme in SCHEMES}


@pytest.fixture
def packs_all(monkeypatch):
    """Networks of tests have no kernels worth packing."""
    monkeypatch.setattr(costs, "UNPACKING", -1)


def in_numpy(quantized):
    """The network in float64 with its kernels on their grids, by hand."""
    x, found = photos().astype(np.float64), {}
    for name, slots in quantized.model.params.items():
        levels = quantized.plan.table[Site(name)].levels
        affine = quantized.qparams[Site(name)]
        w = np.asarray(slots["kernel"], np.float64)
        which = np.arange(w.shape[-2]) // (levels.group or w.shape[-2])
        pick = lambda v, which=which: np.asarray(v, np.float64)[..., which, :]
        scale, point = pick(affine.scale), pick(affine.zero_point)
        codes = np.clip(np.round(w / scale) + point, levels.qmin, levels.qmax)
        found[name] = (codes - point) * scale
    params = quantized.model.params.items()
    bias = {name: np.asarray(slots["bias"], np.float64) for name, slots in params}

    def conv(x, w, groups):
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        cin, cout = w.shape[2], w.shape[3] // groups
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
        parts = [
            np.einsum(
                "nhwcij,ijco->nhwo",
                windows[:, :, :, g * cin : (g + 1) * cin],
                w[..., g * cout : (g + 1) * cout],
            )
            for g in range(groups)
        ]
        return np.concatenate(parts, -1)

    x = np.maximum(conv(x, found["conv"], 1) + bias["conv"], 0)
    x = conv(x, found["deep"], 2) + bias["deep"]
    x = np.maximum(x.reshape(len(x), -1) @ found["fc"] + bias["fc"], 0)
    return x @ found["head"] + bias["head"]


@pytest.mark.parametrize("scheme", ["w8", "w4", "w4g4", "w8g7", "w4t"])
def test_weights_alone_against_numpy(networks, scheme):
    q = networks[scheme]
    assert all(site.argument is None for site in q.plan.table)
    np.testing.assert_allclose(simulated(q, photos()), in_numpy(q), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_computes_what_was_simulated(networks, scheme, packs_all):
    q, wanted = networks[scheme], np.asarray(simulated(networks[scheme], photos()))
    whole = scheme.partition("a")[2] in ("", "16")
    for store in STORES:
        data = serialize(quantized_onnx(dataclasses.replace(q, plan=stored_as(q.plan, store))))
        for optimize in (False, True):
            found = run(open_session(data, optimize=optimize, precise=True), photos())
            near = 1e-4 if whole else 0.05
            np.testing.assert_allclose(found, wanted, atol=near * np.abs(wanted).max())


@pytest.mark.parametrize("scheme", ["w4", "w4g4", "w8a16", "w4g4a8", "w8ta8"])
def test_files_pass_verification_and_a_changed_byte_does_not(networks, scheme):
    q = networks[scheme]
    data = serialize(quantized_onnx(q))
    found = verify(q, data, photos())
    assert found.passed, found.failures
    proto = onnx.load_model_from_string(data)
    codes = next(t for t in proto.graph.initializer if t.name == "fc.kernel.codes")
    codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]
    assert not verify(q, serialize(proto), photos()).passed


@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_come_back_from_their_file(networks, scheme, tmp_path):
    q = networks[scheme]
    plan = plan_from_json(plan_to_json(q.plan))
    assert plan == q.plan
    params, qparams = unpack_network(pack_network(q), q.model.graph, plan, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, dict(q.qparams), qparams)
    again = dataclasses.replace(q, model=dataclasses.replace(q.model, params=params))
    for layer in SHAPES:
        np.testing.assert_array_equal(again.kernel(layer).codes, q.kernel(layer).codes)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("w4", "only weights are quantized: it computes in float"),
        ("w4g4a8", "scales of 4 input channels each: it computes in float"),
        ("w8a16", "inputs of 16 bits: it computes in float"),
    ],
)
def test_reports_say_that_layers_compute_in_float(networks, scheme, reason):
    plan = networks[scheme].plan
    assert float_layers(network().graph, plan) == dict.fromkeys(SHAPES, reason)
    assert not any(plan.multiplies(node) for node in network().graph.nodes if node.name in SHAPES)


def test_per_tensor_kernels_multiply_integers(networks):
    q = networks["w8ta8"]
    assert float_layers(network().graph, q.plan) == {}
    assert all(q.kernel(layer).scales.size == 1 for layer in SHAPES)
    codes = {site: spec.levels for site, spec in q.plan.entries if site.argument is None}
    assert {levels.axis for levels in codes.values()} == {None}
    close = np.abs(integer_predict(q, photos()) - simulated(q, photos())).max()
    assert close < 0.05 * np.abs(simulated(q, photos())).max()


def test_rules_choose_who_shares_a_scale():
    rules = [Rule("deep", 3, sharing=2), Rule("fc", sharing="tensor")]
    plan = made("w8a8", rules=rules).plan
    found = {site.node: spec.grid for site, spec in plan.entries if site.argument is None}
    assert (found["deep"].bits, found["deep"].group) == (3, 2)
    assert (found["fc"].bits, found["fc"].axis) == (8, None)
    assert found["conv"].axis == found["head"].axis == -1
    assert float_layers(network().graph, plan) == {
        "deep": "scales of 2 input channels each: it computes in float"
    }


def test_ends_stay_at_8_bits_with_scales_of_channels():
    plan = resolve(network().graph, parse_scheme("w4g4"))
    table = {site.node: spec.grid for site, spec in plan.entries}
    assert (table["conv"].bits, table["conv"].group) == (8, None)
    assert (table["fc"].bits, table["fc"].group) == (4, 4)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("scheme", ["w8", "w4", "w4g4", "w8t"])
def test_bytes_are_those_of_the_file(networks, scheme, store, packs_all):
    q = networks[scheme]
    q = dataclasses.replace(q, plan=stored_as(q.plan, store))
    proto = quantized_onnx(q)
    names = ("codes", "scale", "zero_point", "bias", "plane", "offset")
    stored = sum(
        len(t.raw_data)
        for t in proto.graph.initializer
        if t.name.split(".")[-1].rstrip("0123456789") in names
    )
    told = cost_of(q.model, q.plan, "bytes").amount
    assert abs(stored - told) <= 16 + 2 * len(SHAPES)


def test_signs_multiply_integers_in_the_file(packs_all):
    model = network()
    plan = resolve(model.graph, parse_scheme("w8a8"))
    levels = {Site(name): Signs() for name in ("deep", "fc")}
    q = calibrate(model, on_other_levels(plan, levels), jnp.asarray(photos(8)))
    kernel = np.asarray(model.params["fc"]["kernel"])
    truth = np.where(kernel < 0, -1, 1) * np.abs(kernel).mean(0)
    np.testing.assert_allclose(q.kernel("fc").dequantize(), truth, rtol=1e-5)
    assert float_layers(model.graph, q.plan) == {}
    found = verify(q, serialize(quantized_onnx(q)), photos())
    assert found.passed, found.failures
    signed = on_other_levels(plan, {Site("fc", 0): Signs(axis=None)})
    with pytest.raises(ExportError, match=r"input0 of 'fc' lies on signs.*2 bits or more"):
        quantized_onnx(dataclasses.replace(q, plan=signed))


def test_scales_of_a_network_have_gradients_without_tricks(networks):
    q = networks["w4g4a8"]
    wanted, shown = jnp.asarray(in_numpy(networks["w8"]), jnp.float32), jnp.asarray(photos())
    loss = lambda scales: jnp.mean((simulate(q.with_scales(scales), shown) - wanted) ** 2)
    before, slopes = jax.jit(jax.value_and_grad(loss))(q.scales)
    assert {site: v.shape for site, v in slopes.items()} == {
        site: p.scale.shape for site, p in q.qparams.items()
    }
    rate = 0.3 * before / sum(jnp.sum(v**2) for v in slopes.values())
    moved = jax.tree.map(lambda s, g: s - rate * g, q.scales, slopes)
    assert jax.jit(loss)(moved) < before


def test_transposed_convolutions_keep_scales_of_channels():
    node = Node("up", ConvTranspose2d(), ("x",))
    plan = resolve(Graph((node,), ("x",), ("up",)), parse_scheme("w4g4"), layers="zsq_all_low")
    levels = plan.table[Site("up")].grid
    assert (levels.axis, levels.group) == (-1, None)
