"""What must never happen, whatever people feed to `dfq` and whenever they stop it."""

import errno
import importlib.metadata
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from dfq_jax.files import sha256_of
from dfq_jax.io import output_folder
from dfq_jax.io.artifacts import load_artifact
from dfq_jax.io.images import load_images
from dfq_jax.recipes.noise import NO_STATISTICS

PROGRAM = Path(__file__).with_name("checkpoints.py")


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def weights(checkpoints):
    return checkpoints.tensors()


@pytest.fixture
def run(dfq, checkpoints, made, tmp_path):
    """Runs a verb on a network with other weights; `quantize` writes to `tmp_path / "out"`."""

    def on(verb, values, *more):
        net = checkpoints.write(tmp_path / "net.safetensors", values)
        line = [verb, net, "--arch", "small", *more]
        if verb == "quantize":
            line += ["-o", tmp_path / "out", "--images", made / "images.npz"]
        return dfq(*line)

    return on


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
    assert found.err.startswith("error: net.pth")
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
    assert f"{out} does not compute what it was verified to compute." in found.err


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


# weights that no healthy training leaves behind


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_named(run, weights, tmp_path, bad):
    weights["conv2.weight"][3, 1, 0, 0] = bad
    weights["bn4.running_var"][0] = bad
    found = run("quantize", weights)
    assert (found.code, found.out) == (2, "")
    assert "NaN or infinite values in 2 tensors: conv2.weight (1 of 864), bn4" in found.err
    assert not (tmp_path / "out").exists()


def test_variances_that_are_none_are_excluded_and_counted(run, weights, tmp_path):
    weights["bn1.running_var"][:2] = 0
    weights["bn3.running_var"][:3] = -1
    found = run("inspect", weights)
    assert found.code == 0
    assert "4 of 4 batch norms usable for synthesis" in found.out
    assert "bn1: 2 of 8 channels excluded (variance not positive)" in found.out
    assert "bn3: 3 of 8 channels excluded (variance not positive)" in found.out
    assert "negative running variance raised to 0: bn3 (3 channels)" in found.err
    out = tmp_path / "i.npz"
    made = run("synthesize", weights, "-o", out, "-n", 2, "--steps", 2, "--method", "zeroq")
    assert made.code == 0
    assert load_images(out).provenance["excluded"] == [
        "bn1: 2 of 8 channels excluded (variance not positive)",
        "bn3: 3 of 8 channels excluded (variance not positive)",
    ]
    assert np.isfinite(np.asarray(load_images(out).images)).all()
    assert run("quantize", weights).code in (0, 4)
    assert load_artifact(tmp_path / "out").manifest["files"]


def test_networks_never_trained_get_noise_and_less_confidence(run, weights, tmp_path):
    for name in weights:
        if "running" in name:
            weights[name][...] = float(name.endswith("var"))
    found = run("inspect", weights)
    assert found.code == 0
    assert "0 of 4 batch norms usable for synthesis" in found.out
    assert NO_STATISTICS in found.out
    assert "bn1, bn2, bn3, bn4" in found.err
    made = run("synthesize", weights, "-o", tmp_path / "i.npz", "-n", 4)
    assert made.code == 0
    assert "4 images by noise" in made.out
    assert NO_STATISTICS in made.err
    assert load_images(tmp_path / "i.npz").provenance["method"] == "noise"
    (tmp_path / "i.npz").unlink()
    assert run("quantize", weights).code == 0


@pytest.mark.parametrize("case", ["dead channel", "large bias", "all dead"])
def test_extreme_weights_give_finite_scales_and_verify(run, weights, tmp_path, case):
    if case == "dead channel":
        weights["conv1.weight"][2] = 0
        weights["bn1.running_mean"][2] = weights["bn1.running_var"][2] = 0
    elif case == "large bias":
        weights["fc.weight"][1] *= 1e-9
        weights["fc.bias"][1] = 50
    else:
        weights["project.weight"][...] = 0
    found = run("quantize", weights)
    assert found.code == 0, found.err
    assert "\nverified against ONNX Runtime" in found.out
    for site, affine in load_artifact(tmp_path / "out").quantized.qparams.items():
        scale = np.asarray(affine.scale)
        assert np.isfinite(scale).all(), site
        assert (scale > 0).all(), site


