"""Lines, inputs of three axes: which of them has the channels, by what reads it."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from image_nets import ImageNet, classifier

import dfq_jax as dfq
from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.load import load

LENGTH = 12


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def saved(tmp_path, proto):
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    return path


def run(file, x) -> Any:
    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def scores(net, x, width):
    """Four classes from (batch, width, ...)."""
    flat = net.add("Flatten", net.add("GlobalAveragePool", x))
    return net.add("Gemm", flat, net.weight(normal(width, 4)))


def line(net, channels):
    """PyTorch: a transposition before the first convolution."""
    x = net.add("Transpose", "x", perm=[0, 2, 1])
    return scores(net, net.add("Conv", x, net.weight(normal(5, channels, 3))), 5)


def as_image(net, channels):
    """Keras: a line is an image of one row, and the converter transposes that."""
    x = net.add("Unsqueeze", "x", net.weight(np.array([1])))
    x = net.add("Transpose", x, perm=[0, 3, 1, 2])
    return scores(net, net.add("Conv", x, net.weight(normal(5, channels, 1, 3))), 5)


def reshaped(net, channels):
    """Keras with fixed sizes: the row is put there by a reshape."""
    x = net.add("Reshape", "x", net.weight(np.array([1, 1, LENGTH, channels])))
    x = net.add("Transpose", x, perm=[0, 3, 1, 2])
    return scores(net, net.add("Conv", x, net.weight(normal(5, channels, 1, 3))), 5)


def per_step(net, channels):
    """A linear layer at every position."""
    x = net.add("MatMul", "x", net.weight(normal(channels, 5)))
    return scores(net, net.add("Transpose", x, perm=[0, 2, 1]), 5)


def flat(net, channels):
    """Nothing tells but the sizes."""
    x = net.add("Flatten", "x")
    return net.add("Gemm", x, net.weight(normal(LENGTH * channels, 4)))


STARTS = (line, as_image, reshaped, per_step)


@pytest.mark.parametrize("channels", [1, 2, LENGTH])
@pytest.mark.parametrize("start", STARTS)
def test_channels_last(tmp_path, start, channels):
    """Also where there are as many channels as positions."""
    net = ImageNet((1, LENGTH, channels))
    path = saved(tmp_path, net.proto(start(net, channels)))
    loaded = load(path)
    assert loaded.model.contract.layout == "NHWC"
    assert loaded.model.contract.shape == (1, LENGTH, channels)
    assert any("its lines have their channels last" in note for note in loaded.notes)
    x = normal(1, LENGTH, channels)
    wanted = run(path, x)
    np.testing.assert_allclose(dfq.predict(loaded.model, x[:, None]), wanted, atol=1e-5)
    out = tmp_path / "out.onnx"
    dfq.export(loaded.model, out)
    np.testing.assert_allclose(run(out, x), wanted, atol=1e-5)
    assert load(out).model.contract == loaded.model.contract


def test_sizes_tell_where_nothing_else_does(tmp_path):
    for shape, channels, layout in (((LENGTH, 1), 1, "NHWC"), ((LENGTH, 3), LENGTH, "NCHW")):
        net = ImageNet((1, *shape))
        contract = load(saved(tmp_path, net.proto(flat(net, shape[1])))).model.contract
        assert (contract.channels, contract.layout) == (channels, layout)


@pytest.mark.parametrize("channels", [1, 2, LENGTH])
def test_channels_first_as_convolutions_of_lines_read(tmp_path, channels):
    net = ImageNet((1, channels, LENGTH))
    y = net.add("Conv", "x", net.weight(normal(5, channels, 3)))
    loaded = load(saved(tmp_path, net.proto(scores(net, y, 5))))
    assert loaded.model.contract.layout == "NCHW"
    assert loaded.model.contract.shape == (1, LENGTH, channels)
    assert not any("channels last" in note for note in loaded.notes)
    out, x = tmp_path / "out.onnx", normal(1, channels, LENGTH)
    dfq.export(loaded.model, out)
    np.testing.assert_allclose(run(out, x), run(tmp_path / "net.onnx", x), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, LENGTH), (5,)])
def test_integer_networks_read_what_their_sources_read(tmp_path, shape):
    """Lines channels first, and plain values: by every way of running them."""
    net, line = ImageNet(("N", *shape)), len(shape) == 2
    y = net.add("Conv", "x", net.weight(normal(6, 3, 3))) if line else "x"
    y = scores(net, y, 6) if line else net.add("Gemm", y, net.weight(normal(5, 4)))
    path = saved(tmp_path, net.proto(y))
    model = load(path, no_bn_fallback=True).model
    made = dfq.quantize(model, np.clip(normal(16, *shape, seed=2), -1, 1))
    found = made.verify()
    assert found.passed, found.failures
    made.save(tmp_path / "out", verification=found)
    assert dfq.verify(tmp_path / "out").passed
    x = np.clip(normal(2, *shape), -1, 1)
    wanted, rounded = (
        np.asarray(onnxruntime.InferenceSession(file).run(None, {"x": x})[0])
        for file in (path, tmp_path / "out" / "model.onnx")
    )
    assert rounded.shape == wanted.shape
    assert np.square(rounded - wanted).sum() < 0.01 * np.square(wanted).sum()
    np.testing.assert_allclose(run(tmp_path / "out" / "float.onnx", x), wanted, atol=1e-4)


def test_a_free_number_of_values_is_the_width_asked_for(tmp_path):
    net = ImageNet((1, "samples"))
    y = net.add("Unsqueeze", "x", net.weight(np.array([1])))
    path = saved(
        tmp_path, net.proto(scores(net, net.add("Conv", y, net.weight(normal(5, 1, 3))), 5))
    )
    with pytest.raises(UnsupportedModelError, match=r"free sizes.*`size=\(1, 224\)`"):
        load(path)
    assert load(path, size=(1, LENGTH)).model.contract.shape == (1, 1, LENGTH)


def test_a_free_length_is_the_width_asked_for(tmp_path):
    net = ImageNet((1, "steps", 1))
    path = saved(tmp_path, net.proto(line(net, 1)))
    with pytest.raises(UnsupportedModelError, match=r"free sizes.*`size=\(1, 224\)`"):
        load(path)
    assert load(path, size=(1, LENGTH)).model.contract.shape == (1, LENGTH, 1)
    half = classifier((1, 3, 64, "w"))
    with pytest.raises(UnsupportedModelError, match=r"free sizes.*`size=\(64, 224\)`"):
        load(saved(tmp_path, half))
    net = ImageNet((1, LENGTH, 1))
    path = saved(tmp_path, net.proto(line(net, 1)))
    with pytest.raises(UnsupportedModelError, match="exported for 12 pixels, not 30"):
        load(path, size=30)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["conv", "lstm"])
def test_modules_of_pytorch(kind):
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(1, 4, 3)
            self.lstm = torch.nn.LSTM(1, 4, batch_first=True)

        def forward(self, x):
            return self.conv(x.transpose(1, 2)).mean(2) if kind == "conv" else self.lstm(x)[0]

    net, x = Net().eval(), normal(1, LENGTH, 1)
    model = dfq.load(net, example=(LENGTH, 1))
    assert (model.contract.shape, model.contract.layout) == ((1, LENGTH, 1), "NHWC")
    with torch.inference_mode():
        wanted = net(torch.tensor(x)).numpy()
    np.testing.assert_allclose(dfq.predict(model, x[:, None]), wanted, atol=1e-5)
