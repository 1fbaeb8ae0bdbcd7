"""How image synthesis scales: host devices and processes measured, chips and pods by a model.

Weak scaling on D host devices, each number of them in a new process bound to as many cores, as far
as there are: `apart` makes D batches at a time, `together` one batch of D times the rows. The same
process then makes the same images on one device: `alone/this` is 1 if nothing is lost, and at most
the number of cores if one device leaves cores idle. The cost model counts operations and bytes of
a step, is held against XLA's count and this machine's clock, and is then applied to chips.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
from common import Column, Row
from scaling_model import CHIPS, Ceiling, Chip, Work
from scaling_rows import (
    CASES,
    MODEL_TABLES,
    Case,
    chip_row,
    cost_row,
    cpu_row,
    fixed_row,
    pod_rows,
    rate_rows,
)

HERE = Path(__file__).resolve().parent

TABLES = {
    "scaling": [
        Column("network", "network"),
        Column("mode", "mode"),
        Column("devices", "devices"),
        Column("cores", "cores"),
        Column("batch", "batch per device"),
        Column("step_ms", "ms a step", ".0f"),
        Column("images_per_s", "image steps/s", ".1f"),
        Column("busy", "cores busy", ".2f"),
        Column("alone_ms", "alone ms", ".0f"),
        Column("against_alone", "alone/this", ".2f"),
        Column("core_ms", "core ms an image step", ".2f"),
        Column("alone_core_ms", "alone core ms", ".2f"),
        Column("per_core", "of linear in cores", ".2f"),
        Column("difference", "largest difference", ".1g"),
    ],
    **MODEL_TABLES,
}


def main() -> None:
    """Measures what was asked for and applies the model."""
    parser = common.parser(__doc__)
    known = common.choices(CASES)
    parser.add_argument("--networks", type=known, default=("resnet20", "efficientnet_lite0"))
    parser.add_argument("--devices", type=common.names, default=("1", "2", "4", "8"))
    parser.add_argument("--model", type=known, default=tuple(CASES), help="networks to count")
    parser.add_argument("--batch", type=int, help="of a device, instead of the usual one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--chunk", type=int, default=4, help="steps between two visits")
    parser.add_argument("--rounds", type=int, default=1, help="turns; the fastest counts")
    parser.add_argument("--local", type=int, default=4, help="devices of each of two processes")
    parser.add_argument("--no-processes", action="store_true", help="leave those rows out")
    parser.add_argument("--chip", choices=[c.name for c in CHIPS], default="TPU v5e")
    parser.add_argument("--chip-batch", type=int, default=64, help="images of a chip")
    parser.add_argument("--recipe-steps", type=int, default=200, help="that an image takes")
    usual = Ceiling()
    parser.add_argument("--flops-ceiling", type=float, default=usual.flops, help="share of peak")
    parser.add_argument("--bytes-ceiling", type=float, default=usual.bandwidth, help="likewise")
    args = parser.parse_args()
    rows = [row for name in args.networks for row in measured_rows(name, args)]
    rows += list(modelled_rows(args)) if args.model else []
    common.finish(args, TABLES, rows)


def case_of(name: str, args: argparse.Namespace) -> Case:
    """What a network is measured at."""
    return CASES[name]._replace(batch=args.batch or CASES[name].batch)


def child(what: str, name: str, args: argparse.Namespace, **options: object) -> list[str]:
    """The command line of one measurement."""
    case = case_of(name, args)
    facts = {"network": name, "size": case.size, "batch": case.batch, "steps": args.steps}
    facts |= {"chunk": args.chunk} | options
    line = [sys.executable, str(HERE / "scaling_child.py"), what]
    return [*line, *(str(v) for k, value in facts.items() for v in (f"--{k}", value))]


def ran(line: Sequence[str]) -> dict[str, Any]:
    """What a measurement found."""
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured_rows(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Weak scaling of a network over devices, then over processes."""
    one: float | None = None
    for devices in map(int, args.devices):
        for mode in ("apart", "together") if devices > 1 else ("one device",):
            found = spread(name, mode, devices, args)
            one = found["images_per_s"] if devices == 1 else one
            found["per_core"] = found["images_per_s"] / (found["cores"] * one) if one else None
            yield told("scaling", found)
    if not args.no_processes:
        yield from process_rows(name, args)


