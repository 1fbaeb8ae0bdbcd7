"""Models of TensorFlow, Keras and JAX, passed as they are, end in the lines that convert them."""

import math
import re
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from image_nets import ImageNet

import dfq_jax as dfq
from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.io.load import load
from dfq_jax.io.readers.foreign import AS_JAX

FILES = {
    "net.h5": (b"\x89HDF\r\n\x1a\n", r"an HDF5 file.*load_model\(.net\.h5.\)"),
    "weights.pth": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "net.tflite": (b"\x1c\0\0\0TFL3\x14\0", r"--tflite net\.tflite --output net\.onnx"),
    "saved_model.pb": (b"\x08\x01\x12\x04abcd", r"belongs to a SavedModel.*--saved-model models"),
    "frozen.pb": (b"\x0a\x20abcd", r"--graphdef frozen\.pb --output net\.onnx --inputs"),
    "flax.msgpack": (b"\x82\xa6params", "the weights of a network of JAX"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / "models" / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=f"(?s){message}") as caught:
        load(path)
    assert "torch" not in str(caught.value)


def test_archives_of_keras(tmp_path):
    path = tmp_path / "net.keras"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, "{}")
    with pytest.raises(UnsupportedModelError, match=r"(?s)model of Keras.*format=.onnx") as caught:
        load(path)
    assert "keras.models.load_model('net.keras')" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("saved_model.pb", "--saved-model .*/net --output"), ("_CHECKPOINT_METADATA", "of Orbax")],
)
def test_folders(tmp_path, name, message):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / name).write_bytes(b"{}")
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "net")


class Convolved:
    """What `keras.models.load_model` gives: a convolution and a batch norm as Keras writes it."""

    input_shape = (None, 8, 8, 3)

    def __init__(self):
        value = lambda *shape: types.SimpleNamespace(
            value=jnp.linspace(0.5, 1.5, math.prod(shape)).reshape(shape)
        )
        self.trainable_variables = [value(3, 4), value(4), value(4)]
        self.non_trainable_variables = [value(4), value(4)]

    def stateless_call(self, trainable, fixed, images):
        kernel, scale, offset = trainable
        mean, variance = fixed
        inverse = scale / jnp.sqrt(variance + 1e-3)
        y = jnp.einsum("nhwc,cd->nhwd", images, kernel)
        return jnp.maximum(y * inverse + (offset - mean * inverse), 0), fixed


def test_the_lines_through_jax_run(tmp_path, monkeypatch):
    """And keep the statistics."""
    models = types.SimpleNamespace(load_model=lambda path: Convolved())
    monkeypatch.setitem(sys.modules, "keras", types.SimpleNamespace(models=models))
    monkeypatch.chdir(tmp_path)
    lines = re.sub(r"(?m)^  ", "", AS_JAX.format(model='"net.keras"'))
    exec(lines, {})
    model = dfq.load("net.onnx")
    assert any(isinstance(node.op, BatchNorm) for node in model.graph.nodes)
    assert model.contract.shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("producer", "message"),
    [
        ("tf2onnx", "keras.models.load_model"),
        ("jax2onnx", r"dfq\.load\(module, variables"),
        ("pytorch", r"torch\.export\.save"),
    ],
)
def test_folded_batch_norms_are_told_by_who_exported(tmp_path, producer, message):
    net = ImageNet((1, 3, 12, 10))
    y = net.add(
        "Conv",
        "x",
        net.weight(np.ones((4, 3, 3, 3), np.float32)),
        net.weight(np.ones(4, np.float32)),
    )
    proto = net.proto(net.classes(y, 4))
    proto.producer_name = producer
    onnx.save(proto, tmp_path / "net.onnx")
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path / "net.onnx")
