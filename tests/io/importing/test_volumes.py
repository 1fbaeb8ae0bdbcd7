"""Convolution and pooling in three directions, from `.pt2` and ONNX, beside PyTorch."""

import io
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import dfq_jax as dfq
from dfq_jax.cli.doctor import of_folder
from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.io.load import load
from dfq_jax.io.onnx.export import float_onnx, serialize
from dfq_jax.io.runtime.session import open_session
from dfq_jax.recipes.diagnose import reference_of
from dfq_jax.report.console import Terminal
from dfq_jax.types import Values

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
pytestmark = [pytest.mark.torch, pytest.mark.onnx]

SHAPE = (4, 5, 7, 6)


class Layers(nn.Module):
    """Convolutions, each read by a pooling; all of it comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv3d(4, 6, (1, 3, 2), (1, 2, 1), (0, 1, 0))
        self.grouped = nn.Conv3d(4, 8, 3, 2, 1, groups=2, bias=False)
        self.spread = nn.Conv3d(4, 4, (2, 1, 2), dilation=(2, 1, 3), groups=4)
        self.same = nn.Conv3d(4, 4, (3, 2, 3), padding="same")

    def forward(self, x: Any) -> Any:
        a, b, c, d = self.plain(x), self.grouped(x), self.spread(x), self.same(x)
        return (
            F.max_pool3d(a, (2, 2, 3), (1, 2, 2), (1, 1, 0)),
            F.max_pool3d(d, 2, ceil_mode=True),
            F.avg_pool3d(c, (2, 3, 2), (2, 1, 1), (1, 0, 1)),
            F.avg_pool3d(d, (2, 2, 2), 2, 1, count_include_pad=False),
            F.adaptive_avg_pool3d(d, (5, 1, 2)),
            b.mean((2, 3, 4)),
        )


def model_from(path: Path, net: Any) -> Model:
    """The network from a file of that suffix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".pt2":
            buffer = io.BytesIO()
            torch.export.save(torch.export.export(net, (torch.zeros(1, *SHAPE),)), buffer)
            path.write_bytes(buffer.getvalue())
        else:
            free = {"x": {0: "n"}}
            given = {"input_names": ["x"], "dynamic_axes": free, "opset_version": 17}
            torch.onnx.export(net, (torch.zeros(1, *SHAPE),), path, dynamo=False, **given)
    return load(path).model


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_layers_compute_what_pytorch_does_and_so_do_their_files(tmp_path, suffix):
    torch.manual_seed(0)
    net = Layers().eval()
    model = model_from(tmp_path / f"net.{suffix}", net)
    assert model.inputs == (Values(SHAPE),)
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        wanted = [y.numpy() for y in net(x)]
    ours = evaluate(model, jax.numpy.asarray(x.numpy()))[0]
    file = open_session(serialize(float_onnx(model)), optimize=False)
    filed = file.run(None, {file.get_inputs()[0].name: x.numpy()})
    for mine, theirs, written in zip(ours, wanted, filed, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(written, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_said_of_images_is_refused_and_pixels_are_told(tmp_path):
    model_from(tmp_path / "net.onnx", nn.Conv3d(4, 2, 1, bias=False).eval())
    with pytest.raises(UsageError, match="reads volumes, no images: leave out `size=`"):
        load(tmp_path / "net.onnx", size=8)
    with pytest.raises(UsageError, match="as many numbers in mean as in std"):
        load(tmp_path / "net.onnx", mean=(0.5,), std=(0.2, 0.3))
    found = load(tmp_path / "net.onnx", mean=(0.5,), std=(0.25,))
    assert found.model.inputs == (Values(SHAPE, -2.0, 2.0),)
    assert not any("taken to have values" in note for note in found.notes)


def test_a_folder_of_volumes_holds_the_float_network_with_its_statistics(tmp_path):
    norm = nn.BatchNorm3d(3)
    norm.running_mean, norm.running_var = torch.randn(3), 1 + torch.rand(3)
    net = nn.Sequential(nn.Conv3d(4, 3, (2, 1, 1)), norm, nn.ReLU(), nn.Flatten())
    made = dfq.quantize(model_from(tmp_path / "net.pt2", net.eval()), n=8)
    made.save(tmp_path / "out")
    found = of_folder(tmp_path / "out", Terminal(quiet=True))
    assert found.quantized.model.inputs == (Values(SHAPE),)
    (read,) = (n for n in found.float_model.graph.nodes if isinstance(n.op, BatchNorm))
    np.testing.assert_allclose(found.float_model.params[read.name]["mean"], norm.running_mean)
    assert reference_of(found.float_model, found.quantized, found.probes).graph == (
        found.quantized.model.graph
    )


def test_windows_of_several_sizes_are_refused(tmp_path):
    net = nn.AdaptiveAvgPool3d((2, 1, 1)).eval()
    with pytest.raises(UnsupportedModelError, match="windows would differ in size"):
        model_from(tmp_path / "net.pt2", net)
