"""Ctrl-C again while a run ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AGAIN = """
import time
from dfq_jax.cli import guarded, heed_interrupts
def work():
    print("begun", flush=True)
    try:
        time.sleep(60)
    finally:
        print("ending", flush=True)
        time.sleep(60)
heed_interrupts()
raise SystemExit(guarded(work))
"""


@pytest.fixture(autouse=True)
def heeds_interrupts():
    """A shell's background job ignores SIGINT, and so would the programs it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def started(script, path):
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=path[0],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
    )


def interrupted(process, lines):
    """The exit code and stderr of a process that is interrupted once it says each of these."""
    for line in lines:
        assert process.stdout.readline() == f"{line}\n"
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_a_second_interrupt_ends_at_once():
    code, err = interrupted(started(AGAIN, (ROOT,)), ["begun", "ending"])
    assert (code, err) == (130, "")
