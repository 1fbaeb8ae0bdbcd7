"""Output folders, image sets, options and contracts that were changed: read, or refused by name."""

import contextlib
import importlib
import io
import json
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fault_disks import digest

ROOM = 1 << 30
"""Bytes of addresses that reading one of them may add to what a process has."""
MOST_SECONDS = 5.0
KINDS = ("folder", "images", "options", "contract")
MOST_TOLD = 5


class Seeds(NamedTuple):
    """Healthy files of all kinds.

    Attributes:
      folder: an output folder as `dfq quantize` leaves it.
      images: a file of `dfq synthesize`.
      options: of a run, in TOML.
      network: a float ONNX file with a contract of ours.
    """

    folder: Path
    images: bytes
    options: bytes
    network: bytes


def changes() -> Any:
    """The changes of bytes and values that readers of models are tried with, too."""
    return importlib.import_module("mutations")


def mangled(random: Any, data: bytes) -> bytes:
    """A few changes of bytes."""
    by = changes()
    for _ in range(int(random.integers(1, 4))):
        data = by.pick(random, by.PLAIN)(random, data)[: by.LARGEST]
    return data


def rewritten(random: Any, value: Any) -> Any:
    """JSON data with one value somewhere in it exchanged, doubled or taken out."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = list(value)[int(random.integers(len(value)))]
        if random.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: rewritten(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.85:
        at = int(random.integers(len(value)))
        if random.random() < 0.1:
            return value[:at] + value[at + 1 :]
        return [*value[:at], rewritten(random, value[at]), *value[at + 1 :]]
    by = changes()
    return by.pick(random, by.RECORDS)


def broken_folder(random: Any, seeds: Seeds, place: Path) -> Callable[[], object]:
    """An output folder with a changed manifest or file; hashes fit more often than not."""
    from dfq_jax.io.artifacts.artifact import load_artifact

    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(seeds.folder, place)
    manifest = json.loads((place / "manifest.json").read_bytes())
    names = sorted(manifest["files"])
    if random.random() < 0.5:
        name = names[int(random.integers(len(names)))]
        data = mangled(random, (place / name).read_bytes())
        (place / name).write_bytes(data)
        if random.random() < 0.8:
            manifest["files"][name] = {"bytes": len(data), "sha256": digest(data)}
    else:
        manifest = rewritten(random, manifest)
    (place / "manifest.json").write_text(json.dumps(manifest))
    return lambda: load_artifact(place)


def broken_images(random: Any, seeds: Seeds, place: Path) -> Callable[[], object]:
    """A file of images with changed bytes, or whole with other arrays or words in it."""
    from dfq_jax.api.given import image_set
    from dfq_jax.types import InputContract

    path = place.with_suffix(".npz")
    whole = random.random() < 0.7
    path.write_bytes(exchanged(random, seeds.images) if whole else mangled(random, seeds.images))
    return lambda: image_set(path, InputContract(8, 8))


def exchanged(random: Any, data: bytes) -> bytes:
    """An intact archive of arrays, one of them of another shape, type, values or words."""
    with np.load(io.BytesIO(data)) as saved:
        arrays = {name: saved[name] for name in saved.files}
    name = sorted(arrays)[int(random.integers(len(arrays)))]
    value = arrays[name]
    if value.dtype.kind == "U":
        told = json.dumps(rewritten(random, json.loads(str(value)))).encode()
        told = told if random.random() < 0.7 else mangled(random, told)
        arrays[name] = np.array(told.decode("utf-8", "replace"))
    else:
        arrays[name] = other_array(random, value)
    if random.random() < 0.1:
        del arrays[name]
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def other_array(random: Any, value: np.ndarray) -> np.ndarray:
    """An array that is nearly the one given."""
    kinds = (np.uint8, np.int64, np.float16, np.float64, np.complex64, np.bool_, "M8[s]", "S3")
    with np.errstate(all="ignore"), contextlib.suppress(ValueError, TypeError):
        return [
            lambda: value.astype(kinds[int(random.integers(len(kinds)))]),
            lambda: value.reshape(-1),
            lambda: value[:0],
            lambda: value.swapaxes(1, 3)[:, :-1],
            lambda: value * np.float32(10.0 ** random.integers(-40, 39)),
            lambda: np.where(random.random(value.shape) < 0.01, np.nan, value),
        ][int(random.integers(6))]()
    return value


def broken_options(random: Any, seeds: Seeds, place: Path) -> Callable[[], object]:
    """Changed options of a run."""
    from dfq_jax.cli.config import read_tables

    path = place.with_suffix(".toml")
    path.write_bytes(mangled(random, seeds.options))
    return lambda: read_tables(path)


def broken_contract(random: Any, seeds: Seeds, place: Path) -> Callable[[], object]:
    """A network whose contract in the file was changed."""
    import onnx

    from dfq_jax.io.load import ReadOptions, load_with

    proto = onnx.load_model_from_string(seeds.network)
    for entry in proto.metadata_props:
        if entry.key == "dfq.contract":
            told = json.dumps(rewritten(random, json.loads(entry.value))).encode()
            told = told if random.random() < 0.5 else mangled(random, told)
            entry.value = told.decode("utf-8", "replace")
    path = place.with_suffix(".onnx")
    path.write_bytes(proto.SerializeToString())
    return lambda: load_with(str(path), ReadOptions(unchecked=True))


MAKERS = {
    "folder": broken_folder,
    "images": broken_images,
    "options": broken_options,
    "contract": broken_contract,
}


def tried(kind: str, numbers: range, seed: int, seeds: Seeds, place: Path) -> dict[str, Any]:
    """How many inputs of these numbers were read or refused, in this process."""
    from dfq_jax.errors import DfqError

    counts: Counter[str] = Counter()
    failures, slowest = [], 0.0
    for number in numbers:
        random = np.random.default_rng([seed, KINDS.index(kind), number])
        read = MAKERS[kind](random, seeds, place)
        start = time.monotonic()
        try:
            read()
            counts["accepted"] += 1
        except DfqError:
            counts["refused"] += 1
        except BaseException as error:  # whatever a user would see a traceback of
            counts["failed"] += 1
            failures.append(f"{kind} {number}: {type(error).__name__}: {str(error)[:200]}")
        seconds = time.monotonic() - start
        slowest = max(slowest, seconds)
        if seconds > MOST_SECONDS:
            counts["failed"] += 1
            failures.append(f"{kind} {number}: {seconds:.0f} s")
    return {**counts, "failures": failures[:MOST_TOLD], "slowest": slowest}


def bounded() -> None:
    """From here on this process may take `ROOM` more than it has."""
    status = Path("/proc/self/status")
    if not status.exists():
        return
    line = next(t for t in status.read_text().splitlines() if t.startswith("VmSize"))
    there = int(line.split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (there + ROOM, resource.RLIM_INFINITY))
