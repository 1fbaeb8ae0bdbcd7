"""ONNX graphs as programs: what the format allows, and what is refused."""

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from onnx_protos import NEWEST, RELU, W, X, Y, model, node, read, refused

from dfq_jax.errors import CheckpointError, UnsupportedModelError
from dfq_jax.io.frontends.onnx_graph import read_onnx_program
from dfq_jax.io.frontends.program import Call, ProgramInput, Ref

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
    assert program.inputs == (ProgramInput("x", (1, 3, 8, 8)),)
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
    ("shape", "expected", "names"),
    [
        (["batch", 3, 8, 8], (1, 3, 8, 8), ("batch", "", "", "")),
        ([None, 3, "height", None], (1, 3, None, None), ("", "", "height", "")),
        ([None, 3, "a\nb", "w" * 101], (1, 3, None, None), ()),
        ([-1, 3, 0, 8], (1, 3, None, 8), ()),
        ([4, 3, 8, 8], (4, 3, 8, 8), ()),
        ([], (), ()),
    ],
)
def test_free_sizes_of_inputs(shape, expected, names):
    """Names that could disturb a terminal are not kept."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT16, shape)
    assert read(model(RELU, inputs=[value])).inputs == (ProgramInput("x", expected, names),)


def test_initialisers_that_are_also_inputs_are_weights():
    inputs = [X, helper.make_tensor_value_info("w", TensorProto.FLOAT, [3])]
    program = read(model(node("Add", ["x", "w"], ["y"]), inputs=inputs, weights=[W]))
    assert [value.name for value in program.inputs] == ["x"]


@pytest.mark.parametrize(
    ("value", "message", "error"),
    [
        (
            helper.make_tensor_value_info("x", TensorProto.UINT8, [1]),
            "input 'x' has type UINT8; supported are FLOAT, FLOAT16, DOUBLE, INT64, INT32, BOOL",
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


@pytest.mark.parametrize("opset", [1, 7, 8, NEWEST + 1, 99])
def test_other_opsets_are_refused_with_what_to_do(opset):
    remedy = "opset_version=17, or " + ("get a newer onnx" if opset > 17 else "convert it")
    message = rf"uses ONNX opset {opset}; 9 to {NEWEST} are supported.*{remedy}"
    refused(model(RELU, opset=opset), message, UnsupportedModelError)


@pytest.mark.parametrize("opset", [9, 11, 17, NEWEST])
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
