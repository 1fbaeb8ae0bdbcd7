"""`.pt2` and ONNX files, and live modules, loaded the way a user does."""

import io
import warnings
from typing import Any

import numpy as np
import onnx
import pytest

import dfq_jax
from dfq_jax.cli.app import main
from dfq_jax.errors import (
    CheckpointError,
    SeveralInputsError,
    UnsupportedModelError,
    UnsupportedOpError,
    UsageError,
)
from dfq_jax.graph.ops import BatchNorm, Conv2d
from dfq_jax.io.frontends.graph_files import module_path
from dfq_jax.io.load import load

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


class Residual(torch.nn.Module):
    """Two convolutions with batch norms, a skip, pooling and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.BatchNorm2d(6)
        )
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(6, 6, 3, padding=1), torch.nn.BatchNorm2d(6)
        )
        self.relu = torch.nn.ReLU(inplace=True)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.relu(x + self.body(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    made = Residual().eval()
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.uniform_(-0.1, 0.1)
                part.running_var.uniform_(0.5, 1.5)
    return made


@pytest.fixture(scope="module")
def image():
    return torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))


def save_pt2(module, path, image):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (image,)), path)
    return path


KEPT = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}


def save_onnx(module, path, image, **options):
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (image,), buffer, dynamo=False, **(options or KEPT))
    path.write_bytes(buffer.getvalue())
    return path


def expected(module, image):
    with torch.no_grad():
        return module(image).numpy()


def predicted(model, image):
    return np.asarray(dfq_jax.predict(model, image.numpy().transpose(0, 2, 3, 1)))


def test_pt2_onnx_and_live_modules_are_one_network(module, image, tmp_path):
    one = image[:1]
    models = [
        dfq_jax.load(save_pt2(module, tmp_path / "net.pt2", one)),
        dfq_jax.load(save_onnx(module, tmp_path / "net.onnx", one)),
        dfq_jax.load(module, example=(3, 12, 10)),
        dfq_jax.load(torch.export.export(module, (one,))),
    ]
    for model in models:
        np.testing.assert_allclose(predicted(model, image), expected(module, image), atol=1e-6)
        assert model.contract.shape == (12, 10, 3)
        assert {n.name for n in model.graph.nodes if isinstance(n.op, Conv2d)} == {
            "stem.0",
            "body.0",
        }
        assert sum(isinstance(n.op, BatchNorm) for n in model.graph.nodes) == 2
    assert len({str(m.graph) for m in models[:1] + models[2:]}) == 1
    file = onnx.load(tmp_path / "net.onnx").graph
    ends = torch.export.export(module, (one,)).graph_signature
    assert models[0].names == models[2].names == models[3].names
    assert models[0].names == (ends.user_inputs[0], tuple(ends.user_outputs))
    assert models[1].names == (file.input[0].name, (file.output[0].name,))


def test_normalisation_is_assumed_until_it_is_stated(module, image, tmp_path):
    path = save_pt2(module, tmp_path / "net.pt2", image[:1])
    found = load(path)
    assert found.model.contract.assumed
    assert any("nothing says how images are normalised" in note for note in found.notes)
    stated = load(path, mean=[0.5], std=[0.25])
    assert (stated.model.contract.mean, stated.model.contract.std) == ((0.5,) * 3, (0.25,) * 3)
    assert not stated.model.contract.assumed
    assert not any("normalised" in note for note in stated.notes)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"mean": [0.5]}, "give mean and std together"),
        ({"mean": [0.5, 0.5], "std": [1.0]}, "each of the 3 channels; got 2 and 1"),
        ({"mean": [0.5], "std": [0.0]}, "positive std"),
    )
    for wrong, message in cases:
        with pytest.raises(UsageError, match=message):
            load(path, **wrong)


def test_folded_batch_norms_are_refused_until_accepted(module, image, tmp_path, capsys):
    path = save_onnx(module, tmp_path / "net.onnx", image[:1], do_constant_folding=True)
    with pytest.raises(
        UnsupportedModelError, match=r"(?s)torch\.export\.save.*`no_bn_fallback=True`"
    ) as no:
        load(path)
    assert "zeros(1, 3, 12, 10)" in str(no.value)
    model = load(path, no_bn_fallback=True).model
    np.testing.assert_allclose(predicted(model, image), expected(module, image), atol=1e-6)
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(path)])  # shows what is there all the same
    shown = capsys.readouterr()
    assert "no batch-norm statistics" in shown.out + shown.err
    assert "0 of 0 batch norms usable" in shown.out


def test_all_that_stands_in_the_way_is_told_at_once(module, image, tmp_path):
    """A size that is missing, and batch norms that are lost."""
    free = {"input_names": ["x"], "dynamic_axes": {"x": {2: "h", 3: "w"}}}
    path = save_onnx(module, tmp_path / "net.onnx", image[:1], do_constant_folding=True, **free)
    with pytest.raises(UnsupportedModelError, match=r"(?s)`size=`.*Besides, .*no batch norm"):
        load(path)
    with pytest.raises(UnsupportedModelError, match=r"(?s)say which to use with `size=`") as no:
        load(path, no_bn_fallback=True)
    assert "batch norm" not in str(no.value)


def test_several_inputs_are_told_before_what_a_better_file_would_mend(image, tmp_path):
    class Recurring(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x, state):
            return self.conv(x) + state

    state = torch.zeros(1, 4, *image.shape[2:])
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Recurring().eval(), (image[:1], state), path, dynamo=False)
    with pytest.raises(SeveralInputsError, match="2 inputs") as no:
        load(path)
    assert "batch norm" not in str(no.value)


def test_free_sizes_are_asked_for(image, tmp_path):
    module = torch.nn.Conv2d(3, 4, 3, bias=False).eval()
    axes = {"x": {0: "n", 2: "h", 3: "w"}}
    options = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
    path = save_onnx(module, tmp_path / "net.onnx", image[:1], **options)
    with pytest.raises(UnsupportedModelError, match="say which to use with `size=`"):
        load(path)
    model = load(path, size=(12, 10)).model
    found = predicted(model, image).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, expected(module, image), atol=1e-6)


def test_a_fixed_size_is_not_changed(module, image, tmp_path):
    path = save_pt2(module, tmp_path / "net.pt2", image[:1])
    with pytest.raises(UnsupportedModelError, match="exported for 12 x 10 pixels, not 16 x 16"):
        load(path, size=16)


def test_weights_that_are_no_numbers_are_named(image, tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()
    with torch.no_grad():
        module[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"net\.pt2.*NaN.*0\.kernel \(1 of 108\)"):
        load(save_pt2(module, tmp_path / "net.pt2", image[:1]))


def test_unknown_operators_are_listed_at_once(image, tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.special.i0(x) + torch.lgamma(torch.special.i0(x))

    with pytest.raises(UnsupportedOpError) as caught:
        load(save_pt2(Odd().eval(), tmp_path / "net.pt2", image[:1]))
    assert "aten.special_i0.default x2" in str(caught.value)
    assert "aten.lgamma.default x1" in str(caught.value)
    assert "ADDING_AN_OP" in str(caught.value)
    assert caught.value.exit_code == 3


def test_two_inputs_are_refused_by_name(image, tmp_path):
    class Two(torch.nn.Module):
        def forward(self, x, y):
            return x + y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Two(), (image, image)), tmp_path / "net.pt2")
    with pytest.raises(UnsupportedModelError, match=r"has 2 inputs \(x .*, y .*\)"):
        load(tmp_path / "net.pt2")


def test_statistics_of_an_untrained_network_are_noted(image, tmp_path):
    module = Residual().eval()
    notes = load(save_pt2(module, tmp_path / "net.pt2", image[:1])).notes
    assert any("2 batch norms hold mean 0 and variance 1" in note for note in notes)


def test_modules_take_no_architecture(module):
    with pytest.raises(UsageError, match="leave out arch and size"):
        dfq_jax.load(module, arch="resnet18")


def test_external_data_is_read_beside_the_file(module, image, tmp_path):
    path = save_onnx(module, tmp_path / "net.onnx", image[:1])
    onnx.save_model(
        onnx.load(path), path, save_as_external_data=True, location="weights", size_threshold=0
    )
    np.testing.assert_allclose(
        predicted(load(path).model, image), expected(module, image), atol=1e-6
    )
    (tmp_path / "weights").unlink()
    with pytest.raises(CheckpointError, match="weights"):
        load(path)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/layer1/layer1.0/relu/Relu", "layer1.0.relu"),
        ("/stem/Conv", "stem"),
        ("/Flatten", ""),
        ("Conv_0", ""),
        ("", ""),
        ("/a/b/b.1/c/Add_1", "a.b.b.1.c"),
    ],
)
def test_module_paths_of_exporters(name, path):
    assert module_path(name) == path
