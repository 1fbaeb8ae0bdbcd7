"""Help, flags, wrong usage and exit codes of the command line, and `dfq` as a program."""

import errno
import json
import os
import pty
import re
import subprocess
import sys
from typing import get_args

import pytest
from plain_text import ESCAPE, plain

from dfq_jax.api import compress as compressing
from dfq_jax.api import quantize as quantizing
from dfq_jax.base.words import TaskName, TrainingName
from dfq_jax.cli import app as cli
from dfq_jax.cli import verbs as commands
from dfq_jax.cli.options import HEADINGS, told_default
from dfq_jax.recipes.presets import METHODS

VERBS = (
    *("inspect", "synthesize", "quantize", "train", "adapt", "distill"),
    *("evaluate", "verify", "bench"),
)
FLAGS = {
    "inspect": ("--arch", "--size", "--json"),
    "synthesize": (
        *("--output", "-o", "--n", "-n", "--method", "--size", "--steps", "--batch", "--devices"),
        *("--seed", "--preview", "--arch", "--json", *METHODS),
        *("--together", "--memory", "--dtype", "--remat", "--process", "--processes", "bfloat16"),
    ),
    "quantize": (
        *("--output", "-o", "--scheme", "--preset", "--layers", "--method", "--images", "--budget"),
        *("--seed", "--arch", "--size", "--force", "--json", "fast", "balanced", "best"),
        *("--n", "-n", "--steps", *METHODS),
        *("--store", "packed", "int8", "int4", "--task", *get_args(TaskName)),
        *("qdrop_8bit_ends", "zsq_all_low", "brecq_8bit_ends_second"),
        *("qdrop_8bit_ends_shortcuts", "brecq_8bit_ends_second_shortcuts"),
    ),
    "train": (
        *("--output", "-o", "--method", "--start", "--scheme", "--layers", "--rule", "--images"),
        *("-n", "--steps", "--batch", "--seed", "--arch", "--force", "--config", "--json"),
        *get_args(TrainingName),
    ),
    "adapt": (
        "--output",
        "-o",
        "--images",
        "--epochs",
        "--batch",
        "--scheme",
        "--config",
        "--json",
    ),
    "distill": ("--output", "-o", "--student", "--train", "--batch", "--scheme", "--json"),
    "evaluate": ("--data", "--limit", "--arch", "--size", "--json"),
    "verify": ("--json",),
    "bench": ("--runs", "--json"),
}


FIVE = "5 things are wrong:\n- scheme 'w9a8' is not"

# help and usage


