"""Training without data, judged on labelled images in ONNX Runtime.

Every row is a fresh `dfq_jax.train` of ResNet-20 on JPEG CIFAR-10 without data, from where its
method begins or from the folder given by `--start`; its accuracy is that of the last step.
`--choose` judges by 5,000 *training* images instead of the test images: settings are chosen on
those, and the test images judge what was chosen.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from common import Column, Row

CHECKPOINT, ARCH = "checkpoints/resnet20-cifar10-jpeg.pth", "resnet20_cifar"
TEST, CHOOSING = "data/cifar10-jpeg-test.zip", "data/cifar10-jpeg-train.zip"
CHOSEN_ON = 5000
TABLES = {
    "training": (
        Column("method", "method"),
        Column("scheme", "scheme"),
        Column("layers", "layers preset"),
        Column("steps", "steps", ",d"),
        Column("batch", "batch"),
        Column("images", "images", ",d"),
        Column("seed", "seed"),
        Column("float_top1", "FP32 top-1 %", ".2fx100"),
        Column("top1", "top-1 %", ".2fx100"),
        Column("drop", "drop", ".2fx100"),
        Column("before", "held-out KL before", ".4f"),
        Column("after", "after", ".4f"),
        Column("changed", "codes changed %", ".1fx100"),
        Column("steps_per_second", "steps/s", ".2f"),
        Column("seconds", "s", ",.0f"),
        Column("judged", "judged on"),
    )
}


def main() -> None:
    """Trains and judges with the chosen methods and seeds."""
    parser = common.parser(__doc__)
    parser.add_argument("--methods", type=common.names, default=("best",), metavar="A,B")
    parser.add_argument("--schemes", type=common.names, default=("w3a3",), metavar="A,B")
    parser.add_argument("--layers", default="zsq_all_low", help="preset of layers")
    parser.add_argument("--steps", type=int, help="of the student, instead of the method's")
    parser.add_argument("--batch", type=int, help="images of a step, likewise")
    parser.add_argument("--n", type=int, help="images that are made, likewise")
    parser.add_argument("--images", help="images to learn from, instead of making them")
    parser.add_argument("--start", help="folder of `dfq quantize` to begin from")
    parser.add_argument("--seeds", type=common.names, default=("0",), metavar="0,1")
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    parser.add_argument("--choose", action="store_true", help="judge by training images")
    parser.add_argument("--state", type=Path, help="folder that keeps states, to resume from")
    args = parser.parse_args()
    reason = common.absent(args.shared, CHECKPOINT, CHOOSING if args.choose else TEST)
    rows = [] if reason else rows_of(args)
    common.finish(args, TABLES, rows, reason)


def rows_of(args: argparse.Namespace) -> list[Row]:
    """A row for each method, scheme and seed."""
    import dfq_jax

    model = dfq_jax.load(args.shared / CHECKPOINT, arch=ARCH)
    float_top1 = judged(model, args)
    rows: list[Row] = []
    for scheme in args.schemes:
        for method in args.methods:
            for seed in map(int, args.seeds):
                rows.append(row_of(model, method, scheme, seed, float_top1, args))
                common.logged(rows[-1], TABLES["training"])
    return rows


def row_of(
    model: Any, method: str, scheme: str, seed: int, float_top1: float, args: argparse.Namespace
) -> Row:
    """One training, and how its network does on real images."""
    import dfq_jax
    from dfq_jax.optim.progress import Progress, Watcher

    at: list[tuple[float, int]] = []

    def told(now: Progress) -> None:
        if now.what == "training":
            at.append((time.perf_counter(), now.step))
            common.log(f"{method} {scheme} seed {seed}: step {now.step} of {now.steps}")

    began = time.perf_counter()
    where = None if args.state is None else args.state / f"{method}-{scheme}-{seed}"
    result = dfq_jax.train(
        model,
        args.images,
        method,
        start=args.start,
        scheme=scheme,
        layers=args.layers,
        steps=args.steps,
        batch=args.batch,
        n=args.n,
        seed=seed,
        watch=Watcher(stage=common.log, progress=told),
        state_folder=where,
    )
    seconds = time.perf_counter() - began
    top1 = accuracy_of(result, args)
    about = result.settings
    return {
        "table": "training",
        "method": method,
        "scheme": about["scheme"],
        "layers": about["layers"],
        "steps": about["training steps"],
        "batch": about["batch"],
        "images": len(result.images),
        "seed": seed,
        "float_top1": float_top1,
        "top1": top1,
        "drop": float_top1 - top1,
        "before": about["gap before"],
        "after": about["gap after"],
        "changed": about["codes changed"],
        "steps_per_second": pace(at),
        "seconds": round(seconds, 1),
        "judged": "training images" if args.choose else "test images",
    }


def pace(at: list[tuple[float, int]]) -> float | None:
    """Steps a second once all programs are there; None of too short a run."""
    if len(at) < 3:
        return None
    (first, begun), (last, ended) = at[1], at[-1]
    return (ended - begun) / max(last - first, 1e-9)


def accuracy_of(result: Any, args: argparse.Namespace) -> float:
    """Top-1 of the integer file in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "out")
        return judged(Path(folder) / "out", args)


def judged(network: Any, args: argparse.Namespace) -> float:
    """Top-1 on the images that judge."""
    import dfq_jax

    data, limit = (CHOOSING, CHOSEN_ON) if args.choose else (TEST, None)
    return dfq_jax.evaluate(network, str(args.shared / data), limit=args.limit or limit).top1


if __name__ == "__main__":
    main()
