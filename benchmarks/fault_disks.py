"""Kills, full disks and two writers at one place: whole old results, whole new ones, or none."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fault_children as children
import numpy as np
from fault_children import FAILED, HUNG, KILLED, OK, REFUSED, Ended, Limits

Files = Mapping[str, bytes]
SYNTHESIZE = ("--method", "zeroq", "-n", "4", "--batch", "2", "--steps", "4")
QUANTIZE = ("--preset", "balanced", "--scheme", "w4a4")
OURS = (".lock", ".partial-", ".tmp-")
"""What names of files have in them that only live while a process does."""
VOLATILE = ("seconds", "date", "report.html")


class Case(NamedTuple):
    """How one case went: what it was, how the process ended, and what was wrong with the rest."""

    name: str
    ended: Ended
    wrong: str


class Place(NamedTuple):
    """Where cases of one kind happen, each from the same beginning.

    Attributes:
      folder: of everything.
      output: what a verb writes.
      run: the verb.
      before: restores what was there when it began.
      fault: () -> what is wrong with what is there now; empty if it is whole.
    """

    folder: Path
    output: Path
    run: Callable[[], object]
    before: Callable[[], object]
    fault: Callable[[], str]


def artifact(seed: int) -> dict[str, bytes]:
    """The files of an output folder: what our own reader takes for whole, without networks."""
    random = np.random.default_rng(seed)
    sizes = {"model.onnx": 40_000, "float.onnx": 60_000, "model.safetensors": 20_000}
    files = {name: random.bytes(size + seed) for name, size in sizes.items()}
    files |= {f"only-{seed % 2}.txt": b"in this one only"}
    told = {k: {"bytes": len(v), "sha256": digest(v)} for k, v in files.items()}
    empty: dict[str, Any] = {"contract": {}, "graph": {}, "plan": {}, "report": {}}
    facts = {"format": "dfq_jax artifact", "schema_version": 1, "status": "ok", "scheme": "w8a8"}
    manifest = {**facts, **empty, "files": told, "seed": seed}
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def digest(data: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(data).hexdigest()


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name; those of our own that are on their way left out."""
    found = (p for p in sorted(folder.glob("*")) if not p.name.startswith(".partial-"))
    return {p.name: p.read_bytes() for p in found if p.is_file()}


def saving(root: Path) -> Place:
    """An output folder that is replaced by another."""
    folder, old, new = root / "save", artifact(0), artifact(1)
    out = folder / "out"

    def before() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        out.mkdir(parents=True)
        for name, data in old.items():
            (out / name).write_bytes(data)

    def run() -> None:
        from dfq_jax.io.artifacts.output_folder import check_output_folder, replace_all

        check_output_folder(out)
        replace_all(out, new)

    def fault() -> str:
        from dfq_jax.io.artifacts.output_folder import settle

        settle(out)
        return "" if content(out) in (old, new) else f"mixed: {sorted(content(out))}"

    return Place(folder, out, run, before, fault)


def verb(root: Path, name: str, line: Callable[[Path], list[str]], output: str) -> Place:
    """A verb of the command line that writes in a folder of its own."""
    folder = root / name
    out = folder / output

    def before() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def run() -> None:
        from dfq_jax.cli.app import main

        main(line(out))

    return Place(folder, out, run, before, partial(unreadable, out))


def unreadable(out: Path) -> str:
    """What is wrong with images or an artifact at a place where nothing was before."""
    if not out.exists():
        return ""

    def read() -> None:
        from dfq_jax.io.artifacts.artifact import load_artifact
        from dfq_jax.io.artifacts.images import load_images

        finished = (out / "manifest.json").exists()
        if out.is_file() or (finished and any(out.glob("shard-*.npz"))):
            load_images(out)
        elif finished:
            load_artifact(out)

    found = children.in_child(read)
    return "" if found.kind == OK else f"left unreadable: {found.text}"


