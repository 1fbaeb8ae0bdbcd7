"""Runs the readers on bytes, one file after another, and tells how each ended."""

import faulthandler
import json
import mmap
import os
import re
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import forged
import hostile_graphs
import mutations

from dfq_jax.errors import DfqError
from dfq_jax.io.frontends.contracts import ToldInput
from dfq_jax.io.frontends.graph_files import model_of, prepared
from dfq_jax.io.frontends.onnx_graph import read_onnx_program
from dfq_jax.io.frontends.pt2_graph import read_pt2
from dfq_jax.io.importing.aten_table import ATEN
from dfq_jax.io.importing.onnx_table import ONNX
from dfq_jax.io.readers.checkpoint import read_checkpoint

MOST_SECONDS = 2.0
MOST_FAILURES = 20
STATUS = Path("/proc/self/status")
FORBIDDEN = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.dlopen",
    "exec",
    "pickle.find_class",
)


class Ended(NamedTuple):
    """How a reader ended.

    Attributes:
      kind: `accepted`, or the name of an exception.
      fine: whether that is how a reader may end: accepted, or one of our errors.
      text: the exception's message, and where in this package a foreign exception came from.
      seconds: of processor time.
    """

    kind: str
    fine: bool
    text: str
    seconds: float


def read(reader: str, data: bytes, folder: Path) -> object:
    """What a reader makes of a file in `folder`; a graph is also imported."""
    if reader == "pt2":
        return model_of(read_pt2(data, "net.pt2"), ATEN, "net.pt2", ToldInput())
    if reader == "onnx":
        program = prepared(read_onnx_program(data, "net.onnx", folder))
        return model_of(program, ONNX, "net.onnx", ToldInput())
    path = folder / f"net.{reader}"
    path.write_bytes(data)
    return read_checkpoint(path)


def ended(reader: str, data: bytes, folder: Path) -> Ended:
    """Runs a reader; every exception is a result, too."""
    start = time.process_time()
    kind, fine, text = "accepted", True, ""
    try:
        read(reader, data, folder)
    except DfqError as error:
        kind, text = type(error).__name__, str(error)
    except Exception as error:
        kind, fine, text = type(error).__name__, False, f"{error} ({origin(error)})"
    return Ended(kind, fine, text, time.process_time() - start)


def origin(error: Exception) -> str:
    """The innermost line of this package that an exception passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "dfq_jax" in f.filename]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "outside"


def settle(reader: str, folder: Path) -> None:
    """Reads the healthy files, so that everything a reader needs is loaded."""
    for data in forged.seeds()[reader]:
        read(reader, data, folder)


def limit_memory(extra: int) -> None:
    """Lets this process take so many bytes more than it has, and then fails its allocations."""
    if STATUS.exists():
        had = 1024 * held("VmSize")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (had + extra, hard))


def held(what: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in KiB."""
    found = re.search(what + r":\s*(\d+)", STATUS.read_text())
    return int(found[1]) if found else 0


def measured(reader: str, data: bytes, folder: Path) -> tuple[Ended, int]:
    """How a reader ended, and by how many KiB the process grew on the way."""
    if not STATUS.exists():
        return ended(reader, data, folder), 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = held("VmRSS")
    result = ended(reader, data, folder)
    return result, max(0, held("VmHWM") - before)


def audited(events: list[str], folder: Path) -> None:
    """From now on, notes in `events` what a reader must not do outside `folder`."""

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not str(args[0]).startswith((f"{folder}{os.sep}", "/proc/self/")):
            events.append(f"open {args[0]}")
        elif event == "import" and args[0] not in sys.modules:
            events.append(f"import {args[0]}")
        elif event.startswith(FORBIDDEN):
            events.append(event)

    sys.addaudithook(hook)


def corpus(folder: Path, events: list[str]) -> Iterator[dict[str, Any]]:
    """How the readers end on every file made by hand, each in a folder of its own."""
    for at, (title, case) in enumerate(hostile_graphs.CORPUS.items()):
        parent = folder / str(at)
        parent.mkdir()
        own = forged.folder_for_onnx(parent)
        data = case.make(own)
        events.clear()
        result, grown = measured(case.reader, data, own)
        fields = {"title": title, "bytes": len(data), "grown": 1024 * grown}
        yield {**fields, "events": list(events), **result._asdict()}


def survey(reader: str, numbers: range, seed: int, folder: Path, told: Any = None) -> dict:
    """Reads mutated files.

    Args:
      reader: which reader.
      numbers: of the files.
      seed: of the mutations.
      folder: to work in.
      told: a buffer that always holds the number of the file being read.

    Returns:
      Counts by kind, the slowest and the largest, and failures.
    """
    kinds: Counter[str] = Counter()
    failures, slowest, largest = [], 0.0, 0
    for number in numbers:
        if told is not None:
            told[:8] = number.to_bytes(8, "little")
        data = mutations.mutated(reader, number, seed)
        result, grown = measured(reader, data, folder)
        kinds[result.kind] += 1
        slowest, largest = max(slowest, result.seconds), max(largest, grown)
        kind = result.kind if not result.fine else "slow"
        if not result.fine or result.seconds > MOST_SECONDS:
            failures.append({"number": number, "kind": kind, "text": result.text[:200]})
    return {
        "count": len(numbers),
        "kinds": dict(kinds),
        "slowest": slowest,
        "peak_kib": largest,
        "failed": len(failures),
        "failures": failures[:MOST_FAILURES],
    }


def everything(count: int, parent: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """How all hostile files end, and `count` mutated ones of each reader."""
    events: list[str] = []
    audited(events, parent)
    yield from corpus(parent, events)
    for reader in mutations.READERS:
        events.clear()
        found = survey(reader, range(count), 0, folder)
        yield {"title": reader, "events": list(events), **found}


def main() -> None:
    """`READER FIRST LAST SEED STEP FOLDER`, or `all COUNT FOLDER`: what happened, as JSON lines.

    A line for every STEP mutated files; or one for every file of the corpus, and then one for
    COUNT mutated files of each reader, with all that is forbidden noted. The file `number` in
    FOLDER always holds the number of the current file.
    """
    faulthandler.enable()
    what, *numbers = sys.argv[1:-1]
    parent = Path(sys.argv[-1])
    folder = forged.folder_for_onnx(parent)
    for reader in mutations.READERS if what == "all" else (what,):
        settle(reader, folder)
    limit_memory(2 << 30)
    if what == "all":
        for line in everything(int(numbers[0]), parent, folder):
            print(json.dumps(line), flush=True)
        return
    first, last, seed, step = map(int, numbers)
    with (parent / "number").open("r+b") as file, mmap.mmap(file.fileno(), 8) as told:
        for start in range(first, last, step):
            files = range(start, min(start + step, last))
            print(json.dumps(survey(what, files, seed, folder, told)), flush=True)


if __name__ == "__main__":
    main()
