"""What a command of `dfq` compiles when it runs for the first time, and what a second run spares.

Each run is a process of its own, the first with an empty cache of programs, the second with what
the first one kept. Seconds are of the processor, all threads together, so other work on the machine
does not count. Compiling includes reading programs that were kept.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import common
from common import Column, Row

COMMAND = ("quantize", "efficientnet_lite0")
COMPILED = "/jax/core/compile/backend_compile_duration"
READ = "/jax/compilation_cache/cache_retrieval_time_sec"
MOST = 25
"""Names of programs that are listed."""

TABLES = {
    "runs": (
        Column("run", "run"),
        Column("seconds", "seconds", ".1f"),
        Column("compiling", "of these compiling", ".1f"),
        Column("programs", "programs"),
        Column("read", "of these kept"),
    ),
    "stages": (Column("run", "run"), Column("at", "seconds so far", ".1f"), Column("stage", "")),
    "programs": (
        Column("run", "run"),
        Column("program", "program"),
        Column("count", "count"),
        Column("seconds", "seconds", ".2f"),
    ),
}


def main() -> None:
    """Runs the command twice, or is one of these runs."""
    parser = common.parser(__doc__)
    parser.add_argument("--runs", type=int, default=2, help="how often; the first is cold")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="arguments of dfq")
    args = parser.parse_args()
    if args.child is not None:
        watched(args.command, args.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        names = ["cold", *(f"with the cache {i}".rstrip(" 1") for i in range(1, args.runs))]
        rows = [row for name in names for row in ran(name, Path(folder), args.command)]
    common.finish(args, TABLES, rows)


def ran(name: str, folder: Path, command: list[str]) -> list[Row]:
    """The rows of one run."""
    told = folder / "told.json"
    line = command or [*COMMAND, "-o", str(folder / name)]
    environment = {**os.environ, "DFQ_CACHE": str(folder / "cache")}
    arguments = [sys.executable, __file__, "--child", str(told), *line]
    subprocess.run(arguments, env=environment, check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(told.read_text())
    programs = sorted(found["programs"].items(), key=lambda item: -item[1][1])
    facts = {key: found[key] for key in ("seconds", "read")}
    facts["programs"] = sum(count for count, _ in found["programs"].values())
    facts["compiling"] = sum(seconds for _, seconds in found["programs"].values())
    return [
        {"table": "runs", "run": name, **facts},
        *({"table": "stages", "run": name, "at": at, "stage": s} for at, s in found["stages"]),
        *(
            {"table": "programs", "run": name, "program": p, "count": count, "seconds": seconds}
            for p, (count, seconds) in programs[:MOST]
        ),
    ]


class Watch:
    """Counts programs as JAX tells of them, and when each stage began."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.programs: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        self.stages: list[tuple[float, str]] = []
        self.read, self.last = 0, 0.0

    def event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """A part of compiling ends; what the processor did since the part before is its work."""
        now = time.process_time()
        if event == READ:
            self.read += 1
            return
        if event == COMPILED:
            entry = self.programs[str(kwargs.get("fun_name", "?"))]
            entry[0] += 1
            entry[1] += now - self.last
        self.last = now


def watched(command: list[str], told: Path) -> None:
    """One run of `dfq` in this process, its facts written to a file."""
    import jax

    from dfq_jax.cli.app import main
    from dfq_jax.report.console import Terminal

    watch, say = Watch(), Terminal.stage

    def stage(self: Terminal, text: str) -> None:
        watch.stages.append((time.process_time(), text))
        say(self, text)

    Terminal.stage = stage
    jax.monitoring.register_event_duration_secs_listener(watch.event)
    sys.argv = ["dfq", *command]
    try:
        main()  # as a program of its own: callers in Python keep nothing
    finally:
        facts = {"programs": watch.programs, "stages": watch.stages, "read": watch.read}
        told.write_text(json.dumps({**facts, "seconds": time.process_time()}))


if __name__ == "__main__":
    main()
