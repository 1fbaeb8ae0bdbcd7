"""`dfq synthesize`: devices, memory, precision, folders, several processes, and their locks."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dfq_jax
from dfq_jax.base.files import born
from dfq_jax.io.artifacts.images import load_images
from dfq_jax.synthesis.run.shards import load_shards


@pytest.fixture
def line(made):
    """A command that makes eight images in batches of two."""
    net = (made / "net.safetensors", "--arch", "small")
    return ("synthesize", *net, "-n", 8, "--batch", 2, "--steps", 2, "--method", "zeroq", "-o")


@pytest.fixture
def owner():
    """A process that lives."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def lock(folder, name, owner):
    """What `owned` writes for a process."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"host": socket.gethostname(), "pid": owner.pid, "since": "noon"}
    (folder / f"{name}.lock").write_text(json.dumps(about | {"born": born(owner.pid)}))


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ("i.npz --memory much", 2, "'much' is no amount of memory: give bytes with or without a"),
        ("i.npz --memory 1000", 5, "a batch of 2 images needs about"),
        ("i.npz --devices 9", 2, "asked for 9 devices, this process has 8 of platform cpu"),
        ("i.npz --devices 0", 2, "there must be one device at least, got 0"),
        ("i.npz --dtype float16", 2, "float16"),
        ("i.npz --process 0 --processes 2", 2, "several processes (--process, --processes) fill"),
        ("set --process 2 --processes 2", 2, "process 2 of 2: give 0..1"),
        ("none/set", 2, "give a .npz file in an existing folder, or for a set of many files"),
        ("i.png", 2, "give a .npz file in an existing folder"),
    ],
)
def test_senseless_requests(dfq, line, tmp_path, monkeypatch, more, code, message):
    monkeypatch.chdir(tmp_path)
    found = dfq(*line, *more.split())
    assert (found.code, found.out) == (code, "")
    assert message in found.err
    assert not any(p.suffix for p in tmp_path.iterdir() if not p.name.startswith("."))


def test_devices_and_memory_give_the_same_images(dfq, line, tmp_path):
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    plain = dfq(*line, one)
    told = re.search(r"\] a step takes about ([\d.]+) KiB, batches of 2\n", plain.err)
    assert told is not None
    less = f"{4 * float(told[1]) - 1}KiB"  # than four devices need
    assert re.search(r"\] compiled in [\d.]+ s\n", plain.err)
    assert re.fullmatch(
        r"8 images by zeroq in [\d.]+ s \([\d.]+ s compiling\): .*one\.npz\n", plain.out
    )
    found = dfq(*line, other, "--devices", 4, "--memory", less, "--json")
    assert re.search(r"\] a step takes about [\d.]+ KiB, batches of 2 in 2 parts\n", found.err)
    np.testing.assert_allclose(load_images(one).images, load_images(other).images, atol=1e-4)
    facts = [dict(load_images(path).provenance) for path in (one, other)]
    assert facts[1] == found.data["provenance"]
    for fact in facts:
        assert 0 < fact.pop("compile_seconds") < fact.pop("seconds")
        fact.pop("final_losses")
    assert facts[0] == facts[1]
    assert (facts[0]["dtype"], facts[0]["together"]) == ("float32", 1)


def test_precision_and_sharing_are_on_record(dfq, line, tmp_path):
    how = ("--dtype", "bfloat16", "--devices", 2, "--together", "--remat", "--json")
    facts = dfq(*line, tmp_path / "i.npz", *how).data["provenance"]
    assert (facts["dtype"], facts["together"]) == ("bfloat16", 2)


def test_a_run_of_another_precision_is_refused(dfq, line, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "i.npz"
    with monkeypatch.context() as patch:
        patch.setattr("dfq_jax.report.console.Terminal.step", stop)
        assert dfq(*line, out).code == 130
    refused = dfq(*line, out, "--dtype", "bfloat16")
    assert (refused.code, refused.out) == (2, "")
    assert "different run:\n  dtype: saved 'float32', now 'bfloat16'\n" in refused.err
    shared = dfq(*line, out, "--devices", 2, "--together")
    assert "different run:\n  together: saved 1, now 2\n" in shared.err
    assert dfq(*line, out, "--devices", 2, "--memory", "1GiB").code == 0  # what changes no bits


def test_a_folder_of_images(dfq, line, made, tmp_path):
    out, preview = tmp_path / "set", tmp_path / "grid.png"
    found = dfq(*line, out, "--preview", preview, "--json")
    assert found.data.items() >= {"images": str(out), "n": 8, "complete": True}.items()
    assert {p.name for p in tmp_path.iterdir()} == {"set", "grid.png"}
    file = tmp_path / "i.npz"
    assert dfq(*line, file).code == 0
    np.testing.assert_array_equal(load_images(out).images, load_images(file).images)
    assert "seconds" not in load_images(out).provenance
    net = (made / "net.safetensors", "--arch", "small")
    results = [tmp_path / "of_set", tmp_path / "of_file"]
    for result, images in zip(results, (out, file), strict=True):
        assert dfq("quantize", *net, "-o", result, "--images", images).code == 0
    first, second = ((result / "model.onnx").read_bytes() for result in results)
    assert first == second
    again = dfq(*line, out)
    assert again.code == 0
    assert again.out.startswith("8 images by zeroq in ")


def test_processes_fill_a_folder(dfq, line, tmp_path, monkeypatch):
    """In any order, told by options or by the environment."""
    out = tmp_path / "set"
    first = dfq(*line, out, "--process", 1, "--processes", 2)
    assert first.code == 0
    assert first.out.startswith("one share of 8 images by zeroq")
    assert "not finished: other processes have shards to make" in first.err
    half = dfq("quantize", *line[1:4], "-o", tmp_path / "out", "--images", out)
    assert (half.code, half.out) == (2, "")
    assert "has no manifest.json: it is not a finished set of images" in half.err
    monkeypatch.setenv("DFQ_PROCESS", "0")
    monkeypatch.setenv("DFQ_PROCESSES", "2")
    assert dfq(*line, out).out.startswith("8 images by zeroq")
    assert len(load_shards(out)) == 8
    assert not (tmp_path / ".set.run").exists()


@pytest.mark.parametrize("method", ["zeroq", "noise"])
@pytest.mark.parametrize(("output", "name"), [("i.npz", "run"), ("set", "process-0")])
def test_an_output_has_one_owner(dfq, line, tmp_path, owner, method, output, name):
    state = tmp_path / f".{output}.run"
    lock(state, name, owner)
    command = (*line[:-2], method, "-o", tmp_path / output)
    refused = dfq(*command)
    assert (refused.code, refused.out) == (2, "")
    assert f"is being written by process {owner.pid} on {socket.gethostname()} since" in refused.err
    assert not (tmp_path / output).exists()
    owner.kill()
    owner.wait()
    assert dfq(*command).code == 0
    assert not state.exists()


@pytest.mark.slow
def test_as_a_program(checkpoints, made, tmp_path):
    """A CPU that counts as eight devices, and programs that are there the next time."""
    assert checkpoints.__file__ is not None
    line = [sys.executable, checkpoints.__file__, "synthesize", made / "net.safetensors"]
    how = ("--arch", "small", "-n", 8, "--batch", 1, "--steps", 3, "--method", "zeroq")
    said, package = [], str(Path(dfq_jax.__file__).parents[1])
    speak = {"JAX_DEBUG_LOG_MODULES": "jax._src.compiler", "PYTHONPATH": package}
    for number in range(2):
        out = tmp_path / f"{number}.npz"
        ran = subprocess.run(
            [*map(str, (*line, *how, "--devices", 8, "--json", "-o", out))],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"DFQ_CACHE": str(tmp_path / "cache")} | speak,
        )
        said.append("compilation cache hit for 'jit_run_chunks'" in ran.stderr)
    assert any((tmp_path / "cache" / "xla").iterdir())
    assert said == [False, True]
    first, second = (load_images(tmp_path / f"{number}.npz").images for number in range(2))
    np.testing.assert_array_equal(first, second)
