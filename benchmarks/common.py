"""What all benchmark scripts share: arguments, facts about the machine, timing, output."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
BUILD = ROOT / "build" / "bench"
README = ROOT / "README.md"
DASH = "\u2013"
PACKAGES = ("dfq-jax", "jax", "numpy", "onnx", "onnxruntime", "torch")
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")

Row = dict[str, Any]


class Column(NamedTuple):
    """One column of a table: the key in a row, its heading, how a value is written.

    `form` is a format specification; with a trailing `x100`, of a hundred times the value.
    """

    key: str
    heading: str
    form: str = ""

    def text(self, row: Mapping[str, Any]) -> str:
        """The cell of a row; a dash where there is no value."""
        value = row.get(self.key)
        if value is None or value == "":
            return DASH
        if self.form.endswith("x100"):
            return format(100 * value, self.form.removesuffix("x100"))
        return format(value, self.form)


Tables = Mapping[str, Sequence[Column]]
"""{name of a table: its columns}. A row says which it belongs to under the key `table`."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments every script takes."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument(
        "--shared", type=Path, default=SHARED, help="development data (default: ../shared)"
    )
    return made


def names(text: str) -> tuple[str, ...]:
    """The items of a comma-separated argument."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def choices(allowed: Sequence[str] | Mapping[str, Any]) -> Callable[[str], tuple[str, ...]]:
    """An argument type: comma-separated items, each of them allowed."""

    def read(text: str) -> tuple[str, ...]:
        if wrong := [name for name in names(text) if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(allowed)}")
        return names(text)

    return read


def absent(shared: Path, *needed: str) -> str | None:
    """A sentence naming the first of these files that the data folder lacks; None if it has all."""
    for name in needed:
        if not (shared / name).exists():
            return f"needs {name} in the data folder (--shared PATH), which is absent"
    return None


def log(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def logged(row: Row, columns: Sequence[Column]) -> Row:
    """A row, after a line of it on stderr."""
    log(", ".join(f"{c.heading} {c.text(row)}" for c in columns))
    return row


def machine() -> Row:
    """What the numbers depend on, without anything that identifies the machine."""
    cpu = read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    flags = re.search(r"^(?:flags|features)\s*:\s*(.+)$", cpu, re.MULTILINE | re.IGNORECASE)
    found = set(flags[1].split()) if flags else set()
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", read("/proc/meminfo"), re.MULTILINE)
    return {
        "cpu": model[1].strip() if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "instructions": [name for name in INSTRUCTIONS if name in found],
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "os": platform.system(),
    }


def read(path: str) -> str:
    """The text of a system file; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """Versions of Python and of what does the work."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str:
    """The commit that is measured, with a `+` if files differ from it; empty outside a checkout."""
    try:
        found = git("rev-parse", "--short", "HEAD")
        return found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def git(*arguments: str) -> str:
    """What git says of this repository."""
    line = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


def command() -> str:
    """How this script was called, without machine-specific paths."""
    script = Path(sys.argv[0]).name
    shown: list[str] = []
    skip = False
    for argument in sys.argv[1:]:
        if not skip and argument != "--json" and not argument.startswith("--shared"):
            shown.append(argument)
        skip = argument == "--shared"
    return " ".join(["python", f"benchmarks/{script}", *shown])


def finish(
    args: argparse.Namespace, tables: Tables, rows: Sequence[Row], reason: str | None = None
) -> None:
    """Prints the result of a script.

    Args:
      args: what `parser` parsed.
      tables: columns of every table.
      rows: one dictionary a row.
      reason: why rows are missing, for people.
    """
    if args.json:
        facts = {
            "rows": list(rows),
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "tables": {name: [list(column) for column in cs] for name, cs in tables.items()},
            "command": command(),
            "date": datetime.date.today().isoformat(),
            "reason": reason,
        }
        print(json.dumps(facts, allow_nan=False))
        return
    for name, columns in tables.items():
        own = [row for row in rows if row["table"] == name]
        cells = [[c.heading for c in columns], *([c.text(row) for c in columns] for row in own)]
        print(f"{name}\n" + "\n".join(aligned(cells)) + "\n")
    if reason:
        print(f"incomplete: {reason}")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns of equal width, the first to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, *, block: int = 1, warmup: int = 1
) -> dict[str, float]:
    """Median milliseconds of each function, all taking turns so that disturbances hit all.

    Args:
      runs: {name: function}.
      rounds: how many turns each has.
      block: timed calls a turn.
      warmup: untimed calls at the start of a turn.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name] += turn(run, block, warmup)
    return {name: statistics.median(spent) for name, spent in times.items()}


def turn(run: Callable[[], object], block: int = 1, warmup: int = 1) -> list[float]:
    """Milliseconds of `block` calls, after `warmup` untimed ones."""
    for _ in range(warmup):
        run()
    spent = []
    for _ in range(block):
        start = time.perf_counter()
        run()
        spent.append(1000 * (time.perf_counter() - start))
    return spent
