"""Feeds damaged and hostile files to every reader: no crash, no hang, and only our own errors.

A mutated file is one of a few small healthy ones after one to four changes, most of them along the
structure of its format; tests/io/mutations.py makes it from its number. Graphs are also imported.
Every reader runs in a process of its own that may take 2 GiB more than it has.

    slowest s        processor seconds of the slowest file
    peak MiB         most that the process grew during one file
    other failures   exceptions that are not this package's, files over 2 s, crashes, hangs
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import common
from common import Column, Row

READERS = ("pth", "safetensors", "pt2", "onnx")
TESTS = common.ROOT / "tests" / "io"
STEP = 500
MOST_WAIT = 30.0  # seconds on one file before its process is ended
MOST_LISTED = 20
STARTING = b"\xff" * 8  # where the number of the current file will be
TABLES = {
    "fuzz_readers": (
        Column("reader", "reader"),
        Column("count", "mutated files", ","),
        Column("accepted", "accepted", ","),
        Column("refused", "refused", ","),
        Column("slowest", "slowest s", ".3f"),
        Column("peak_mib", "peak MiB", ".1f"),
        Column("failed", "other failures", ","),
    ),
}


def main() -> None:
    """Fuzzes the chosen readers."""
    parser = common.parser(__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="mutated files for each reader")
    parser.add_argument("--readers", type=common.choices(READERS), default=READERS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for reader in args.readers:
        rows.append(row(reader, args.count, args.seed))
        common.logged(rows[-1], TABLES["fuzz_readers"])
        for failure in rows[-1]["failures"]:
            common.log(f"  file {failure['number']}: {failure['kind']}: {failure['text']}")
    common.finish(args, TABLES, rows)


def row(reader: str, count: int, seed: int) -> Row:
    """One reader on files 0 to `count`."""
    parts: list[Row] = []
    left = [range(count)]
    while left:
        numbers = left.pop()
        if not numbers:
            continue
        done, problem = batch(reader, numbers, seed)
        parts += done
        if problem is not None:
            start = numbers.start + sum(part["count"] for part in done)
            at = problem["number"]
            parts.append({"count": 1, "failed": 1, "failures": [problem]})
            left += [range(at + 1, numbers.stop), range(start, at)]
    kinds: Counter[str] = sum((Counter(p.get("kinds", {})) for p in parts), Counter())
    errors = {k: n for k, n in sorted(kinds.items()) if k.endswith("Error")}
    failed = sum(part["failed"] for part in parts)
    foreign = {f["kind"] for part in parts for f in part["failures"]}
    refused = {k: n for k, n in errors.items() if k not in foreign}
    return {
        "table": "fuzz_readers",
        "reader": reader,
        "seed": seed,
        "count": sum(part["count"] for part in parts),
        "accepted": kinds["accepted"],
        "refused": sum(refused.values()),
        "refused_as": refused,
        "slowest": max((part.get("slowest", 0.0) for part in parts), default=0.0),
        "peak_mib": max((part.get("peak_kib", 0) for part in parts), default=0) / 1024,
        "failed": failed,
        "failures": [f for part in parts for f in part["failures"]][:MOST_LISTED],
    }


def batch(reader: str, numbers: range, seed: int) -> tuple[list[Row], Row | None]:
    """What one process did, and why it ended early, if it did."""
    with tempfile.TemporaryDirectory() as parent:
        current = Path(parent, "number")
        current.write_bytes(STARTING)
        words = (reader, numbers.start, numbers.stop, seed, STEP, parent)
        path = [str(common.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(TESTS / "reading.py"), *map(str, words)],
            stdout=subprocess.PIPE,
            cwd=parent,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path)},
        )
        out, hung = watched(child, current)
        code, number = child.wait(), current.read_bytes()
    done = [json.loads(line) for line in out.splitlines()]
    if code == 0:
        return done, None
    if number == STARTING:
        raise SystemExit(f"the reader of {reader} did not start: exit status {code}")
    text = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    kind = "hang" if hung else "crash"
    return done, {"number": int.from_bytes(number, "little"), "kind": kind, "text": text}


def watched(child: subprocess.Popen[bytes], current: Path) -> tuple[bytes, bool]:
    """What a process wrote, and whether it was ended because one file took too long."""
    out, number, since = b"", b"", time.monotonic()
    assert child.stdout is not None
    while True:
        if select.select([child.stdout], [], [], 0.5)[0]:
            read = os.read(child.stdout.fileno(), 1 << 16)
            out += read
            if not read:
                return out, False
        if (now := current.read_bytes()) != number:
            number, since = now, time.monotonic()
        elif time.monotonic() - since > (10 if now == STARTING else 1) * MOST_WAIT:
            child.kill()
            return out[: out.rfind(b"\n") + 1], True


if __name__ == "__main__":
    main()
