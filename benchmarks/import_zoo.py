"""Imports the networks of torchvision and timm and compares them with PyTorch.

Weights and batch-norm statistics are random, one image of noise is the input. Every difference is
the largest one of any output value, over the largest output value of the reference.

    pt2        through a `.pt2` archive, against PyTorch
    ONNX 17    through ONNX with its batch norms kept, opset 17; and the exporter's newest
    source     that file of opset 17 in ONNX Runtime against its import; `load` has checked it too
    ORT        the imported network written as float ONNX, in ONNX Runtime, against JAX

With `--keep FOLDER` every row is a file there, and a run that was stopped goes on with the others.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import zoo_networks
from common import Column, Row

NEWEST = 23
TABLES = {
    "import_zoo": (
        Column("network", "network"),
        Column("size", "pixels"),
        Column("nodes", "nodes", ","),
        Column("weights", "million weights", ".1f"),
        Column("seconds", "s to import", ".2f"),
        Column("pt2", "pt2", ".1e"),
        Column("onnx17", "ONNX 17", ".1e"),
        Column("newest", f"ONNX {NEWEST}", ".1e"),
        Column("source", "source", ".1e"),
        Column("runtime", "ORT", ".1e"),
        Column("note", "note"),
    ),
    "import_pt2": (
        Column("network", "network"),
        Column("size", "pixels"),
        Column("nodes", "nodes", ","),
        Column("weights", "million weights", ".1f"),
        Column("seconds", "s to import", ".2f"),
        Column("pt2", "pt2", ".1e"),
        Column("runtime", "ORT", ".1e"),
        Column("note", "note"),
    ),
    "import_time": (
        Column("network", "network"),
        Column("file_mib", "file, MiB", ".0f"),
        Column("seconds", "s to load", ".2f"),
        Column("resident", "resident / file", ".2f"),
    ),
}
CHILD = """
import re, sys, time
import dfq_jax
from pathlib import Path
status = lambda: Path("/proc/self/status").read_text()
held = lambda what: 1024 * int(re.search(what + r":\\s*(\\d+)", status())[1])
dfq_jax.load  # JAX is imported now
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, start = held("VmRSS"), time.perf_counter()
model = dfq_jax.load(sys.argv[1])
print(time.perf_counter() - start, held("VmHWM") - before)
"""


def main() -> None:
    """Imports the chosen networks."""
    parser = common.parser(__doc__)
    groups = ", ".join(zoo_networks.GROUPS)
    parser.add_argument("--networks", default="required", help=f"names, or {groups}")
    parser.add_argument("--no-onnx", action="store_true", help="through .pt2 only")
    parser.add_argument("--only-source", action="store_true", help="without `newest` and `ORT`")
    parser.add_argument("--size", type=int, help="pixels along each side, where a network permits")
    parser.add_argument("--keep", type=Path, help="folder of finished rows, which are not repeated")
    parser.add_argument("--time", default="resnet50", help="network to time the import of")
    args = parser.parse_args()
    rows, failed = [], []
    names = chosen(args.networks)
    try:
        for name in names:
            made = kept(name, args)
            rows.append(made)
            common.logged(made, TABLES["import_zoo"])
            if made.get("note"):
                failed.append(f"see the note of {name}")
    except KeyboardInterrupt:
        failed.append(f"interrupted after {len(rows)} of {len(names)} networks")
    if args.time:
        rows.append(timed(args.time))
    common.finish(args, TABLES, rows, "; ".join(failed) or None)


def chosen(text: str) -> list[str]:
    """The networks asked for, groups written out."""
    listed = [zoo_networks.GROUPS.get(name, (name,)) for name in common.names(text)]
    return list(dict.fromkeys(name for group in listed for name in group))


def kept(name: str, args: argparse.Namespace) -> Row:
    """The row of a network, from its file if there is one."""
    if args.keep is None:
        return row(name, args)
    args.keep.mkdir(parents=True, exist_ok=True)
    path = args.keep / f"{name.replace(':', '-')}.json"
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text(json.dumps(row(name, args)))
        part.replace(path)
    return json.loads(path.read_text())


def row(name: str, args: argparse.Namespace) -> Row:
    """One network by every way there is."""
    import jax
    import torch

    size = zoo_networks.size_of(name, args.size)
    table = "import_pt2" if args.no_onnx else "import_zoo"
    made: Row = {"table": table, "network": name, "size": size}
    module = zoo_networks.network(name)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = outputs_of(module(image))
    notes: list[str] = []

    def attempt(key: str, work: Callable[[], Row]) -> None:
        try:
            made.update(work())
        except Exception as error:  # a row tells what failed, the others go on
            notes.append(f"{key}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")

    attempt("pt2", lambda: by_pt2(module, image, expected))
    if not args.only_source:
        attempt("ORT", lambda: by_runtime(module, image))
    if not args.no_onnx:
        attempt("ONNX 17", lambda: by_onnx(module, image, expected))
        if not args.only_source:
            attempt("newest", lambda: by_newest(module, image, expected))
    jax.clear_caches()
    gc.collect()
    return {**made, "note": "; ".join(notes)}


def by_pt2(module: Any, image: Any, expected: list[Any]) -> Row:
    """Difference by way of `.pt2`, and facts about the network."""
    data = zoo_networks.pt2(module, image)
    start = time.perf_counter()
    model = loaded(data, ".pt2")
    seconds = time.perf_counter() - start
    return {
        "nodes": len(model.graph.nodes),
        "weights": sum(x.size for s in model.params.values() for x in s.values()) / 1e6,
        "seconds": seconds,
        "pt2": gap(run(model, image), expected),
    }


def by_runtime(module: Any, image: Any) -> Row:
    """Difference of ONNX Runtime, running the network exported from JAX, to JAX."""
    from dfq_jax.io.onnx.export import float_onnx, serialize

    model = loaded(zoo_networks.pt2(module, image), ".pt2")
    theirs = in_runtime(serialize(float_onnx(model)), image)
    return {"runtime": gap(theirs, run(model, image))}


def by_onnx(module: Any, image: Any, expected: list[Any]) -> Row:
    """Differences by way of ONNX to PyTorch, and to the very file in ONNX Runtime."""
    data = zoo_networks.onnx(module, image, 17)
    found = run(loaded(data, ".onnx"), image)
    return {"onnx17": gap(found, expected), "source": gap(found, in_runtime(data, image))}


def by_newest(module: Any, image: Any, expected: list[Any]) -> Row:
    """Difference by way of the newest ONNX."""
    data = zoo_networks.onnx(module, image, NEWEST)
    return {"newest": gap(run(loaded(data, ".onnx"), image), expected)}


def loaded(data: bytes, suffix: str) -> Any:
    """The network in a file of these bytes, checked against it where that is ONNX."""
    from dfq_jax.io.load import load

    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        read = load(file.name, no_bn_fallback=True)
    for note in read.notes:
        if "not checked against its source" in note:
            raise ValueError(note)
    return read.model


def run(model: Any, image: Any) -> list[Any]:
    """All outputs in JAX, images as NCHW."""
    import jax
    import numpy as np

    from dfq_jax.graph.evaluate import evaluate
    from dfq_jax.io.frontends.parity import QUICK

    compiled = jax.jit(lambda m, x: evaluate(m, x)[0], compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        found = compiled(model, image.numpy().transpose(0, 2, 3, 1))
    arrays = [np.asarray(x) for x in found]
    return [x.transpose(0, 3, 1, 2) if x.ndim == 4 else x for x in arrays]


def in_runtime(data: bytes, image: Any) -> list[Any]:
    """What a file computes in ONNX Runtime."""
    from dfq_jax.io.runtime.session import open_session

    session = open_session(data, optimize=True, threads=2)
    return session.run(None, {session.get_inputs()[0].name: image.numpy()})


def outputs_of(value: Any) -> list[Any]:
    """The tensors a network returned, as arrays."""
    if isinstance(value, dict):
        value = tuple(value.values())
    listed = value if isinstance(value, tuple | list) else (value,)
    return [tensor.numpy() for tensor in listed if tensor is not None]


def gap(found: list[Any], expected: list[Any]) -> float:
    """Largest difference over largest value, of all outputs."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise ValueError(f"shapes {[x.shape for x in found]}, not {[x.shape for x in expected]}")
    pairs = zip(found, expected, strict=True)
    return max(float(abs(mine - theirs).max() / abs(theirs).max()) for mine, theirs in pairs)


def timed(name: str) -> Row:
    """Seconds and memory of one import in a process of its own."""
    import torch

    size = zoo_networks.size_of(name)
    module = zoo_networks.network(name)
    data = zoo_networks.pt2(module, torch.zeros(1, 3, size, size))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt2"
        path.write_bytes(data)
        line = [sys.executable, "-c", CHILD, str(path)]
        told = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()
    seconds, resident = float(told[0]), float(told[1])
    return {
        "table": "import_time",
        "network": name,
        "file_mib": len(data) / 2**20,
        "seconds": seconds,
        "resident": resident / len(data),
    }


if __name__ == "__main__":
    main()
