"""Runs of `dfq synthesize` that are stopped: they resume, but only with their own settings."""

import importlib.metadata
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dfq_jax.io.artifacts.images import load_images

PROGRAM = Path(__file__).with_name("checkpoints.py")


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

    monkeypatch.setattr("dfq_jax.synthesis.run.engine.ready", stop)
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
        ({"method": "best"}, ["method: saved 'zeroq', now 'best'", "settings: start: saved "]),
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
    refused(begun(), f"versions: {package}: saved '{real(package)}', now '99.0'")
    monkeypatch.undo()
    assert begun().code == 0  # with its own settings it goes on


# runs that are stopped


@pytest.fixture(autouse=True)
def heeds_interrupts():
    """A shell's background job ignores SIGINT, and so would the programs it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    names = {p.name for p in child.folder.iterdir()}
    assert names == {"images.npz", "images.npz.toml"}


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