def test_numbers_beyond_float32_end_as_a_failed_model(run, weights, tmp_path):
    weights["bn2.weight"] *= 1e30
    weights["conv2.weight"] *= 1e30
    found = run("quantize", weights)
    assert found.code == 4
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert manifest["report"]["finite"] is False


def test_one_channel_and_thirty_two_pixels(dfq, checkpoints, tmp_path):
    net, images = tmp_path / "net.safetensors", tmp_path / "i.npz"
    checkpoints.write(net, checkpoints.tensors(size=32, channels=1, classes=3))
    model = (net, "--arch", "small", "--size", 32)
    short = ("-n", 4, "--steps", 2, "--method", "zeroq", "--preview", tmp_path / "grid.png")
    found = dfq("synthesize", *model, "-o", images, *short)
    assert found.code == 0
    assert "mean 0.5, std 0.5, for 1 channels" in found.err
    low = ("--scheme", "w4a8", "--layers", "brecq_8bit_ends_second")
    done = dfq("quantize", *model, "-o", tmp_path / "out", "--images", images, *low)
    assert done.code in (0, 4)
    rows = {line.split()[0]: line.split()[2] for line in done.out.splitlines()[1:6]}
    expected = ("8/8", "4/8", "4/8", "4/8", "8/8")
    assert rows == dict(
        zip(("conv1", "depthwise", "project", "conv2", "fc"), expected, strict=True)
    )
    manifest = load_artifact(tmp_path / "out").manifest
    assert (manifest["scheme"], manifest["layers"]) == ("w4a8", "brecq_8bit_ends_second")
    assert "input 32x32 1 channels, (pixel/255 - (0.5)) / (0.5) (assumed" in done.out
    assert "32 x 32, 1 channels" in (tmp_path / "out" / "report.html").read_text()
    other = dfq("quantize", net, "--arch", "small", "-o", tmp_path / "no", "--images", images)
    assert (other.code, other.out) == (2, "")
    assert "made for height 32, the network reads 8" in other.err


# results that are no success


def test_a_collapsed_network_is_kept_as_failed(run, monkeypatch, tmp_path):
    assert run("quantize", None).code == 0
    monkeypatch.setattr("dfq_jax.report.analyze.COLLAPSED", 1.1)
    found, out = run("quantize", None), tmp_path / "out"
    assert found.code == 4
    assert found.out.splitlines()[-1] == f"FAILED, kept: {out / 'model.failed.onnx'}"
    assert "agrees with the float one on only" in found.err
    assert "Use more bits (--scheme), --preset balanced" in found.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["status"], manifest["report"]["passed"]) == ("failed", False)
    assert not (out / "model.onnx").exists()
    page = (out / "report.html").read_text()
    assert "FAILED: the integer network agrees" in page
    again = run("quantize", None, "--json")
    assert again.code == 4
    data = json.loads(again.out)
    assert (data["status"], data["model"]) == ("failed", str(out / "model.failed.onnx"))


# image synthesis that cannot go well


def test_divergence_at_every_rate_ends_with_4(run, weights, tmp_path):
    """Numbers beyond float32 at the first step already."""
    weights["bn2.weight"] *= 1e30
    weights["conv2.weight"] *= 1e30
    how = ("-n", 2, "--steps", 12, "--method", "zeroq")
    found = run("synthesize", weights, "-o", tmp_path / "i.npz", *how)
    assert (found.code, found.out) == (4, "")
    assert "error: zeroq: the loss became NaN or infinite at step 0 in each of 4" in found.err
    assert "Check the weights with `dfq inspect`, or use fewer --steps" in found.err
    assert not (tmp_path / "i.npz").exists()


