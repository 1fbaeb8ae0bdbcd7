import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnx.reference
import pytest

from dfq_jax.errors import ExportError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Add, Clip, Conv2d, Linear, MatMul, Relu, Reshape, Slice, Transpose
from dfq_jax.io.artifacts.graph_json import names_from_json, names_to_json
from dfq_jax.io.artifacts.quantized_tensors import stored_codes
from dfq_jax.io.onnx import export as onnx_out
from dfq_jax.io.onnx.builder import pack_nibbles, printable, tensor
from dfq_jax.io.onnx.export import float_onnx, quantized_onnx, serialize
from dfq_jax.io.onnx.values import draft, quantized_edges, value_names
from dfq_jax.io.runtime.session import open_session, run
from dfq_jax.io.verification.verify import simulated
from dfq_jax.numerics.affine import Affine, Grid
from dfq_jax.quantization.plan import Plan, Scheme, Site, Spec
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.types import UNNAMED, InputContract, SourceNames

NETS = ("residual", "option_a", "vgg", "odd", "extreme")
CASES = (
    ("residual", "w8a8", "qdrop_8bit_ends"),
    ("residual", "w4a4", "brecq_8bit_ends_second"),
    ("option_a", "w3a3", "qdrop_8bit_ends"),
    ("vgg", "w4a8", "zsq_all_low"),
    ("odd", "w5a6", "qdrop_8bit_ends"),
    ("extreme", "w2a2", "qdrop_8bit_ends"),
    ("option_a", "w2a2", "qdrop_8bit_ends_shortcuts"),
    ("residual", "w3a3", "brecq_8bit_ends_second_shortcuts"),
)