def spread(name: str, mode: str, devices: int, args: argparse.Namespace) -> Row:
    """One mode on a number of devices."""
    cores = min(devices, common.machine()["cores"] or devices)
    options = {"devices": devices, "cores": cores}
    options |= {} if devices == 1 else {"mode": mode}
    turns = [ran(child("spread", name, args, **options)) for _ in range(args.rounds)]
    best = min(turns, key=lambda turn: turn["step_s"])
    step = best["step_s"]
    batch = case_of(name, args).batch
    row: Row = {"network": name, "mode": mode, "devices": devices, "cores": cores, "batch": batch}
    row |= {"step_ms": 1000 * step, "images_per_s": devices * batch / step, "busy": best["busy"]}
    row["core_ms"] = 1000 * min(turn["core_s"] for turn in turns)
    if devices > 1:
        alone = min(turn["single_s"] for turn in turns)
        row |= {"alone_ms": 1000 * alone, "against_alone": alone / step}
        row["alone_core_ms"] = 1000 * min(turn["single_core_s"] for turn in turns)
        row["difference"] = max(turn["difference"] for turn in turns)
    return row


def process_rows(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """One set of images made by one process and by two, started by hand and by jax.distributed."""
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / "one"
        alone = shares(name, 1, first, args)
        yield told("scaling", alone or {"network": name, "mode": "processes: failed"})
        for mode, port in (("processes", 0), ("jax.distributed", free_port())):
            folder = Path(scratch) / str(port)
            both = shares(name, 2, folder, args, like=first, port=port)
            if alone is None or both is None:
                yield told("scaling", {"network": name, "mode": f"{mode}: failed"})
                continue
            factor = both["images_per_s"] / alone["images_per_s"]
            extra = {"mode": mode, "alone_ms": factor * both["step_ms"], "against_alone": factor}
            yield told("scaling", both | extra)


def shares(
    name: str, processes: int, folder: Path, args: argparse.Namespace, **more: object
) -> Row | None:
    """A set made by some processes at the same time; first chunks, which compile, do not count.

    None if one of them failed; what it said is on stderr.
    """
    options = {"devices": args.local, "processes": processes, "rounds": 2, "folder": folder}
    lines = [
        child("share", name, args, process=process, **options, **more)
        for process in range(processes)
    ]
    started = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for line in lines]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        return None
    found = [json.loads(text.splitlines()[-1]) for text in said]
    chunks = sum(len(each["visits"]) - 1 for each in found)
    spent = max(max(f["visits"]) for f in found) - min(min(f["visits"]) for f in found)
    batch, chunk = case_of(name, args).batch, chunk_of(args)
    rate = chunks * chunk * args.local * batch / spent
    differences = [each["difference"] for each in found if "difference" in each]
    return {
        "network": name,
        "mode": "processes",
        "devices": f"{processes} x {args.local}",
        "cores": common.machine()["cores"],
        "batch": batch,
        "step_ms": 1000 * processes * args.local * batch / rate,
        "images_per_s": rate,
        "difference": max(differences, default=None),
    }


def chunk_of(args: argparse.Namespace) -> int:
    """Steps between two visits: the largest divisor of the steps that is no more than asked for."""
    return next(d for d in range(min(args.steps, args.chunk), 0, -1) if args.steps % d == 0)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def told(table: str, row: Row) -> Row:
    """A row of a table, after a line on stderr."""
    shown = ", ".join(f"{c.heading} {c.text(row)}" for c in TABLES[table])
    common.log(f"{table}: {shown}")
    return {"table": table, **row}


def modelled_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The cost model, held against this machine, and applied to chips."""
    own = ran(child("machine", args.model[0], args))
    here = Chip("this machine", own["flops"], own["flops"], own["bandwidth"], "measured")
    yield from (chip_row(chip) for chip in CHIPS)
    for name in args.model:
        found = ran(child("cost", name, args, devices=2))
        work = Work(**found["work"])
        yield told("scaling_model", {"network": name, **cost_row(name, work, found, args)})
        yield told("scaling_cpu", {"network": name, **cpu_row(work, found, here)})
        yield from rate_rows(name, work, args)
        yield from pod_rows(name, work, args)
        yield told("scaling_fixed", {"network": name, **fixed_row(work, found, own, args)})


if __name__ == "__main__":
    main()
