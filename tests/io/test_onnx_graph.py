"""ONNX graphs as programs: what PyTorch exports, what the format allows, and what is refused."""

import contextlib
import io
import random
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from dfq_jax.errors import CheckpointError, DfqError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.onnx_graph import folded_batch_norm_message, read_onnx_program
from dfq_jax.io.program import Call, Input, Program, Ref

NEWEST = onnx.defs.onnx_opset_version()
RELU = helper.make_node("Relu", ["x"], ["y"], name="act")
X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
W = numpy_helper.from_array(np.arange(3, dtype=np.float32), "w")
node = helper.make_node


def model(*nodes: onnx.NodeProto, inputs=(X,), outputs=(Y,), weights=(), opset=17, **options):
    """A model of these nodes; `options` are those of `helper.make_model`."""
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(weights))
    imports = [helper.make_opsetid(d, 1) for d in ("f", "com.acme")]
    options = {"opset_imports": [helper.make_opsetid("", opset), *imports]} | options
    return helper.make_model(graph, **options)


def read(proto: onnx.ModelProto) -> Program:
    return read_onnx_program(proto.SerializeToString(), "net.onnx", None)


def refused(proto: onnx.ModelProto, message: str, error: type[DfqError] = CheckpointError) -> None:
    """Checks that the model is refused with that error and message."""
    with pytest.raises(error, match=rf"net\.onnx.*{message}"):
        read(proto)


# what PyTorch exports


