"""`dfq` with files that are not what they claim to be, and disks that refuse."""

import errno
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import onnx
import PIL.Image
import pytest

from dfq_jax.base.files import owned, sha256_of


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# files that are not what they claim to be


class Attack:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@pytest.mark.parametrize("verb", ["inspect", "synthesize", "quantize", "evaluate"])
@pytest.mark.parametrize("after_tensors", [False, True])
def test_pickles_that_run_code_are_refused(dfq, tmp_path, verb, after_tensors):
    canary, path = tmp_path / "canary", tmp_path / "net.pth"
    content = (
        {"state_dict": {"a": 1.0}, "more": Attack(canary)} if after_tensors else Attack(canary)
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("net/version", "3\n")
    rest = {"synthesize": ["-o", tmp_path / "i.npz"], "quantize": ["-o", tmp_path / "out"]}
    rest["evaluate"] = ["--data", tmp_path]
    found = dfq(verb, path, "--arch", "small", *rest.get(verb, []))
    assert (found.code, found.out) == (6, "")
    assert found.err.splitlines()[1].startswith("error: net.pth")
    assert "system" in found.err
    assert [p.name for p in tmp_path.iterdir()] == ["net.pth"]


def test_image_sets_that_run_code_or_are_damaged_are_refused(dfq, made, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "images.npz"
    good = (made / "images.npz").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    net = (made / "net.safetensors", "--arch", "small")
    for content in (pickle.dumps(Attack(canary)), good[: len(good) // 2], bytes(flipped), b""):
        path.write_bytes(content)
        found = dfq("quantize", *net, "-o", tmp_path / "out", "--images", path)
        assert (found.code, found.out) == (2, "")
        assert f"{path} is not an image set of dfq_jax" in found.err
        assert [p.name for p in tmp_path.iterdir()] == ["images.npz"]


@pytest.mark.parametrize("name", ["model.onnx", "float.onnx", "model.safetensors", "probe.npz"])
def test_damaged_output_folders_are_named(dfq, made, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(bytes(data))
    for line in (["verify", out], ["bench", out], ["evaluate", out, "--data", tmp_path]):
        found = dfq(*line)
        assert (found.code, found.out) == (2, "")
        assert f"artifact file {out / name} is not what was saved" in found.err


def rewrite(out, name, content):
    """Replaces a file together with the hash the manifest gives."""
    (out / name).write_bytes(content)
    manifest = json.loads((out / "manifest.json").read_text())
    facts = {"bytes": len(content), "sha256": sha256_of(out / name)}
    manifest["files"][name] = facts
    (out / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.onnx
def test_a_model_that_computes_something_else_does_not_verify(dfq, made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    model = onnx.load(out / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
            tensor.raw_data = bytes((-np.frombuffer(tensor.raw_data, np.int8)).tobytes())
    rewrite(out, "model.onnx", model.SerializeToString())
    found = dfq("verify", out)
    assert found.code == 4
    assert "NOT VERIFIED against ONNX Runtime" in found.out
    told = f"{out} does not compute what it was verified to compute: the file is not what was"
    assert told in found.err
    assert ".kernel.codes' differs in " in found.err


@pytest.mark.parametrize("content", [b"", b"no archive", "pixels"])
def test_probes_that_are_none_are_named(dfq, made, tmp_path, content):
    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    if isinstance(content, str):
        np.savez(out / "probe.npz", pixels=np.zeros((2, 9, 9, 3), np.uint8))
        content = (out / "probe.npz").read_bytes()
    rewrite(out, "probe.npz", content)
    found = dfq("verify", out)
    assert (found.code, found.out) == (2, "")
    assert f"{out / 'probe.npz'} does not hold the images to verify with" in found.err


# disks


def test_a_full_disk_leaves_the_old_output_as_it_was(run, made, monkeypatch, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    before, real = snapshot(tmp_path / "out"), os.fsync
    for after in (0, 2, 5):
        calls = []

        def full(handle, calls=calls, after=after):
            calls.append(handle)
            if len(calls) > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        monkeypatch.setattr(os, "fsync", full)
        found = run("quantize", None, "--seed", "1")
        monkeypatch.setattr(os, "fsync", real)
        assert (found.code, found.out) == (5, "")
        assert "No space left on device. Nothing was replaced; free some space" in found.err
        assert snapshot(tmp_path / "out") == before


def test_a_full_disk_leaves_the_old_images_as_they_were(dfq, made, monkeypatch, tmp_path):
    path = tmp_path / "i.npz"
    shutil.copy(made / "images.npz", path)
    before = path.read_bytes()
    line = ("synthesize", made / "net.safetensors", "--arch", "small", "-o", path, "-n", 2)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    found = dfq(*line, "--steps", 2, "--method", "zeroq")
    assert (found.code, found.out) == (5, "")
    assert "No space left on device" in found.err
    assert path.read_bytes() == before


@pytest.mark.parametrize("verb", ["synthesize", "quantize"])
def test_read_only_places_are_refused(dfq, made, monkeypatch, tmp_path, verb):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "here")

    net = (made / "net.safetensors", "--arch", "small")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "mkdir", refuse)
    output = tmp_path / ("i.npz" if verb == "synthesize" else "out")
    found = dfq(verb, *net, "-o", output)
    monkeypatch.undo()
    assert (found.code, found.out) == (2, "")
    assert "read-only" in found.err.lower()
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_respected(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "photo.jpg").write_bytes(b"mine")
    refused = run("quantize", None)
    assert (refused.code, refused.out) == (2, "")
    assert "photo.jpg. Choose another folder, or pass --force" in refused.err
    assert run("quantize", None, "--force").code == 0
    assert (out / "photo.jpg").read_bytes() == b"mine"
    assert run("quantize", None).code == 0
    (out / "report.html").write_bytes(b"mine")
    (out / "manifest.json").unlink()
    clash = run("quantize", None, "--force")
    assert clash.code == 2
    assert "files of others are never replaced" in clash.err
    assert (out / "report.html").read_bytes() == b"mine"


def test_a_second_process_is_refused_before_any_work(run, made, monkeypatch, tmp_path):
    def forbidden(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr("dfq_jax.cli.verbs.read_model", forbidden)
    for folder, name in ((".out.run", "output"), ("out", ".partial-save")):
        with owned(tmp_path / folder, name):
            found = run("quantize", None)
            assert found.code == 2
            assert f"is being written by process {os.getpid()} on" in found.err
            assert f"delete {tmp_path / folder / name}.lock" in found.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.safetensors", "out"]


def test_what_a_container_left_is_in_nobodys_way(run, tmp_path):
    """Process 1 is always there."""
    (tmp_path / "out" / ".partial-1-ab").mkdir(parents=True)
    assert run("quantize", None).code == 0
    assert not any(p.name.startswith(".partial") for p in (tmp_path / "out").iterdir())
    assert not (tmp_path / ".out.run").exists()


# files of others


def test_files_of_others_are_never_replaced_by_images(dfq, made, tmp_path):
    net, text = made / "net.safetensors", tmp_path / "thesis.npz"
    line = ("synthesize", net, "--arch", "small", "-n", 2, "--steps", 1, "--method", "zeroq")
    text.write_bytes(b"years of work")
    np.savez(tmp_path / "data.npz", images=np.zeros(3))
    (tmp_path / "i.npz.toml").write_text("mine = 1")
    (tmp_path / "link.npz").symlink_to(net)
    (tmp_path / "own.npz.toml").write_text("schema_version = 1\n[synthesize]\nn = 7\n")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for name in ("thesis.npz", "data.npz", "i.npz", "link.npz"):
        found = dfq(*line, "-o", tmp_path / name)
        assert (found.code, found.out) == (2, ""), name
    assert "link.npz: give them names apart" in found.err
    (tmp_path / "own.npz").touch()
    assert dfq(*line, "-o", tmp_path / "own.npz").code == 0
    assert dfq(*line, "-o", tmp_path / "own.npz", "--seed", 1).code == 0
    assert (
        before.items()
        <= {
            **{p.name: p.read_bytes() for p in tmp_path.iterdir()},
            "own.npz.toml": before["own.npz.toml"],
        }.items()
    )


def test_files_of_others_are_never_replaced_by_pictures(dfq, made, tmp_path):
    net, out = made / "net.safetensors", tmp_path / "i.npz"
    line = ("synthesize", net, "--arch", "small", "-n", 2, "--steps", 1, "--method", "zeroq")
    photo, new = tmp_path / "photo.png", tmp_path / "new.png"
    PIL.Image.new("RGB", (9, 9)).save(photo)
    before = photo.read_bytes()
    for preview in (net, out, photo, tmp_path, os.devnull):
        found = dfq(*line, "-o", out, "--preview", preview)
        assert (found.code, found.out) == (2, ""), preview
        chart = (
            dfq("doctor", net, "--arch", "small", "--chart", preview) if preview != out else found
        )
        assert (chart.code, chart.out) == (2, "")
    assert photo.read_bytes() == before
    assert net.read_bytes() == (made / "net.safetensors").read_bytes()
    for _ in range(2):
        assert dfq(*line, "-o", out, "--preview", new).code == 0


@pytest.mark.parametrize("output", ["i.npz", "set", "out"])
def test_folders_of_states_of_others_stay(dfq, made, tmp_path, output):
    state = tmp_path / f".{output}.run"
    state.mkdir()
    (state / "fingerprint.json").write_text("{}")
    (state / "diary.txt").write_text("mine")
    verb = "quantize" if output == "out" else "synthesize"
    found = dfq(verb, made / "net.safetensors", "--arch", "small", "-o", tmp_path / output)
    assert (found.code, found.out) == (2, "")
    assert f"{state} is where states are kept, but it holds diary.txt" in found.err
    assert (state / "diary.txt").read_text() == "mine"


def test_an_input_is_no_output(dfq, made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    before = snapshot(out)
    found = dfq("quantize", out / "float.onnx", "-o", out)
    assert (found.code, found.out) == (2, "")
    assert f"MODEL {out / 'float.onnx'} lies in output {out}, whose files are replaced" in found.err
    found = dfq("quantize", made / "net.safetensors", "-o", out, "--images", out)
    assert "images and output are both" in found.err
    assert snapshot(out) == before