def test_images_too_large_for_the_machine_end_with_5(run, tmp_path):
    found = run("synthesize", None, "-o", tmp_path / "i.npz", "--size", 100_000, "-n", 64)
    assert (found.code, found.out) == (5, "")
    assert "best: 64 images of 100000x100000 pixels at a time need at least 34.9 TiB" in found.err
    assert not (tmp_path / "i.npz").exists()


@pytest.fixture
def begun(dfq, made, monkeypatch, tmp_path):
    """`dfq synthesize` with other options, where a run was stopped before its first step."""
    usual = {"-n": 4, "--batch": 2, "--steps": 5, "--method": "zeroq", "--seed": 0}

    def on(net=made / "net.safetensors", **changes):
        options = usual | {("-n" if k == "n" else f"--{k}"): v for k, v in changes.items()}
        line = [part for pair in options.items() for part in pair]
        return dfq("synthesize", net, "--arch", "small", "-o", tmp_path / "i.npz", *line)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dfq_jax.synthesis.run.ready", stop)
    assert on().code == 130
    monkeypatch.undo()
    return on


def refused(found, *lines):
    """It is, and every one of these fields is named; nothing is written."""
    assert (found.code, found.out) == (2, "")
    assert ".i.npz.run holds the state of a different run:" in found.err
    for line in lines:
        assert f"\n  {line}" in found.err
    assert "Finish that run with its own settings, or delete the folder" in found.err


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"steps": 6}, ["steps: saved 5, now 6"]),
        ({"batch": 3}, ["batch: saved 2, now 3"]),
        ({"seed": 1}, ["seed: saved 0, now 1"]),
        ({"n": 6}, ["n: saved 4, now 6"]),
        ({"method": "best"}, ["method: saved 'zeroq', now 'best'", "settings: saved {"]),
        ({"size": 12}, ["size: saved [8, 8, 3], now [12, 12, 3]"]),
    ],
    ids=lambda v: next(iter(v)),
)
def test_a_run_begun_with_other_settings_is_refused(begun, changes, lines):
    refused(begun(**changes), *lines)


def test_a_run_begun_with_other_weights_is_refused(begun, checkpoints, weights, tmp_path):
    weights["conv2.weight"][0, 0, 0, 0] += 1e-3
    net = checkpoints.write(tmp_path / "other.safetensors", weights)
    refused(begun(net), "weights_sha256: saved '")


@pytest.mark.parametrize("package", ["jax", "dfq-jax"])
def test_a_run_begun_with_another_version_is_refused(begun, monkeypatch, package):
    real = importlib.metadata.version
    newer = lambda name: "99.0" if name == package else real(name)
    monkeypatch.setattr(importlib.metadata, "version", newer)
    refused(begun(), "versions: saved {")
    monkeypatch.undo()
    assert begun().code == 0  # with its own settings it goes on


# disks


def test_a_full_disk_leaves_the_old_output_as_it_was(run, monkeypatch, tmp_path):
    assert run("quantize", None).code == 0
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
    path.write_bytes(b"old")
    line = ("synthesize", made / "net.safetensors", "--arch", "small", "-o", path, "-n", 2)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    found = dfq(*line, "--steps", 2, "--method", "zeroq")
    assert (found.code, found.out) == (5, "")
    assert "No space left on device" in found.err
    assert path.read_bytes() == b"old"


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


def test_a_second_process_waits_its_turn(run, monkeypatch, tmp_path):
    (tmp_path / "out" / ".partial-999999999-ab").mkdir(parents=True)
    monkeypatch.setattr(output_folder, "is_running", lambda _: True)
    found = run("quantize", None)
    assert found.code == 2
    assert "process 999999999 is writing to" in found.err


# runs that are stopped