def test_help_says_how_to_begin(dfq):
    found = plain(dfq("--help"))
    assert (found.code, found.err) == (0, "")
    assert "dfq quantize efficientnet_lite0 -o out/" in found.out
    assert all(verb in found.out for verb in VERBS)
    assert dfq().out == found.out
    assert max(map(len, found.out.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_names_every_flag(dfq, verb):
    found = plain(dfq(verb, "--help"))
    assert (found.code, found.err) == (0, "")
    words = set(re.findall(r"[\w-]+", found.out))
    assert set(FLAGS[verb]) <= words
    about = found.out.partition("╭")[0].splitlines()
    assert max(map(len, about)) <= 79, "a terminal of 80 columns breaks these lines again"


@pytest.mark.parametrize("verb", ["synthesize", "quantize", "train", "compress", "distill"])
def test_every_option_of_a_long_help_stands_under_a_heading(dfq, verb):
    found = plain(dfq(verb, "--help")).out
    headings = re.findall("─ (.+?) ─", found)
    assert headings == ["Arguments", *(h for h in HEADINGS if h in headings)]
    assert {"Result", "Network", "Images", "Run"} <= set(headings)


@pytest.mark.parametrize(
    ("default", "told"),
    [(None, None), (False, None), ((), None), (0, "0"), (0.0, "0.0"), ("w8a8", "w8a8")],
)
def test_defaults_that_leave_something_out_are_not_told(default, told):
    assert told_default(default) == told


def test_version(dfq):
    found = dfq("--version")
    assert (found.code, found.out) == (0, "0.1.0\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("squash net.pth", "squash"),
        ("inspect", "MODEL"),
        ("inspect net.pth --colour", "--colour"),
        ("synthesize net.pth", "--output"),
        ("synthesize net.pth -o i.npz --method magic", "magic"),
        ("synthesize net.pth -o i.npz -n many", "many"),
        ("quantize net.pth", "--output"),
        ("quantize net.pth -o out --preset slow", "slow"),
        ("quantize net.pth -o out --layers all", "all"),
        ("distill net.pth -o out", "--student"),
        ("adapt net.pth -o out", "--images"),
        ("adapt net.pth -o out --images . --method genie", "Unknown option: --method"),
        ("evaluate net.pth", "--data"),
        ("verify", "OUT"),
        ("bench out --runs few", "few"),
    ],
)
def test_wrong_usage_exits_2(dfq, line, message):
    found = plain(dfq(*line.split()))
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("quantize NET -o OUT --scheme w9a8", 2, "scheme 'w9a8' is not w{2..8}a{2..8}"),
        ("quantize NET -o OUT --budget 4.5", 2, "4.5"),
        ("quantize NET -o OUT --memory lots", 2, "'lots' is no amount of memory"),
        ("quantize NET -o OUT --reconstruction-steps 9", 2, "'nearest' takes no steps"),
        ("quantize NET -o NET", 2, "MODEL and output are both"),
        ("quantize NET -o OUT --images DIR/none.npz", 2, "no image set at"),
        ("quantize NET -o OUT --seed -1", 2, "a seed must be 0..4294967295, got -1."),
        ("quantize NET -o OUT --rule nowhere=8", 2, "nowhere"),
        ("quantize NONE -o OUT --scheme w9a8 --rule fc -n 0 --seed -1 --images DIR/none", 2, FIVE),
        ("train NONE -o OUT --scheme w9a8 --rule fc -n 0 --seed -1 --images DIR/none", 2, FIVE),
        ("compress NONE -o OUT --prune 200% --scheme w9a8", 2, "2 things are wrong:\n- "),
        ("adapt NONE -o OUT --epochs 0", 2, "2 things are wrong:\n- adapting is to pictures"),
        ("synthesize NET -o DIR/i.npz --seed 4294967296", 2, "got 4294967296."),
        ("synthesize NET -o DIR/i.png", 2, "give a .npz file in an existing folder"),
        ("synthesize NET -o DIR/none/i.npz", 2, "give a .npz file in an existing folder"),
        ("synthesize NET -o DIR/i.npz --preview DIR/none/i.png", 2, "its folder does not exist"),
        ("synthesize NET -o DIR/i.npz --devices 9", 2, "asked for 9 devices, this process has 8"),
        ("synthesize NET -o DIR/i.npz -n 0", 2, "n >= 1, got 0"),
        ("synthesize NONE -o DIR/i.npz --memory lots", 2, "'lots' is no amount of memory"),
        ("synthesize NET -o DIR/i.npz --steps 0", 2, "steps must be at least 1, got 0"),
        ("synthesize NET -o DIR/i.npz --batch -1", 2, "batch must be at least 1, got -1"),
        ("synthesize NET -o DIR/i.npz --size 0", 2, "an image size is at least 1 pixel"),
        ("evaluate NET --data DIR/none", 2, "the path does not exist"),
        ("evaluate DIR --data DIR", 2, "holds no artifact: cannot read manifest.json"),
        ("verify DIR", 2, "holds no artifact: cannot read manifest.json"),
        ("bench DIR", 2, "holds no artifact: cannot read manifest.json"),
    ],
)
def test_senseless_requests_are_refused_before_any_work(dfq, made, tmp_path, line, code, message):
    words = {"NET": [made / "net.safetensors", "--arch", "small"], "OUT": [tmp_path / "out"]}
    verb, first, *rest = line.split()
    given = [*words.get(first, [tmp_path])]
    for word in rest:
        given.append(given[0] if word == "NET" else tmp_path / "out" if word == "OUT" else word)
    found = plain(dfq(verb, *(str(g).replace("DIR", str(tmp_path)) for g in given)))
    assert (found.code, found.out) == (code, "")
    assert message in found.err
    assert list(tmp_path.iterdir()) == []


def test_rules_are_looked_at_before_images_are_made(dfq, made, monkeypatch, tmp_path):
    for module in (quantizing, compressing):
        monkeypatch.setattr(module, "seen_for", lambda *_: pytest.fail("images were made"))
    net = (made / "net.safetensors", "--arch", "small", "-o", tmp_path / "out")
    for verb in (("quantize", *net), ("compress", *net, "--prune", "20%")):
        found = plain(dfq(*verb, "--rule", "nowhere=8"))
        assert (found.code, "nowhere" in found.err) == (2, True)


