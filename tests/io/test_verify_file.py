"""What in a file is not as the exporter writes it."""

import onnx
import pytest

from dfq_jax.io.verification.file import differences


@pytest.fixture
def q(onnx_nets):
    return onnx_nets.quantized("residual")


@pytest.fixture
def proto(onnx_nets):
    return onnx.load_model_from_string(onnx_nets.integer_file("residual"))


def tensor(proto, name):
    return next(t for t in proto.graph.initializer if t.name == name)


def node(proto, name):
    return next(n for n in proto.graph.node if n.name == name)


def test_a_file_as_it_was_written(q, proto):
    assert list(differences(proto, q)) == []


def test_other_forms_of_the_same(q, proto):
    """Values in typed fields, another order, comments, provenance."""
    scale = tensor(proto, "relu1.scale")
    value = onnx.numpy_helper.to_array(scale)
    scale.ClearField("raw_data")
    scale.float_data.append(float(value))
    proto.graph.initializer.reverse()
    proto.graph.node[0].doc_string = "first"
    proto.producer_version = "9"
    proto.metadata_props.add(key="dfq.version", value="9")
    assert list(differences(proto, q)) == []


def test_constants(q, proto):
    kernel = tensor(proto, "conv2.kernel.codes")
    data = bytearray(kernel.raw_data)
    data[7] ^= 64
    kernel.raw_data = bytes(data)
    (told,) = differences(proto, q)
    count = len(data)
    assert told == f"initializer 'conv2.kernel.codes' differs in 1 of {count} bytes, the first at 7"
    kernel.dims[0] *= 2
    (told,) = differences(proto, q)
    assert told.startswith("initializer 'conv2.kernel.codes' is INT8 [48, 16, 3, 3], not INT8 [24")
    kernel.name = "other"
    assert list(differences(proto, q)) == [
        "initializer 'conv2.kernel.codes' is missing",
        "initializer 'other' is not one of the network",
    ]


def test_nodes(q, proto):
    conv = node(proto, "conv2")
    next(a for a in conv.attribute if a.name == "strides").ints[0] = 1
    assert list(differences(proto, q)) == ["node 'conv2' has other attributes: strides"]
    conv.input[0], conv.input[1] = conv.input[1], conv.input[0]
    (told,) = differences(proto, q)
    assert told.startswith("node 'conv2' has other inputs: ('conv2.kernel', ")
    proto.graph.node.remove(conv)
    assert list(differences(proto, q)) == ["node 'conv2' is missing"]


def test_the_rest(q, proto):
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9
    proto.opset_import[0].version = 18
    next(p for p in proto.metadata_props if p.key == "dfq.contract").value = "{}"
    proto.graph.node.add(op_type="Identity", input=["logits"], output=["again"])
    assert list(differences(proto, q)) == [
        "node '-> again' is not one of the network",
        "its outputs are not those of the network",
        "it uses operators of {'ai.onnx': 18}, the network those of {'ai.onnx': 17}",
        "its dfq.contract is not that of the network",
    ]