def optimized(data, tmp_path):
    """What ONNX Runtime makes of the file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return onnx.load_model(tmp_path / "optimized.onnx")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("optimize", [False, True])
def test_float_export_computes_the_network(onnx_nets, net, optimize):
    model = onnx_nets.NETS[net]()
    x = onnx_nets.images(model, 3)
    want = np.asarray(jax.jit(evaluate)(model, x)[0][0])
    found = run(open_session(serialize(float_onnx(model)), optimize=optimize, precise=True), x)
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(("net", "scheme", "layers"), CASES)
@pytest.mark.parametrize("optimize", [False, True])
def test_quantized_export_computes_the_simulation(onnx_nets, net, scheme, layers, optimize):
    q = onnx_nets.quantized(net, scheme, layers)
    x = onnx_nets.images(q.model, 8)
    want = np.asarray(simulated(q, x))
    found = run(
        open_session(onnx_nets.integer_file(net, scheme, layers), optimize=optimize, precise=True),
        x,
    )
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_the_onnx_reference_evaluator_agrees(onnx_nets):
    q = onnx_nets.quantized("extreme", "w2a2", "qdrop_8bit_ends")
    x = np.asarray(onnx_nets.images(q.model, 2))
    file = onnx_nets.integer_file("extreme", "w2a2", store="int4")
    proto = onnx.load_model_from_string(file)
    session: Any = onnx.reference.ReferenceEvaluator(proto)
    found = session.run(None, {"images": x.transpose(0, 3, 1, 2)})[0]
    np.testing.assert_allclose(found, np.asarray(simulated(q, jnp.asarray(x))), atol=1e-5)


def test_onnxruntime_makes_every_layer_an_integer_kernel(onnx_nets, tmp_path):
    found = onnx_nets.kinds(optimized(onnx_nets.integer_file("residual"), tmp_path))
    assert found["QLinearConv"] == 7
    assert found["QLinearAdd"] == 2
    assert found["QLinearGlobalAveragePool"] == found["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "Relu", "Clip", "DequantizeLinear"} & set(found)
    assert found["QuantizeLinear"] == 1  # the images


def test_low_bit_activations_keep_integer_kernels(onnx_nets, tmp_path):
    found = onnx_nets.kinds(optimized(onnx_nets.integer_file("residual", "w5a6"), tmp_path))
    assert found["QLinearConv"] == 7
    assert found["QGemm"] == 1


def test_float_inputs_of_integer_weights_stay_exact(onnx_nets, tmp_path):
    found = onnx_nets.kinds(
        optimized(onnx_nets.integer_file("vgg", "w4a8", "zsq_all_low"), tmp_path)
    )
    assert not [k for k in found if k.startswith(("MatMulNBits", "DynamicQuantize", "MatMulInt"))]


@pytest.mark.parametrize(("net", "scheme", "layers"), CASES)
def test_one_pair_per_tensor_and_grid_shared_by_its_readers(onnx_nets, net, scheme, layers):
    q = onnx_nets.quantized(net, scheme, layers)
    proto = onnx.load_model_from_string(onnx_nets.integer_file(net, scheme, layers))
    quantized = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    graph = q.model.graph
    edges = [(s, spec) for s, spec in q.plan.entries if s.argument is not None]
    read = {(graph[s.node].inputs[s.argument], spec.grid) for s, spec in edges}
    assert len({n.input[0] for n in quantized}) == len({tensor for tensor, _ in read})
    assert len({tuple(n.input) for n in quantized}) == len(quantized) == len(read)
    assert all(n.domain == "" for n in proto.graph.node)


@pytest.mark.parametrize(
    ("scheme", "store", "opset", "types"),
    [
        ("w8a8", "packed", 17, {"INT8"}),
        ("w5a6", "int8", 17, {"INT8"}),
        ("w5a6", "int4", 17, {"INT8"}),
        ("w4a4", "int8", 17, {"INT8"}),
        ("w4a4", "int4", 21, {"INT8", "UINT4"}),
    ],
)
def test_kernels_are_integers_in_raw_data(onnx_nets, scheme, store, opset, types):
    layers = "brecq_8bit_ends_second" if scheme == "w4a4" else "qdrop_8bit_ends"
    proto = onnx.load_model_from_string(onnx_nets.integer_file("residual", scheme, layers, store))
    assert proto.opset_import[0].version == opset
    stored = {t.name: t for t in proto.graph.initializer}
    kernels = [t for name, t in stored.items() if name.endswith(".kernel.codes")]
    assert {onnx.TensorProto.DataType.Name(t.data_type) for t in kernels} == types
    assert all(t.raw_data and not t.int32_data and not t.float_data for t in stored.values())
    for t in kernels:
        bits = 4 if t.data_type == onnx.TensorProto.UINT4 else 8
        assert len(t.raw_data) == -(-int(np.prod(t.dims)) * bits // 8)
    scales = [t for name, t in stored.items() if name.endswith("scale")]
    assert all(len(t.dims) <= 1 and (onnx.numpy_helper.to_array(t) > 0).all() for t in scales)


def test_bias_scale_is_the_float32_product(onnx_nets):
    proto = onnx.load_model_from_string(onnx_nets.integer_file("residual"))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    want = stored["images.scale"] * stored["conv1.kernel.scale"]
    np.testing.assert_array_equal(stored["conv1.bias.scale"], want)
    assert stored["conv1.bias.codes"].dtype == np.int32
    assert not stored["conv1.bias.zero_point"].any()


def test_dead_channels_and_huge_biases_stay_in_range(onnx_nets):
    q = onnx_nets.quantized("extreme")
    bias = stored_codes(q)["conv1"]["bias"].astype(np.int64)
    assert np.abs(bias).max() <= 2**30
    assert np.isfinite(np.asarray(q.qparams[Site("conv1")].scale)).all()
    x = onnx_nets.images(q.model, 8)
    want = np.asarray(simulated(q, x))
    for optimize in (False, True):
        found = run(
            open_session(onnx_nets.integer_file("extreme"), optimize=optimize, precise=True), x
        )
        np.testing.assert_allclose(found, want, atol=1e-2)


def test_the_integer_file_is_small(onnx_nets):
    n = onnx_nets.Net(7)
    x = n.op("relu", Relu(), n.conv("wide", "images", 3, 128))
    model = n.finish(n.conv("wider", x, 128, 512))
    edges = [(Site(s, 0), Spec(Grid(8))) for s in ("wide", "wider")]
    kernels = [(Site(s), Spec(Grid(8, True, -1))) for s in ("wide", "wider")]
    plan = Plan(tuple(kernels + edges), (), Scheme(8, 8), "qdrop_8bit_ends")
    one = Affine(jnp.float32(0.1), jnp.uint8(3))
    per = lambda s: Affine(jnp.full((1, 1, 1, s), 0.01), jnp.zeros((1, 1, 1, s), jnp.int8))
    qparams = {s: one for s, _ in edges} | {kernels[0][0]: per(128), kernels[1][0]: per(512)}
    small = len(serialize(quantized_onnx(QuantizedModel(model, plan, qparams))))
    assert small <= 0.30 * len(serialize(float_onnx(model)))


def test_metadata_states_the_contract_and_the_scheme(onnx_nets):
    proto = onnx.load_model_from_string(onnx_nets.integer_file("residual"))
    facts = {p.key: p.value for p in proto.metadata_props}
    contract = json.loads(facts["dfq.contract"])
    assert contract["layout"] == "NCHW"
    assert contract["height"] == 16
    assert "pixel / 255" in contract["formula"]
    assert facts["dfq.scheme"] == "w8a8"
    assert facts["dfq.layers"] == "qdrop_8bit_ends"
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["N", 3, 16, 16]
    assert [o.name for o in proto.graph.output] == ["logits"]


def test_export_is_deterministic(onnx_nets):
    q = onnx_nets.quantized("residual")
    assert serialize(quantized_onnx(q)) == onnx_nets.integer_file("residual")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (SourceNames("x", ("scores", "b\n")), ["x", "scores", "b\\n"]),
        (SourceNames("", ("scores", "a")), ["images", "scores", "a"]),
        (SourceNames("x", ("scores",)), ["x", "logits", "a"]),  # of a graph that returned less
        (SourceNames("x", ("same", "same")), ["x", "logits", "a"]),
        (SourceNames("x", ("x", "y")), ["x", "logits", "a"]),
        (UNNAMED, ["images", "logits", "a"]),
    ],
)
def test_ends_are_called_as_in_the_source(names, wanted):
    nodes = Node("scores", Relu(), ("images",)), Node("a", Relu(6.0), ("scores",))
    graph = Graph((*nodes, Node("last", Relu(), ("a",))), ("images",), ("last", "a"))
    file = float_onnx(Model(graph, {}, (InputContract(4, 4),), names=names)).graph
    assert [v.name for v in (*file.input, *file.output)] == wanted
    assert names_from_json(names_to_json(names)) == names


def test_what_is_returned_twice_is_returned_twice():
    names = SourceNames("x", ("a", "b", "again", "a"))
    graph = Graph((Node("last", Relu(), ("images",)),), ("images",), ("last",) * 4)
    file = serialize(float_onnx(Model(graph, {}, (InputContract(4, 4),), names=names)))
    session = open_session(file, optimize=False)
    assert [o.name for o in session.get_outputs()] == ["a", "b", "again"]
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float32)
    for found in session.run(None, {"x": x}):
        np.testing.assert_array_equal(found, np.maximum(x, 0))


def test_hostile_names_are_escaped_and_kept_apart():
    names = ("a\nb", "a\\nb", "images.codes", "logits", "\x1b[31m", "last")
    nodes, x = [], "images"
    for name in names:
        nodes.append(Node(name, Relu(), (x,)))
        x = name
    graph = Graph(tuple(nodes), ("images",), (x,))
    model = Model(graph, {}, (InputContract(4, 4),))
    found = value_names(model)
    assert len(set(found.values())) == len(found)
    assert found["a\nb"] == "a\\nb"
    assert found["logits"] == "logits_2"
    assert all(v.isprintable() for v in found.values())
    edge = Site("a\nb", 0)
    plan = Plan(((edge, Spec(Grid(8))),), (), Scheme(8, 8), "zsq_all_low")
    q = QuantizedModel(model, plan, {edge: Affine(jnp.float32(1), jnp.uint8(0))})
    proto = quantized_onnx(q)
    assert len({n.name for n in proto.graph.node}) == len(proto.graph.node)
    assert printable("%s <b>") == "%s <b>"


def test_what_onnx_cannot_express_is_an_export_error():
    contract = InputContract(4, 4)
    flat = Graph((Node("fc", Linear(), ("x",)),), ("x",), ("fc",))
    twice = Graph((Node("add", Add(), ("x", "y")),), ("x", "y"), ("add",))
    with pytest.raises(ExportError, match="one input"):
        float_onnx(Model(twice, {}, (contract, contract)))
    with pytest.raises(ExportError, match="its own input"):
        float_onnx(Model(Graph((), ("x",), ("x",)), {}, (contract,)))
    model = Model(flat, {"fc": {"kernel": jnp.ones((3, 2))}}, (contract,))
    edge, kernel = Site("fc", 0), Site("fc")
    plan = Plan(((edge, Spec(Grid(8, symmetric=True))),), (), Scheme(8, 8), "zsq_all_low")
    affine = Affine(jnp.float32(1), jnp.int8(0))
    with pytest.raises(ExportError, match="input0 of 'fc'"):
        quantized_onnx(QuantizedModel(model, plan, {edge: affine}))
    plan = Plan(((kernel, Spec(Grid(8, True, 0))),), (), Scheme(8, 8), "zsq_all_low")
    affine = Affine(jnp.ones((3, 1)), jnp.zeros((3, 1), jnp.int8))
    with pytest.raises(ExportError, match="kernel of 'fc' has scales of shape"):
        quantized_onnx(QuantizedModel(model, plan, {kernel: affine}))


def test_a_full_slice_and_a_linear_layer_over_pixels(onnx_nets):
    bounds = ((0, None, 1),) * 4
    nodes = (Node("s", Slice(bounds), ("x",)), Node("fc", Linear(), ("s",)))
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    model = Model(Graph(nodes, ("x",), ("fc",)), {"fc": {"kernel": kernel}}, (InputContract(4, 6),))
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 3)).astype(np.float32)
    (found,) = onnx_nets.run_file(serialize(float_onnx(model)), x, optimize=True)
    np.testing.assert_allclose(found, x @ np.asarray(kernel), atol=1e-5)


@pytest.mark.parametrize("values", [[1, 15, 7], [-8, 7, -1, 0]])
def test_nibbles_are_packed_low_first(values):
    array = np.array(values, np.int8)
    packed = np.frombuffer(pack_nibbles(array), np.uint8)
    assert packed[0] == (values[0] & 15) | (values[1] & 15) << 4
    kind = onnx.TensorProto.INT4 if min(values) < 0 else onnx.TensorProto.UINT4
    found = onnx.numpy_helper.to_array(tensor("t", array, kind))
    np.testing.assert_array_equal(found.astype(np.int8), array)


def test_per_tensor_kernels_are_exported(onnx_nets):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 3, 4)), jnp.float32)
    graph = Graph((Node("conv", Conv2d(), ("x",)),), ("x",), ("conv",))
    params = {"conv": {"kernel": kernel, "bias": jnp.ones(4)}}
    model = Model(graph, params, (InputContract(5, 5),))
    edge, slot = Site("conv", 0), Site("conv")
    plan = Plan(
        ((slot, Spec(Grid(8, True))), (edge, Spec(Grid(8)))), (), Scheme(8, 8), "zsq_all_low"
    )
    scale = Affine(jnp.full((1, 1, 1, 1), 0.02), jnp.zeros((1, 1, 1, 1), jnp.int8))
    q = QuantizedModel(model, plan, {slot: scale, edge: Affine(jnp.float32(0.03), jnp.uint8(128))})
    x = np.random.default_rng(1).normal(size=(2, 5, 5, 3)).astype(np.float32)
    for optimize in (False, True):
        (found,) = onnx_nets.run_file(serialize(quantized_onnx(q)), x, optimize=optimize)
        np.testing.assert_allclose(found, np.asarray(simulated(q, jnp.asarray(x))), atol=1e-5)


def dequantizer(proto: onnx.ModelProto, codes: str) -> onnx.NodeProto:
    """The node that reads these codes."""
    (node,) = [n for n in proto.graph.node if codes in n.input]
    return node


def attribute(node: onnx.NodeProto, name: str) -> int | None:
    """An integer attribute, None where it is not given."""
    return next((a.i for a in node.attribute if a.name == name), None)


def test_kernels_have_their_scales_along_output_channels(onnx_nets):
    proto = onnx.load_model_from_string(onnx_nets.integer_file("unet"))
    stored = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    assert attribute(dequantizer(proto, "conv1.kernel.codes"), "axis") == 0
    assert attribute(dequantizer(proto, "up1.kernel.codes"), "axis") == 1
    assert stored["up1.kernel.codes"] == (16, 12, 2, 2)
    assert stored["up1.kernel.scale"] == (12,)
    assert attribute(dequantizer(proto, "up4.kernel.codes"), "axis") is None
    assert stored["up4.kernel.codes"] == (16, 4, 2, 2)
    assert stored["up4.kernel.scale"] == ()


def test_attention_becomes_integer_kernels(onnx_nets, tmp_path):
    found = onnx_nets.kinds(optimized(onnx_nets.integer_file("transformer"), tmp_path))
    assert found["QGemm"] == 7  # linear layers over tokens, with their int32 biases
    assert found["QLinearMatMul"] == 2
    assert not {"Gemm", "MatMul", "MatMulNBits"} & set(found)


def test_a_tensor_that_is_only_renamed_shares_the_pair_of_its_origin(onnx_nets):
    q = onnx_nets.quantized("windows")
    proto = onnx.load_model_from_string(onnx_nets.integer_file("windows"))
    edges = quantized_edges(q)
    drafted = draft(q.model, edges)
    tensors = {e.tensor: drafted.pairs[e.key] for e in edges}
    assert tensors["first"] == tensors["add"]
    written = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert len(written) == len(set(tensors.values())) < len(tensors)


def affine(scale: float, zero_point: int) -> Affine:
    """Scale and zero point of a tensor."""
    return Affine(jnp.float32(scale), jnp.uint8(zero_point))


def test_a_renamed_tensor_on_a_grid_of_its_own_has_a_pair_of_its_own(onnx_nets):
    n = onnx_nets.Net(size=4)
    x = n.conv("conv", "images", 3, 4)
    y = n.op("turned", Transpose((0, 3, 1, 2)), x)
    model = n.finish(n.op("scores", MatMul(transposed=True), y, y))
    edges = {Site("turned", 0): affine(0.05, 100), Site("scores", 0): affine(0.1, 7)}
    plan = Plan(tuple((s, Spec(Grid(8))) for s in edges), (), Scheme(8, 8), "zsq_all_low")
    q = QuantizedModel(model, plan, edges)
    proto = quantized_onnx(q)
    assert onnx_nets.kinds(proto)["QuantizeLinear"] == 2
    x = onnx_nets.images(model, 3)
    want = np.asarray(simulated(q, x))
    for optimize in (False, True):
        (found,) = onnx_nets.run_file(serialize(proto), x, optimize=optimize)
        np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("quantized_input", [False, True])
def test_linear_layers_over_tokens_compute_the_simulation(onnx_nets, bits, quantized_input):
    """Runtimes would multiply a float input with integer weights of a MatMul approximately."""
    n = onnx_nets.Net(size=6)
    x = n.linear("fc1", n.op("tokens", Reshape((9, 12)), "images"), 12, 16)
    x = n.op("cut", Reshape((3, 3, 16)), x)
    model = n.finish(n.linear("fc2", x, 16, 5, bias=False))
    kernels = [Site(name) for name in ("fc1", "fc2")]
    edges = [Site(name, 0) for name in ("fc1", "fc2")] if quantized_input else []
    grid = Grid(bits, bits == 8, -1)
    entries = [(s, Spec(grid)) for s in kernels] + [(s, Spec(Grid(8))) for s in edges]
    plan = Plan(tuple(entries), (), Scheme(bits, 8), "zsq_all_low")
    qparams = {s: affine(0.0313, 120) for s in edges}
    for site in kernels:
        chan = model.params[site.node]["kernel"].shape[1]
        zero = jnp.full((1, chan), 0 if bits == 8 else 2 ** (bits - 1), grid.dtype)
        steps = jnp.linspace(0.93, 1.37, chan)[None] / 2 ** (bits - 1)
        qparams[site] = Affine(steps.astype(jnp.float32), zero)
    q = QuantizedModel(model, plan, qparams)
    x = onnx_nets.images(model, 3)
    want = np.asarray(simulated(q, x))
    for optimize in (False, True):
        (found,) = onnx_nets.run_file(serialize(quantized_onnx(q)), x, optimize=optimize)
        np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def test_a_clip_that_quantizing_repeats_becomes_a_relu(onnx_nets):
    n = onnx_nets.Net(size=4)
    x = n.op("clip", Clip(0.0, 6.0), n.conv("conv1", "images", 3, 4))
    y = n.op("other", Clip(0.0, 3.0), n.conv("conv2", x, 4, 4))
    model = n.finish(n.conv("conv3", y, 4, 4))
    edges = {Site(s, 0): affine(6 / 255, 0) for s in ("conv2", "conv3")}
    plan = Plan(tuple((s, Spec(Grid(8))) for s in edges), (), Scheme(8, 8), "zsq_all_low")
    found = onnx_nets.kinds(quantized_onnx(QuantizedModel(model, plan, edges)))
    assert (found["Relu"], found["Clip"]) == (1, 1)


def test_weights_beyond_a_file_are_refused(nets, monkeypatch):
    monkeypatch.setattr(onnx_out, "LARGEST", onnx_out.SPARE + 100)
    with pytest.raises(ExportError, match=r"take 0\.0 GiB in float, .* at most 2 GiB"):
        serialize(float_onnx(nets.stem()))
    with pytest.raises(ExportError, match=r"take 2\.4 GiB"):
        onnx_out.check_file_size(int(2.4 * 2**30))
