"""ONNX models of a few nodes, and how they are read."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dfq_jax.errors import CheckpointError, DfqError
from dfq_jax.io.frontends.onnx_graph import read_onnx_program
from dfq_jax.io.frontends.program import Program

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