class Child:
    """`dfq synthesize` as a process of its own, in a folder of its own."""

    def __init__(self, folder, net, before=""):
        folder.mkdir(exist_ok=True)
        self.folder, self.output = folder, folder / "images.npz"
        self.state = folder / ".images.npz.run"
        short = ("-n", "6", "--batch", "2", "--steps", "400", "--method", "zeroq")
        self.line = ["synthesize", str(net), "--arch", "small", *short, "-o", str(self.output)]
        self.process = subprocess.Popen(
            f"{before}exec {shlex.join([sys.executable, str(PROGRAM), *self.line])}",
            shell=True,
            executable="/bin/bash",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stop(self, number, when):
        """Sends a signal once it has begun and `when()` holds; see `end`."""
        assert self.process.stderr is not None
        first = self.process.stderr.readline()
        while self.process.poll() is None and not when():
            time.sleep(0.002)
        self.process.send_signal(number)
        code, out, err = self.end()
        return code, out, first + err

    def end(self):
        """The exit code, and what stdout and stderr say."""
        out, err = self.process.communicate(timeout=180)
        return self.process.returncode, out, err

    def begun(self, batches=1):
        """Whether so many batches are done and the next one is on its way."""
        return len(list(self.state.glob("batch_*.npz"))) >= batches


def pixels(path):
    images = load_images(path)
    facts = {k: v for k, v in images.provenance.items() if "seconds" not in k}
    return np.asarray(images.images).tobytes(), facts


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """What a run gives that nobody stopped."""
    child = Child(tmp_path_factory.mktemp("whole"), made / "net.safetensors")
    code, _, err = child.end()
    assert code == 0, err
    assert not child.state.exists()
    return pixels(child.output)


def ends(child, whole):
    """The run gets to its end, with the images of an uninterrupted one and nothing else."""
    code, _, err = child.end()
    assert code == 0, err
    assert pixels(child.output) == whole
    names = [p.name for p in child.folder.iterdir() if not p.name.startswith(".tmp-")]
    assert names == ["images.npz"]


def test_a_run_stopped_in_every_way_says_so_and_resumes(made, whole, dfq, tmp_path):
    """A full disk, Ctrl-C and a kill, each in turn; then with other settings; then to the end."""
    folder, net = tmp_path / "a run", made / "net.safetensors"
    full = Child(folder, net, before="ulimit -S -f 1; ")
    code, out, err = full.end()
    assert (code, out) == (5, ""), err
    assert "File too large" in err
    assert "Traceback" not in err
    interrupted = Child(folder, net)
    code, out, err = interrupted.stop(signal.SIGINT, interrupted.begun)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in err
    assert interrupted.begun()
    killed = Child(folder, net)
    code, _, _ = killed.stop(signal.SIGKILL, lambda: killed.begun(2))
    assert code == -signal.SIGKILL
    assert not killed.output.exists()
    other = dfq(*killed.line, "--seed", "1")
    assert (other.code, other.out) == (2, "")
    assert "holds the state of a different run:\n  seed: saved 0, now 1\n" in other.err
    ends(Child(folder, net), whole)


def waited(seconds):
    """Whether so much time has passed since the first question."""
    asked = []

    def enough():
        asked.append(time.monotonic())
        return asked[-1] - asked[0] >= seconds

    return enough


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_runs_stopped_anywhere_resume(made, whole, tmp_path, number):
    """Stopped again and again, a little later every time, until a run gets to its end."""
    rng, folder = np.random.default_rng(number), tmp_path / "run"
    for attempt in range(40):
        child = Child(folder, made / "net.safetensors")
        wait = 0.3 * attempt + rng.uniform(0, 0.6)
        code, _, err = child.stop(number, waited(wait))
        assert code in (0, 130, -number), err
        if child.output.exists():
            assert pixels(child.output) == whole
        if code == 0:
            break
    else:
        pytest.fail("no run ended")
    ends(Child(folder, made / "net.safetensors"), whole)