# models that cannot be read


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("net.pt2", 2, "net.pt2 is no .pt2 archive"),
        ("net.onnx", 2, "net.onnx is damaged"),
        ("net.pth --arch resnet56", 3, "Did you mean resnet56_cifar"),
        ("none.pth --arch resnet18", 2, "there is no file"),
        ("resnet18", 2, "is an architecture without weights"),
        ("efficientnet_lite0 --arch resnet18", 2, "leave out arch='resnet18'"),
        ("net.pth --arch resnet20_cifar", 2, "no checkpoint"),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "synthesize", "quantize", "evaluate"])
def test_models_that_cannot_be_read(dfq, tmp_path, monkeypatch, verb, line, code, message):
    monkeypatch.chdir(tmp_path)
    for suffix in (".pt2", ".onnx", ".pth"):
        (tmp_path / f"net{suffix}").write_bytes(b"whatever")
    if verb == "evaluate" and line == "net.onnx":
        code, message = 2, "cannot read net.onnx as ONNX"
    more = {"synthesize": "-o i.npz", "quantize": "-o out", "evaluate": "--data ."}
    found = plain(dfq(verb, *line.split(), *more.get(verb, "").split()))
    assert (found.code, found.out) == (code, "")
    first, *rest = found.err.splitlines()
    assert first.endswith(f"s] reading {line.split()[0]}")
    assert rest[0].startswith("error: ")
    assert message in found.err
    assert not (tmp_path / "out").exists()


# what a run ends with


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 5, "error: out of memory; use fewer images or a smaller --batch."),
        (RuntimeError("RESOURCE_EXHAUSTED: 8 GB"), 5, "error: out of device memory; use a smaller"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 5, "No space left on device: 'x'"),
        (OSError(errno.EROFS, "Read-only file system", "x"), 2, "Read-only file system: 'x'"),
        (ImportError("install dfq-jax[data]"), 2, "error: install dfq-jax[data]"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(dfq, monkeypatch, error, code, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(commands, "inspect_model", fail)
    found = dfq("inspect", "net.pth")
    assert (found.code, found.out) == (code, "")
    assert message in found.err


def test_faults_of_the_program_itself_are_not_hidden(monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(commands, "inspect_model", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["inspect", "net.pth"])


# as a program


def program(*arguments, **how):
    """`dfq` as installed."""
    line = [sys.executable, "-m", "dfq_jax", *map(str, arguments)]
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=120, **how)


def test_console_script_and_module():
    script = os.path.join(os.path.dirname(sys.executable), "dfq")
    if not os.path.exists(script):
        pytest.skip("needs the installed console script")
    found = subprocess.run(
        [script, "--version"], check=True, capture_output=True, text=True, timeout=60
    )
    assert found.stdout == program("--version").stdout == "0.1.0\n"


def test_json_is_all_there_is_on_stdout(checkpoints, tmp_path):
    net = checkpoints.write(tmp_path / "n.safetensors", checkpoints.tensors("resnet20_cifar"))
    found = program("inspect", net, "--arch", "resnet20_cifar", "--json")
    assert found.returncode == 0
    assert json.loads(found.stdout)["architecture"] == "resnet20_cifar"
    assert ESCAPE not in found.stdout + found.stderr
    closed = subprocess.run(
        f"'{sys.executable}' -m dfq_jax inspect '{net}' --arch resnet20_cifar | head -n 1;"
        "echo ${PIPESTATUS[0]}",
        shell=True,
        executable="/bin/bash",
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert closed.stdout.splitlines()[-1] == "0"
    assert "Broken" not in closed.stderr
    assert "Traceback" not in closed.stderr


@pytest.mark.parametrize("colour", [True, False])
def test_colours_on_a_terminal_only_where_wanted(colour):
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color"} | ({} if colour else {"NO_COLOR": "1"})
    line = [sys.executable, "-m", "dfq_jax", "inspect", "no.pth"]
    with subprocess.Popen(line, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while process.poll() is None or not shown.endswith(b"\n"):
            try:
                shown += os.read(ours, 4096)
            except OSError:
                break
    os.close(ours)
    assert process.returncode == 2
    assert b"there is no file 'no.pth'" in shown
    assert (b"\x1b[1;31m" in shown) is colour
    assert (b"31m" in shown) is colour
