"""The first line of a program, what it takes until then, and Ctrl-C at any time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("jax", "numpy", "onnx", "scipy", "PIL")
AGAIN = """
import time
from dfq_jax.cli.app import guarded, heed_interrupts
def work():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("ending", flush=True)
        time.sleep(60)
heed_interrupts()
raise SystemExit(guarded(work))
"""
WORKING = """
import dfq_jax.__main__ as program, dfq_jax.cli.app as cli
def work():
    {}
cli.main = work
program.main()
"""
SLOW = (
    "import jax; from jax import lax; "
    "table = lambda: lax.broadcasted_iota('float32', (1, 36, 36, 1), 1); "
    "window = (1, 36, 36, 1); ones = (1, 1, 1, 1); "
    "total = lambda: lax.reduce_window(table(), 0.0, lax.add, window, ones, 'SAME'); "
    "print(jax.jit(total)().shape)"
)
"""A sum of constants that XLA computes while it compiles, for longer than it finds good."""


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
    try:
        for line in lines:
            assert process.stdout.readline() == f"{line}\n"
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    return process.returncode, err


def run(*arguments, **more):
    """A program of its own, from this package, as from a shell that never imported JAX."""
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=inherited | {"PYTHONPATH": str(ROOT)} | more,
    )


def test_a_second_interrupt_ends_at_once():
    code, err = interrupted(started(AGAIN, (ROOT,)), ["begun", "ending"])
    assert (code, err) == (130, "")


@pytest.mark.parametrize("line", [["--version"], ["--help"], ["quantize", "--help"], ["quantize"]])
def test_help_version_and_usage_import_nothing_heavy(line):
    script = (
        "import sys, dfq_jax.cli.app as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        f"finally: print('heavy:', sorted(set({HEAVY}) & set(sys.modules)))"
    )
    assert run("-c", script, *line).stdout.endswith("heavy: []\n")


def test_what_is_read_is_said_before_anything_heavy_is_imported():
    found = run("-X", "importtime", "-m", "dfq_jax", "inspect", "none.pth")
    assert found.returncode == 2
    lines = found.stderr.splitlines()
    first = next(i for i, line in enumerate(lines) if line.endswith("s] reading none.pth"))
    imported = {line.split("|")[-1].strip(): i for i, line in enumerate(lines) if "|" in line}
    assert set(HEAVY) <= set(imported)
    assert all(imported[name] > first for name in HEAVY)


def test_an_interrupt_while_modules_are_imported_ends_at_once():
    line = [sys.executable, "-m", "dfq_jax", "inspect", "none.pth"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        assert process.stderr.readline().endswith("reading none.pth\n")
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert (process.returncode, rest) == (130, "error: interrupted before anything was done.\n")


def test_names_of_the_library_are_there_when_asked_for():
    """Whatever was imported before."""
    script = (
        "import sys, dfq_jax.optim.progress, dfq_jax as dfq\n"
        "assert 'jax' not in sys.modules and set(dfq.__all__) <= set(dir(dfq))\n"
        "rest = [name for name in dfq.__all__ if not callable(getattr(dfq, name))]\n"
        "assert rest == list(dfq.NAMESPACES)\n"
        "assert dfq.quantize.__module__ == 'dfq_jax.api.quantize' and dfq.io.load.load\n"
        "from dfq_jax import *\n"
        "assert dfq.quantize is quantize\n"
        "print(hasattr(dfq, 'quantise'), hasattr(dfq, '__wrapped__'))"
    )
    found = run("-c", script)
    assert (found.stdout, found.stderr) == ("False False\n", "")


def test_completion_is_installed(tmp_path):
    found = run("-m", "dfq_jax", "--install-completion", HOME=str(tmp_path), SHELL="/bin/bash")
    assert found.returncode == 0, found.stderr
    written = [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert any("quantize" in text for text in written)


@pytest.mark.parametrize(("asked", "level"), [({}, "3"), ({"TF_CPP_MIN_LOG_LEVEL": "0"}, "0")])
def test_the_log_of_xla_is_for_those_who_ask_for_it(asked, level):
    script = WORKING.format("import os; print(os.environ['TF_CPP_MIN_LOG_LEVEL'])")
    assert run("-c", script, **asked).stdout == f"{level}\n"


@pytest.mark.slow
def test_alarms_of_xla_do_not_reach_the_terminal():
    found = run("-c", WORKING.format(SLOW))
    assert (found.stdout, found.stderr) == ("(1, 36, 36, 1)\n", "")
    assert (
        "slow_operation_alarm" in run("-c", WORKING.format(SLOW), TF_CPP_MIN_LOG_LEVEL="1").stderr
    )
