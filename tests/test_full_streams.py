"""Commands whose stdout or stderr lies on a full disk."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dfq_jax.report.console import Log, Lossy

FULL = Path("/dev/full")


class Full(io.StringIO):
    def write(self, _):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise OSError(28, "No space left on device")


def test_lines_that_cannot_be_written_are_lost_and_the_work_goes_on():
    kept = io.StringIO()
    for file in (Lossy(kept), Lossy(Full())):
        stream: Any = file
        log = Log(file=stream)
        log.print("one")
        log.print("two")
    assert kept.getvalue() == "one\ntwo\n"
    assert not Lossy(kept).isatty()


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full, a disk that is always full")
@pytest.mark.parametrize(
    ("line", "streams", "code"),
    [
        ("inspect none.onnx", "2", 2),
        ("inspect --nonsense", "2", 2),
        ("quantize none.onnx -o out --json", "12", 2),
        ("--version", "2", 0),
        ("--version", "1", 5),
    ],
)
def test_the_exit_code_is_right_all_the_same(line, streams, code, tmp_path):
    with FULL.open("w") as full:
        to = lambda number: full if number in streams else subprocess.PIPE
        words = [sys.executable, "-m", "dfq_jax", *line.split()]
        ended = subprocess.run(words, stdout=to("1"), stderr=to("2"), cwd=tmp_path, text=True)
    assert ended.returncode == code
    assert "Traceback" not in (ended.stderr or "")