def torch_bytes(**options: Any) -> bytes:
    """A small network of PyTorch with trained-looking batch norms, exported."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(8, 8, 3, groups=8),
        torch.nn.BatchNorm2d(8),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    ).eval()
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(1, 3, 8, 8),), buffer, dynamo=False, **options)
    return buffer.getvalue()


def kept() -> dict[str, Any]:
    """The options our message recommends."""
    torch = pytest.importorskip("torch")
    return {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}


@pytest.mark.torch
@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20])
def test_recommended_export_keeps_batch_norms_and_parameter_paths(opset):
    data = torch_bytes(opset_version=opset, **kept())
    program = read_onnx_program(data, "net.onnx", None)
    targets = [call.target for call in program.calls]
    assert targets.count("onnx.BatchNormalization") == 2
    assert folded_batch_norm_message(program, "net.onnx") is None
    assert program.inputs[0].shape == (1, 3, 8, 8)
    assert {"0.weight", "1.running_var", "4.bias", "7.weight"} <= set(program.paths)
    reference = onnx.load_model_from_string(data)
    for tensor in reference.graph.initializer:
        expected = numpy_helper.to_array(tensor)
        got = program.arrays[tensor.name]
        assert (got.dtype, got.tolist()) == (expected.dtype, expected.tolist())
    assert len(program.calls) + targets.count("onnx.Constant") == sum(
        n.op_type != "Constant" for n in reference.graph.node
    )
    assert all(call.kwargs["opset_version"] == opset for call in program.calls)
    assert targets[0] == "onnx.Conv"
    assert program.calls[0].kwargs["kernel_shape"] == (3, 3)
    assert program.calls[0].path == "/0/Conv"


@pytest.mark.torch
def test_default_export_is_recognised_as_folded():
    program = read_onnx_program(torch_bytes(), "net.onnx", None)
    message = folded_batch_norm_message(program, "net.onnx")
    assert message is not None
    assert "2 convolutions, 2 of them with a bias, and no batch norm" in message
    assert not any(name.startswith("onnx::") for name in program.paths)


@pytest.mark.torch
def test_truncations_and_flipped_bytes_end_in_a_typed_error():
    data = torch_bytes()
    for percent in range(0, 100, 2):
        with pytest.raises(DfqError, match=r"net\.onnx"):
            read_onnx_program(data[: len(data) * percent // 100], "net.onnx", None)
    rng = random.Random(0)
    read_well = 0
    for _ in range(600):
        blob = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            blob[rng.randrange(len(blob))] = rng.randrange(256)
        with contextlib.suppress(DfqError):
            read_well += bool(read_onnx_program(bytes(blob), "net.onnx", None))
    assert 0 < read_well < 600


# nodes and values


def test_nodes_become_calls():
    proto = model(
        node("Conv", ["x", "w"], ["a"], name="/stem/Conv", group=1, auto_pad="VALID"),
        node("Clip", ["a", "", "w"], ["", "b"]),
        node("Dropout", ["a"], ["c", "mask"], domain="ai.onnx"),
        node("Fancy", ["b", "c"], ["y"], domain="com.acme", ratio=0.5, sizes=[1, 2], fs=[0.5]),
        weights=[W],
    )
    program, plain = read(proto), {"opset_version": 17}
    conv = plain | {"group": 1, "auto_pad": "VALID"}
    fancy = {"ratio": 0.5, "sizes": (1, 2), "fs": (0.5,), "opset_version": 1}
    assert program.calls == (
        Call("onnx.Conv", (Ref("x"), Ref("w")), conv, ("a",), "/stem/Conv"),
        Call("onnx.Clip", (Ref("a"), None, Ref("w")), plain, (None, "b"), "b"),
        Call("onnx.Dropout", (Ref("a"),), plain, ("c", None), "c"),
        Call("com.acme.Fancy", (Ref("b"), Ref("c")), fancy, ("y",), "y"),
    )
    assert program.inputs == (Input("x", (1, 3, 8, 8)),)
    assert (program.outputs, set(program.arrays), program.notes) == (("y",), {"w"}, ())


def test_attributes_are_decoded():
    body = helper.make_graph([node("Relu", ["x"], ["b"])], "body", [], [Y])
    proto = model(
        node("If", ["x"], ["y"], then_branch=body, s="a", ss=["b", "c"], t=W, ts=[W, W], gs=[body])
    )
    kwargs = read(proto).calls[0].kwargs
    assert kwargs["then_branch"] == kwargs["gs"] == "<graph>"
    assert (kwargs["s"], kwargs["ss"]) == ("a", ("b", "c"))
    for array in (kwargs["t"], *kwargs["ts"]):
        assert array.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"value": W}, np.arange(3, dtype=np.float32)),
        ({"value_float": 0.5}, np.float32(0.5)),
        ({"value_int": 7}, np.int64(7)),
        ({"value_floats": [0.5, 1.0]}, np.array([0.5, 1], np.float32)),
        ({"value_ints": [3, -1]}, np.array([3, -1])),
    ],
)
def test_constants_become_arrays(attributes, expected):
    program = read(model(node("Constant", [], ["c"], **attributes), node("Add", ["x", "c"], ["y"])))
    assert [call.target for call in program.calls] == ["onnx.Add"]
    got = program.arrays["c"]
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert (got == expected).all()
    assert not got.flags.writeable


@pytest.mark.parametrize(
    ("constant", "message", "error"),
    [
        (node("Constant", [], ["c"], value_string="a"), "value_string", UnsupportedModelError),
        (node("Constant", [], ["c"], value_strings=["a"]), "value_strings", UnsupportedModelError),
        (node("Constant", [], ["c"], other=1), "holds other", UnsupportedModelError),
        (node("Constant", [], ["c"]), "needs one output and one attribute", CheckpointError),
        (node("Constant", [], ["", "c"], value_int=1), "needs one output", CheckpointError),
        (node("Constant", [], ["c"], value_float="a"), "is damaged", CheckpointError),
        (node("Constant", [], ["c"], value=3), "holds value", UnsupportedModelError),
        (
            node("Constant", [], ["c"], value=TensorProto(name="t", data_type=TensorProto.STRING)),
            "tensor t has type STRING",
            UnsupportedModelError,
        ),
    ],
)
def test_odd_constants_are_refused(constant, message, error):
    refused(model(constant, node("Add", ["x", "c"], ["y"])), message, error)


def test_parameter_paths_are_told_from_other_names():
    names = {
        "layer1.0.conv1.weight": True,
        "0.weight": True,
        "weight": True,
        "my-block.running_mean": True,
        "onnx::Conv_123": False,
        "123": False,
        "1.5": False,
        "/Constant_output_0": False,
        "conv/kernel:0": False,
        ".weight": False,
        "val_3": False,
        "a..b": False,
        "a.b\n": False,
    }
    weights = [numpy_helper.from_array(np.zeros(1, np.float32), name) for name in names]
    program = read(model(RELU, weights=weights))
    assert program.paths == {name: name for name, is_path in names.items() if is_path}
    assert set(program.arrays) == set(names)


# inputs


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (["batch", 3, 8, 8], (1, 3, 8, 8)),
        ([None, 3, "height", None], (1, 3, None, None)),
        ([-1, 3, 0, 8], (1, 3, None, 8)),
        ([4, 3, 8, 8], (4, 3, 8, 8)),
        ([], ()),
    ],
)
def test_free_sizes_of_inputs(shape, expected):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT16, shape)
    assert read(model(RELU, inputs=[value])).inputs == (Input("x", expected),)


def test_initialisers_that_are_also_inputs_are_weights():
    inputs = [X, helper.make_tensor_value_info("w", TensorProto.FLOAT, [3])]
    program = read(model(node("Add", ["x", "w"], ["y"]), inputs=inputs, weights=[W]))
    assert [value.name for value in program.inputs] == ["x"]


@pytest.mark.parametrize(
    ("value", "message", "error"),
    [
        (
            helper.make_tensor_value_info("x", TensorProto.INT64, [1]),
            "input 'x' has type INT64; supported are FLOAT, FLOAT16, DOUBLE",
            UnsupportedModelError,
        ),
        (
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
            "input 'x' does not say its shape",
            UnsupportedModelError,
        ),
        (
            helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1]),
            "input 'x' is no tensor",
            UnsupportedModelError,
        ),
        (onnx.ValueInfoProto(name="x"), "input 'x' is no tensor", UnsupportedModelError),
        (
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2**60]),
            "input 'x' claims shape",
            CheckpointError,
        ),
    ],
)
def test_odd_inputs_are_refused(value, message, error):
    refused(model(RELU, inputs=[value]), message, error)


# what is refused


@pytest.mark.parametrize("opset", [1, 7, 10, NEWEST + 1, 99])
def test_other_opsets_are_refused_with_what_to_do(opset):
    remedy = "opset_version=17, or " + ("get a newer onnx" if opset > 17 else "convert it")
    message = rf"uses ONNX opset {opset}; 11 to {NEWEST} are supported.*{remedy}"
    refused(model(RELU, opset=opset), message, UnsupportedModelError)


@pytest.mark.parametrize("opset", [11, 17, NEWEST])
def test_supported_opsets_are_passed_on(opset):
    assert read(model(RELU, opset=opset)).calls[0].kwargs == {"opset_version": opset}


def test_opset_imports_must_be_clear():
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx", 18)]
    refused(model(RELU, opset_imports=imports), "imports two opsets")
    refused(model(RELU, opset_imports=[]), "uses ONNX opset 1;", UnsupportedModelError)
    alone = [helper.make_opsetid("ai.onnx", 15)]
    assert read(model(RELU, opset_imports=alone)).calls[0].kwargs == {"opset_version": 15}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [node("Add", ["x", "b"], ["a"], name="n1"), node("Relu", ["a"], ["b"], name="n2")],
            r"node 'n1' \(Add\) reads 'b' before node 'n2' \(Relu\) computes it.*cycle",
        ),
        ([node("Add", ["x", "y"], ["y"], name="n1")], "'n1'.*reads 'y' before node 'n1'"),
        ([node("Relu", ["a"], ["y"]), node("Relu", ["x"], ["a"])], "node 'y'.*out of order"),
        (
            [node("Conv", ["x", "conv1.weight"], ["y"], name="n1")],
            r"node 'n1' \(Conv\) reads 'conv1.weight', which is no input, initialiser",
        ),
        (
            [RELU, node("Relu", ["x"], ["y"], name="n2")],
            r"node 'n2' \(Relu\) defines 'y' a second time",
        ),
        ([node("Relu", ["x"], ["x"], name="n1")], "'n1'.*defines 'x' a second time"),
        ([RELU, node("Relu", ["x"], ["w"])], "defines 'w' a second time"),
        ([node("Split", ["x"], ["y", "y"], name="n1")], "'n1'.*defines 'y' a second time"),
        ([RELU, node("Relu", ["y"], ["z"], name="act")], "two nodes named 'act'"),
        ([node("Relu", ["x"], ["z"])], "output 'y' is computed by no node"),
        ([], "it has no nodes"),
    ],
)
def test_graphs_that_contradict_themselves_are_refused(nodes, message):
    refused(model(*nodes, weights=[W]), message)


def test_repeated_names_are_refused():
    refused(model(RELU, weights=[W, W]), "defines initialiser 'w' twice")
    refused(model(RELU, inputs=[X, X]), "defines input 'x' twice")


def test_other_shapes_of_models_are_refused():
    refused(model(RELU, outputs=[]), "has no outputs")
    refused(onnx.ModelProto(ir_version=8), "no ONNX model: it has no version or graph")
    constant = node("ConstantOfShape", ["w"], ["y"])
    refused(model(constant, inputs=[], weights=[W]), "has no input", UnsupportedModelError)
    with pytest.raises(CheckpointError, match="no version or graph"):
        read_onnx_program(b"", "net.onnx", None)
    sparse = model(RELU)
    sparse.graph.sparse_initializer.add(dims=[3], values=W)
    refused(sparse, "stores w as a sparse initialiser.*save it dense", UnsupportedModelError)


def test_training_information_is_ignored_with_a_note():
    proto = model(RELU)
    proto.training_info.add()
    assert read(proto).notes == ("net.onnx: training information is ignored",)


def test_odd_attributes_are_refused():
    proto = model(RELU)
    attribute = proto.graph.node[0].attribute.add(name="s", type=AttributeProto.STRING, s=b"\xff")
    refused(proto, r"attribute 's' of node 'act' \(Relu\) is no text")
    attribute.s = b"a"
    proto.graph.node[0].attribute.add().CopyFrom(attribute)
    refused(proto, "node 'act'.*has attribute 's' twice")
    proto.graph.node[0].attribute.pop()
    attribute.type = AttributeProto.TYPE_PROTO
    refused(proto, "attribute 's' .*is of kind TYPE_PROTO", UnsupportedModelError)
    attribute.type = AttributeProto.UNDEFINED
    refused(proto, "is of kind UNDEFINED", UnsupportedModelError)
    attribute.ref_attr_name = "a"
    refused(proto, "refers to a function there is none of")
    attribute.name = ""
    attribute.ref_attr_name = ""
    refused(proto, "has attribute '' without a name")


def test_messages_escape_names():
    name = "\x1b[31m<b>\n" + "x" * 500
    with pytest.raises(CheckpointError) as caught:
        read(model(node("Relu", [name], ["y"], name=name)))
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 500


# functions of the model


IMPORTS = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]


def function(name: str, *nodes: onnx.NodeProto, imports=IMPORTS, **options) -> onnx.FunctionProto:
    """A function of `a` that computes `b`."""
    return helper.make_function("f", name, ["a"], ["b"], list(nodes), imports, **options)


def call(name: str, source: str, target: str, **attributes) -> onnx.NodeProto:
    return node(name, [source], [target], domain="f", **attributes)


def test_functions_are_inlined():
    scaled = function(
        "Scaled",
        node("Constant", [], ["c"], value=W),
        node("Mul", ["a", "c"], ["m"], name="mul"),
        node("LeakyRelu", ["m"], ["b"]),
        attributes=["alpha"],
    )
    leaky = scaled.node[2].attribute.add(name="alpha", type=AttributeProto.FLOAT)
    leaky.ref_attr_name = "alpha"
    program = read(
        model(
            call("Scaled", "x", "h", alpha=0.25),
            call("Scaled", "h", "y", alpha=0.5),
            functions=[scaled],
        )
    )
    assert [c.target for c in program.calls] == ["onnx.Mul", "onnx.LeakyRelu"] * 2
    assert [c.kwargs.get("alpha") for c in program.calls] == [None, 0.25, None, 0.5]
    assert [array.tolist() for array in program.arrays.values()] == [[0, 1, 2]] * 2
    assert program.notes == ("net.onnx: inlined f.Scaled",)


def test_functions_that_call_themselves_are_refused():
    loop = [function("A", call("B", "a", "b")), function("B", call("A", "a", "b"))]
    refused(model(call("A", "x", "y"), functions=loop), "function A calls itself")


def chain(length: int, *, twice: bool) -> list[onnx.FunctionProto]:
    """Functions each of which calls the next, once or twice."""
    end = function(f"F{length}", node("Relu", ["a"], ["b"]))
    once = [function(f"F{i}", call(f"F{i + 1}", "a", "b")) for i in range(length)]
    both = [
        function(f"F{i}", call(f"F{i + 1}", "a", "t"), call(f"F{i + 1}", "t", "b"))
        for i in range(length)
    ]
    return [*(both if twice else once), end]


def test_functions_that_would_fill_the_memory_are_refused():
    bomb, deep = chain(40, twice=True), chain(500, twice=False)
    start = call("F0", "x", "y")
    refused(model(start, functions=bomb), "would grow to [0-9]{14} bytes", UnsafeInputError)
    refused(model(start, functions=deep), "nests functions over 50 deep", UnsafeInputError)


def test_functions_that_cannot_be_inlined_are_refused():
    start, relu = call("A", "x", "y"), node("Relu", ["a"], ["b"])
    older = function("A", relu, imports=[helper.make_opsetid("", 13)])
    refused(model(start, functions=[older]), r"cannot be inlined: f\.A", UnsupportedModelError)
    wide = node("A", ["x", "x"], ["y"], domain="f")
    proto = model(wide, functions=[function("A", relu)])
    refused(proto, "cannot be inlined", UnsupportedModelError)
    refused(model(start, functions=[function("A", relu)] * 2), "defines a function twice")


# batch norms that are gone


def convolutions(*biased: bool, last: str = "Relu") -> Program:
    nodes = [
        node("Conv", [f"v{i}", "w", "w"] if bias else [f"v{i}", "w"], [f"v{i + 1}"])
        for i, bias in enumerate(biased)
    ]
    image = helper.make_tensor_value_info("v0", TensorProto.FLOAT, ["n", 3, None, 32])
    end = node(last, [f"v{len(nodes)}"], ["y"])
    return read(model(*nodes, end, inputs=[image], weights=[W]))


def test_folded_message_says_what_why_and_how():
    message = folded_batch_norm_message(convolutions(*[True] * 4, False), "net.onnx")
    assert message is not None
    for part in (
        "net.onnx has 5 convolutions, 4 of them with a bias, and no batch norm",
        "synthesis and range estimation need their statistics",
        "torch.export.save(torch.export.export(model.eval(), (torch.zeros(1, 3, 224, 32),)), "
        '"net.pt2")',
        'torch.onnx.export(model.eval(), (torch.zeros(1, 3, 224, 32),), "net.onnx", '
        "training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False, dynamo=False)",
        "--no-bn-fallback",
        "no_bn_fallback=True",
        "expect lower accuracy",
    ):
        assert part in message
    assert message.index(".pt2") < message.index("torch.onnx.export")


@pytest.mark.parametrize(
    ("biased", "last"),
    [
        ((), "Relu"),
        ((False, False), "Relu"),
        ((True, True, True, False), "Relu"),
        ((True, True), "BatchNormalization"),
        ((True, True), "InstanceNormalization"),
        ((True, True), "LayerNormalization"),
        ((True, True), "GroupNormalization"),
    ],
)
def test_other_networks_get_no_message(biased, last):
    assert folded_batch_norm_message(convolutions(*biased, last=last), "net.onnx") is None
