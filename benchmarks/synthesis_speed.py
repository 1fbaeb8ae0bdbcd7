"""Gradient steps of image synthesis: the library against PyTorch, one process after the other.

Both minimise ZeroQ's objective over the pixels with Adam. `input only` is a PyTorch loop that
differentiates with respect to the images alone, in its better memory layout; `published` also
computes the gradients of the weights, as the released loops do. A ratio above 1 means that the
library is faster. `GFLOP/s` counts two for each multiply-accumulate of a forward pass and of the
gradient of the input, which takes as many.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import common
from common import Column, Row

HERE = Path(__file__).resolve().parent


class Case(NamedTuple):
    """A network with the batch and the size of images it is timed at."""

    batch: int
    size: int
    steps: int


CASES = {
    "resnet20": Case(128, 32, 10),
    "efficientnet_lite0": Case(16, 224, 5),
    "mobilenet_v2": Case(16, 224, 5),
    "resnet18": Case(16, 224, 5),
}

COLUMNS = [
    Column("network", "network"),
    Column("batch", "batch"),
    Column("dtype", "dtype"),
    Column("images_per_s", "image steps/s", ".1f"),
    Column("step_ms", "ms a step", ".0f"),
    Column("compile_s", "s to compile", ".1f"),
    Column("peak_mib", "peak MiB", ".0f"),
    Column("input_ms", "PyTorch input only ms", ".0f"),
    Column("input_layout", "its layout"),
    Column("published_ms", "PyTorch published ms", ".0f"),
    Column("torch_peak_mib", "PyTorch peak MiB", ".0f"),
    Column("ratio_input_only", "input only/this", ".2f"),
    Column("ratio_published_loop", "published/this", ".2f"),
    Column("gflops", "GFLOP/s", ".0f"),
]


def main() -> None:
    """Times the chosen networks."""
    parser = common.parser(__doc__)
    parser.add_argument("--networks", type=common.choices(CASES), default=tuple(CASES))
    parser.add_argument("--rounds", type=int, default=2, help="turns of every loop")
    parser.add_argument("--batch", type=int, help="instead of the usual one")
    parser.add_argument("--size", type=int, help="instead of the usual one")
    parser.add_argument("--steps", type=int, help="instead of the usual ones")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args()
    rows = []
    for name in args.networks:
        rows.append(row(name, args))
        common.logged(rows[-1], COLUMNS)
    common.finish(args, {"synthesis_speed": COLUMNS}, rows)


def row(name: str, args: argparse.Namespace) -> Row:
    """One network: every loop takes its turn, the fastest turn of each counts."""
    usual = CASES[name]
    case = Case(args.batch or usual.batch, args.size or usual.size, args.steps or usual.steps)
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(args.rounds):
        for contender, layout in (
            ("ours", "contiguous"),
            ("input", "contiguous"),
            ("input", "channels_last"),
            ("published", "contiguous"),
            ("published", "channels_last"),
        ):
            found = timed(name, contender, layout, case, args)
            before = best.get((contender, layout))
            if before is None or found["step_s"] < before["step_s"]:
                best[contender, layout] = found
    ours = best["ours", "contiguous"]
    inputs, input_layout = fastest(best, "input")
    published, _ = fastest(best, "published")
    return {
        "table": "synthesis_speed",
        "network": name,
        "batch": case.batch,
        "dtype": args.dtype,
        "images_per_s": case.batch / ours["step_s"],
        "step_ms": 1000 * ours["step_s"],
        "compile_s": ours["compile_s"],
        "peak_mib": ours["peak_mib"],
        "input_ms": 1000 * inputs["step_s"],
        "input_layout": input_layout,
        "published_ms": 1000 * published["step_s"],
        "torch_peak_mib": inputs["peak_mib"],
        "ratio_input_only": inputs["step_s"] / ours["step_s"],
        "ratio_published_loop": published["step_s"] / ours["step_s"],
        "gflops": ours["flops"] / ours["step_s"] / 1e9,
    }


def fastest(
    found: dict[tuple[str, str], dict[str, Any]], contender: str
) -> tuple[dict[str, Any], str]:
    """The better layout of a PyTorch loop."""
    layouts = {layout: v for (who, layout), v in found.items() if who == contender}
    best = min(layouts, key=lambda layout: layouts[layout]["step_s"])
    return layouts[best], best


def timed(
    name: str, contender: str, layout: str, case: Case, args: argparse.Namespace
) -> dict[str, Any]:
    """One turn of one loop in a process of its own."""
    line = [sys.executable, str(HERE / "synthesis_loops.py"), name, contender]
    line += ["--batch", str(case.batch), "--size", str(case.size), "--steps", str(case.steps)]
    line += ["--layout", layout, "--dtype", args.dtype, "--device", args.device]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    common.log(f"  {contender} {layout}: {1000 * found['step_s']:.0f} ms a step")
    return found


if __name__ == "__main__":
    main()
