"""Steps of block reconstruction: the library against PyTorch, one process after the other.

Both run GENIE-M over the units of ResNet-20, batch 32, W2A2, 256 images in memory; the PyTorch loop
in its better memory layout. Each loop takes its turn, the fastest turn of each unit counts. A ratio
below 1 means that the library is faster; `whole` counts 2,000 steps of every unit and compilation.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
from common import Column, Row

HERE = Path(__file__).resolve().parent
WHOLE = 2000
LOOPS = (("ours", "contiguous"), ("pytorch", "contiguous"), ("pytorch", "channels_last"))
COLUMNS = [
    Column("network", "network"),
    Column("unit", "unit"),
    Column("batch", "batch"),
    Column("step_ms", "ms a step", ".2f"),
    Column("torch_ms", "PyTorch ms", ".2f"),
    Column("ratio", "this/PyTorch", ".2f"),
    Column("compile_s", "s to compile", ".1f"),
    Column("whole", "whole", ".2f"),
    Column("peak_mib", "peak MiB", ".0f"),
    Column("torch_peak_mib", "PyTorch peak MiB", ".0f"),
]


def main() -> None:
    """Times all loops."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="turns of every loop")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args()
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {loop: [] for loop in LOOPS}
    for _ in range(args.rounds):
        for loop in LOOPS:
            turns[loop].append(timed(*loop, args))
    common.finish(args, {"reconstruction_speed": COLUMNS}, rows(turns, args))


def timed(contender: str, layout: str, args: argparse.Namespace) -> dict[str, Any]:
    """One turn of one loop in a process of its own."""
    line = [sys.executable, str(HERE / "reconstruction_loops.py"), contender]
    line += ["--batch", str(args.batch), "--steps", str(args.steps)]
    line += ["--layout", layout, "--device", args.device]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    total = 1000 * sum(found["steps"].values())
    common.log(f"  {contender} {layout}: {total:.0f} ms for a step of every unit")
    return found


def rows(turns: dict[tuple[str, str], list[dict[str, Any]]], args: argparse.Namespace) -> list[Row]:
    """A row for each unit, and one for all."""
    ours = turns["ours", "contiguous"]
    theirs = [turn for (who, _), found in turns.items() if who == "pytorch" for turn in found]
    least = lambda found: [
        min(each) for each in zip(*(t["steps"].values() for t in found), strict=True)
    ]
    names, mine, other = list(theirs[0]["steps"]), least(ours), least(theirs)
    facts = {"table": "reconstruction_speed", "network": "resnet20", "batch": args.batch}
    made = [
        facts | {"unit": name, "step_ms": 1000 * a, "torch_ms": 1000 * b, "ratio": a / b}
        for name, a, b in zip(names, mine, other, strict=True)
    ]
    compile_s = min(turn["compile_s"] for turn in ours)
    total: Row = facts | {"unit": "all", "step_ms": 1000 * sum(mine), "torch_ms": 1000 * sum(other)}
    total |= {"ratio": sum(mine) / sum(other), "compile_s": compile_s}
    total |= {"whole": (WHOLE * sum(mine) + compile_s) / (WHOLE * sum(other))}
    total |= {"peak_mib": min(turn["peak_mib"] for turn in ours)}
    total |= {"torch_peak_mib": min(turn["peak_mib"] for turn in theirs)}
    return [*made, total]


if __name__ == "__main__":
    main()