def lasting(out: Path) -> dict[str, str]:
    """{file: hash} of what a run leaves, but for clocks."""
    files = [out] if out.is_file() else [p for p in sorted(out.glob("*")) if p.is_file()]
    return {p.name: digest(steady(p)) for p in files if p.name not in VOLATILE}


def steady(path: Path) -> bytes:
    """The content of a file, without what a clock wrote into it."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return b"".join(arrays[k].tobytes() for k in sorted(arrays) if arrays[k].ndim > 1)
    return path.read_bytes() if path.suffix in (".onnx", ".safetensors") else b""


def kills(place: Place, name: str, count: int, random: Any) -> Iterator[Case]:
    """So many kills, each before another operation on a file, and the run that follows each."""
    place.before()
    whole = children.in_child(place.run, Limits(place.folder))
    if whole.kind != OK:
        yield Case(f"{name} undisturbed", whole, f"{whole.kind}: {whole.text}")
        return
    wanted = lasting(place.output)
    for moment in moments(whole.moments, count, random):
        place.before()
        ended = children.in_child(place.run, Limits(place.folder, kill_at=moment))
        wrong = place.fault() if ended.kind in (KILLED, OK) else f"{ended.kind}: {ended.text}"
        again = children.in_child(place.run)
        if not wrong and again.kind != OK:
            wrong = f"cannot be run again: {again.kind}: {again.text}"
        if not wrong and lasting(place.output) != wanted:
            wrong = "another result than without the kill"
        yield Case(f"{name}, operation {moment} of {whole.moments}", ended, wrong or rest(place))


def moments(most: int, count: int, random: Any) -> list[int]:
    """Operations before which to kill: all in turn, then some again; fewer than there are: some."""
    if count < most:
        return sorted(1 + int(i) for i in random.choice(most, count, replace=False))
    return [1 + i % most for i in range(count)]


def rest(place: Place) -> str:
    """What a finished run left lying about beside its result."""
    names = [p.relative_to(place.folder).as_posix() for p in place.folder.rglob("*")]
    stale = [n for n in names if n.endswith(".run") or any(part in n for part in OURS)]
    return f"left behind: {stale}" if stale else ""


def full_disks(place: Place, name: str, count: int, random: Any) -> Iterator[Case]:
    """A disk that is full after some bytes: nothing is replaced, and a later run ends well."""
    for _ in range(count):
        place.before()
        room = int(2 ** random.uniform(0, 16))
        ended = children.in_child(place.run, Limits(place.folder, largest=room))
        fine = ended.kind in (OK, REFUSED)
        wrong = place.fault() if fine else f"{ended.kind}: {ended.text}"
        again = children.in_child(place.run)
        if not wrong and again.kind != OK:
            wrong = f"cannot be run again: {again.kind}: {again.text}"
        yield Case(f"{name}, files of {room} bytes", ended, wrong or rest(place))


def two_writers(root: Path, count: int, random: Any) -> Iterator[Case]:
    """Two processes that save at one place at once: one of them, or both after each other."""
    for number in range(count):
        place, other = saving(root), artifact(2 + number)

        def second(out: Path = place.output, files: Files = other) -> None:
            from dfq_jax.io.artifacts.output_folder import check_output_folder, replace_all

            check_output_folder(out)
            replace_all(out, files)

        place.before()
        since, limits = time.monotonic(), Limits()
        pair = [children.started(place.run, limits)]
        time.sleep(float(random.uniform(0, 0.01)))
        pair.append(children.started(second, limits))
        ends = [children.awaited(child, limits, since) for child in pair]
        bad = [e for e in ends if e.kind in (FAILED, HUNG)]
        found = content(place.output)
        wrong = f"{bad[0].kind}: {bad[0].text}" if bad else ""
        if not wrong and found not in (artifact(1), other):
            wrong = f"mixed: {sorted(found)}"
        if not wrong and all(e.kind == REFUSED for e in ends):
            wrong = "both were refused"
        yield Case(f"pair {number}", max(ends, key=lambda e: e.mib), wrong or rest(place))
