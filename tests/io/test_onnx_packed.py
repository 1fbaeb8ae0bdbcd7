import collections
import dataclasses

import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from dfq_jax.allocation import costs
from dfq_jax.errors import DataError, PlanError
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Conv2d, Linear, Relu, Reshape
from dfq_jax.io.artifacts.graph_json import plan_from_json, plan_to_json
from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.io.runtime.session import open_session, run
from dfq_jax.io.verification.runners import ReferenceSession
from dfq_jax.io.verification.verify import verify
from dfq_jax.numerics.affine import Affine, Grid
from dfq_jax.quantization.plan import STORES, Plan, Scheme, Site, Spec, stored_as
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.types import InputContract


def as_stored(q, store):
    return dataclasses.replace(q, plan=stored_as(q.plan, store))


def file_of(q, store):
    return serialize(quantized_onnx(as_stored(q, store)))


@pytest.fixture
def packs_all(monkeypatch):
    """Networks of tests have no kernels worth packing."""
    monkeypatch.setattr(costs, "UNPACKING", -1)


def two_layers(bits, symmetric, per_channel):
    """A convolution whose kernel fills no bytes evenly, and a linear layer."""
    rng = np.random.default_rng(bits)
    shapes = {"conv": (3, 3, 3, 5), "fc": (5 * 16, 7)}
    nodes = (
        Node("conv", Conv2d(padding=((1, 1), (1, 1))), ("x",)),
        Node("relu", Relu(), ("conv",)),
        Node("flat", Reshape((80,)), ("relu",)),
        Node("fc", Linear(), ("flat",)),
    )
    params = {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
        }
        for name, shape in shapes.items()
    }
    grid = Grid(bits, symmetric, -1 if per_channel else None)
    entries, qparams = [], {}
    for name, shape in shapes.items():
        count = (1,) * (len(shape) - 1) + ((shape[-1],) if per_channel else (1,))
        zeros = rng.integers(0, 2**bits, count) if not symmetric else np.zeros(count)
        qparams[Site(name)] = Affine(
            jnp.asarray(rng.uniform(0.1, 0.9, count), jnp.float32), jnp.asarray(zeros, grid.dtype)
        )
        entries.append((Site(name), Spec(grid)))
        entries.append((Site(name, 0), Spec(Grid(8))))
    qparams[Site("conv", 0)] = Affine(jnp.float32(0.03), jnp.uint8(128))
    qparams[Site("fc", 0)] = Affine(jnp.float32(0.1), jnp.uint8(0))
    model = Model(Graph(nodes, ("x",), ("fc",)), params, (InputContract(4, 4),))
    return QuantizedModel(
        model, Plan(tuple(entries), (), Scheme(bits, 8), "qdrop_8bit_ends"), qparams
    )


def photos(count=4):
    return np.random.default_rng(1).normal(size=(count, 4, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize(
    ("symmetric", "per_channel"), [(True, True), (False, True), (False, False)]
)
def test_every_form_computes_the_very_same(bits, symmetric, per_channel, packs_all):
    q = two_layers(bits, symmetric, per_channel)
    for optimize in (False, True):
        runs = [
            run(open_session(file_of(q, s), optimize=optimize, precise=True), photos())
            for s in STORES
        ]
        np.testing.assert_array_equal(runs[0], runs[1])
        if not optimize:
            np.testing.assert_array_equal(runs[0], runs[2])


@pytest.mark.parametrize("bits", [3])
def test_the_file_passes_verification_and_no_byte_may_change(bits, packs_all):
    q = two_layers(bits, symmetric=False, per_channel=True)
    data = file_of(q, "packed")
    assert verify(q, data, photos()).passed
    proto = onnx.load_model_from_string(data)
    plane = next(t for t in proto.graph.initializer if t.name == "conv.kernel.plane0")
    plane.raw_data = bytes([plane.raw_data[0] ^ 1]) + plane.raw_data[1:]
    found = verify(q, serialize(proto), photos())
    assert any("conv.kernel.plane0" in told for told in found.failures)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_packed_kernels_end_as_integer_kernels(bits, tmp_path, packs_all):
    import onnxruntime as ort

    q = two_layers(bits, symmetric=False, per_channel=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(file_of(q, "packed"), options, providers=["CPUExecutionProvider"])
    made = onnx.load_model(tmp_path / "optimized.onnx")
    kinds = collections.Counter(n.op_type for n in made.graph.node)
    assert kinds["QLinearConv"] == kinds["QGemm"] == 1
    assert not {"Gather", "Cast", "Sub", "DequantizeLinear", "Conv", "Gemm"} & set(kinds)


def test_the_reference_evaluator_unpacks_alike(packs_all):
    q = two_layers(3, symmetric=False, per_channel=True)
    data = file_of(q, "packed")
    want = run(open_session(data, optimize=False), photos())
    feeds = {"images": photos().transpose(0, 3, 1, 2)}
    (found,) = ReferenceSession(data, "").run(["logits"], feeds)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_bytes_follow_the_bits_and_eight_bits_are_as_ever(packs_all):
    """Packed files need no opset of 4-bit integers, and two bits take half of what four take."""
    at = lambda bits: onnx.load_model_from_string(
        file_of(two_layers(bits, symmetric=bits == 8, per_channel=True), "packed")
    )
    planes = lambda proto: sum(
        len(t.raw_data) for t in proto.graph.initializer if ".plane" in t.name
    )
    assert at(4).opset_import[0].version == 17
    assert [planes(at(b)) for b in (2, 4)] == [-(-135 // 4) + 140, -(-135 // 2) + 280]
    q = two_layers(8, symmetric=True, per_channel=True)
    assert len({file_of(q, store) for store in STORES}) == 1


def test_small_kernels_are_not_worth_the_nodes():
    stored = quantized_onnx(two_layers(4, symmetric=False, per_channel=True)).graph
    assert {n.op_type for n in stored.node}.isdisjoint({"Gather", "Cast"})


def test_plans_that_do_not_say_have_the_older_form():
    plan = two_layers(4, symmetric=False, per_channel=True).plan
    data = plan_to_json(plan)
    assert plan_from_json(data) == plan
    del data["store"]
    assert plan_from_json(data) == stored_as(plan, "int4")
    with pytest.raises(DataError, match="form of kernels 'int3'"):
        plan_from_json({**data, "store": "int3"})
    with pytest.raises(PlanError, match="form of kernels"):
        stored_as(plan, "int3")
