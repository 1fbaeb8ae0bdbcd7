"""Networks made smaller and quantized by one command, judged in ONNX Runtime on labelled images.

Every row is a call of `dfq.compress` (or `dfq.quantize`, where nothing is removed) on the same
images, saved, and judged as the file it makes. Times of a file are medians of runs in turn with
those of W8A8. Nothing is chosen on the images that judge.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import common
from common import Column, Row

TABLES = {
    "smaller": (
        Column("network", "network"),
        Column("case", "settings"),
        Column("macs", "of MACs %", ".1fx100"),
        Column("zeros", "zeros %", ".1fx100"),
        Column("kilobytes", "KB", ".1f"),
        Column("top1", "top-1 %", ".2fx100"),
        Column("expected", "expected loss", ".1fx100"),
        Column("ms", "ms", ".2f"),
        Column("speedup", "W8A8 / this", ".2f"),
        Column("seconds", "s", ".0f"),
    )
}
W8A8 = "w8a8"


class Subject(NamedTuple):
    """A network, how images of it are made, and what judges it."""

    file: str
    arch: str | None
    data: str
    n: int
    steps: int


NETWORKS = {
    "resnet20": Subject(
        "checkpoints/resnet20-cifar10-jpeg.pth",
        "resnet20_cifar",
        "data/cifar10-jpeg-test.zip",
        128,
        100,
    ),
    "resnet56": Subject(
        "checkpoints/resnet56-4bfd9763.th",
        "resnet56_cifar",
        "data/cifar10-jpeg-test.zip",
        128,
        100,
    ),
    "efficientnet_lite0": Subject("", "efficientnet_lite0", "data/imagenet-sample", 64, 30),
}
CASES: Mapping[str, dict[str, Any]] = {
    W8A8: {},
    "half the bytes: bits": {"budget": "half"},
    "half the bytes: channels": {"budget": "50% bytes"},
    "half the bytes: joint": {"budget": "50% bytes", "bits": "joint"},
    "third of the bytes: bits": {"budget": "third"},
    "third of the bytes: channels": {"budget": "33% bytes"},
    "third of the bytes: joint": {"budget": "33% bytes", "bits": "joint"},
    "2:4": {"sparsity": "2:4"},
    "2:4 in float": {"sparsity": "2:4", "scheme": "float"},
    "80% zeros in float": {"sparsity": "80%", "scheme": "float"},
    "80% zeros w6a8": {"sparsity": "80%", "scheme": "w6a8"},
    "30% channels": {"prune": "30%"},
    "70% MACs": {"budget": "70% MACs"},
    "50% MACs": {"budget": "50% MACs"},
}
PARTS = {"half": 0.5, "third": 0.33}
"""Shares of the bytes of W8A8 that bits alone may take."""


def main() -> None:
    """Rows of every network and case."""
    parser = common.parser(__doc__)
    parser.add_argument("--networks", type=common.choices(NETWORKS), default=("resnet20",))
    parser.add_argument("--cases", type=common.choices(CASES), default=tuple(CASES))
    parser.add_argument("--images", type=Path, help="an .npz of `dfq synthesize`, for one network")
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    args = parser.parse_args()
    about = [NETWORKS[name] for name in args.networks]
    reason = common.absent(args.shared, *(x.file for x in about), *(x.data for x in about))
    made = (row for name in args.networks for row in rows_of(name, args))
    rows = [] if reason else [common.logged(row, TABLES["smaller"]) for row in made]
    common.finish(args, TABLES, rows, reason)


def rows_of(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of one network."""
    import dfq_jax as dfq

    about = NETWORKS[name]
    model = dfq.load(args.shared / about.file, arch=about.arch) if about.file else dfq.load(name)
    images = args.images or dfq.synthesize(model, "best", about.n, seed=0, steps=about.steps)
    probes = dfq.parts.probes_of(model)
    data = str(args.shared / about.data)
    with tempfile.TemporaryDirectory() as folder:
        plain = None
        for case in args.cases:
            start = time.perf_counter()
            made = made_by(model, images, CASES[case], probes)
            seconds = time.perf_counter() - start
            out = Path(folder, str(args.cases.index(case)))
            made.save(out, unverified="a benchmark")
            names = ("model.onnx", "model.failed.onnx")
            file = next(out / name for name in names if (out / name).exists())
            plain = file if case == W8A8 else plain
            yield {
                "table": "smaller",
                "network": name,
                "case": case,
                "macs": None if made.pruned is None else made.pruned.macs[1] / made.pruned.macs[0],
                "zeros": None if made.zeros is None else made.zeros.shares[1],
                "kilobytes": file.stat().st_size / 1000,
                "top1": dfq.evaluate(file, data, limit=args.limit).top1,
                "expected": None if made.report.estimate is None else made.report.estimate.loss,
                "seconds": seconds,
                **timed(plain, file),
            }


def made_by(model: Any, images: Any, how: dict[str, Any], probes: Any) -> Any:
    """The result of a case."""
    import dfq_jax as dfq

    part = PARTS.get(how.get("budget", ""))
    if part is not None:
        return dfq.quantize(model, images, probes=probes, budget=f"{int(part * bytes_of(model))}B")
    make = dfq.compress if how else dfq.quantize
    return make(model, images, probes=probes, **how)


def bytes_of(model: Any) -> float:
    """Bytes of the weights of a network at W8A8."""
    from dfq_jax.allocation.costs import cost_of
    from dfq_jax.passes.fold import fold_batch_norm
    from dfq_jax.quantization.plan import resolve
    from dfq_jax.recipes.pipeline import pipeline_for

    folded, how = fold_batch_norm(model), pipeline_for(model)
    plan = resolve(folded.graph, how.scheme, how.layers, how.rules)
    return cost_of(folded, plan, "bytes").amount


def timed(plain: Path | None, file: Path) -> Row:
    """Milliseconds of a file on two threads, in turn with those of W8A8."""
    from dfq_jax.io.runtime.latency import bench

    if plain is None:
        return {}
    found = bench(plain, file, threads=2, runs=200)
    return {"ms": found.int_ms, "speedup": found.float_ms / found.int_ms}


if __name__ == "__main__":
    main()
