"""`dfq quantize` that is killed while it learns rounding, with files damaged in between."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("checkpoints.py")
SCHEME = ("--scheme", "w3a8")


class Quantizing:
    """A process of its own; its state lies beside the output folder."""

    def __init__(self, folder, made, *more):
        folder.mkdir(exist_ok=True)
        self.output, self.state = folder / "out", folder / ".out.run" / "reconstruction-0"
        self.line = ["quantize", str(made / "net.safetensors"), "--arch", "small"]
        self.line += ["--images", str(made / "images.npz"), "-o", str(self.output), *more]
        self.line += ["--reconstruction", "qdrop", "--reconstruction-steps", "400"]
        self.process = subprocess.Popen(
            f"exec {shlex.join([sys.executable, str(PROGRAM), *self.line])}",
            shell=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def units(self):
        """Files of the units that are done."""
        return sorted(self.state.glob("unit-*.npz"))

    def kill_after(self, units):
        """Kills it once so many units are done."""
        while self.process.poll() is None and len(self.units()) < units:
            time.sleep(0.002)
        self.process.send_signal(signal.SIGKILL)
        return self.end()

    def end(self):
        """The exit code, and what it said."""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


@pytest.mark.slow
@pytest.mark.onnx
def test_learned_rounding_survives_kills_and_damage(made, tmp_path):
    """Killed after one unit and after two, a unit's file cut in half: the file is the same."""
    whole = Quantizing(tmp_path / "whole", made, *SCHEME)
    code, _, err = whole.end()
    assert code in (0, 4), err
    assert not whole.state.exists()
    folder = tmp_path / "run"
    for units in (1, 2):
        code, _, err = Quantizing(folder, made, *SCHEME).kill_after(units)
        assert code == -signal.SIGKILL, err
    other = Quantizing(folder, made, "--scheme", "w2a8")
    found, _, err = other.end()
    assert found == 2
    assert "scheme: saved 'w3a8', now 'w2a8'" in err
    assert "Traceback" not in err
    first = other.units()[0]
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    again = Quantizing(folder, made, *SCHEME)
    assert again.end()[0] in (0, 4)
    assert (again.output / "model.onnx").read_bytes() == (whole.output / "model.onnx").read_bytes()
    assert not again.state.exists()
