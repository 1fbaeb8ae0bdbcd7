"""Knowledge that moves: to other images (SHOT), and to another network without data (DFKD).

`shot` adapts akamaster's ResNet-20, which never saw a JPEG, to unlabelled JPEG training images; its
norms keep their statistics with `shot_own_norms`. `dfkd` teaches a ResNet-20 of half the channels,
begun at random, what the whole one says; `noise` is the same student after the same steps on noise.
Accuracies are of networks in float, on the test images; `--choose` judges by 5,000 training images
that nothing learns from.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import common
from common import Column, Row

SOURCE, TARGET = "checkpoints/resnet20-12fca82f.th", "checkpoints/resnet20-cifar10-jpeg.pth"
TRAIN, TEST = "data/cifar10-jpeg-train.zip", "data/cifar10-jpeg-test.zip"
CHOSEN_ON, ROWS = 5000, ("shot", "shot_own_norms", "dfkd", "noise")
TABLES = {
    "transfer": (
        Column("method", "method"),
        Column("images", "images", ",d"),
        Column("steps", "steps", ",d"),
        Column("batch", "batch"),
        Column("seed", "seed"),
        Column("teacher", "teacher or source top-1 %", ".2fx100"),
        Column("top1", "top-1 %", ".2fx100"),
        Column("seconds", "s", ",.0f"),
        Column("judged", "judged on"),
    )
}


def main() -> None:
    """Moves knowledge by the chosen methods and judges."""
    parser = common.parser(__doc__)
    parser.add_argument("--methods", type=common.choices(ROWS), default=ROWS[:1], metavar="A,B")
    parser.add_argument("--seeds", type=common.names, default=("0",), metavar="0,1")
    parser.add_argument("--images", type=int, default=10_000, help="unlabelled ones of `shot`")
    parser.add_argument("--epochs", type=int, default=15, help="of `shot`")
    parser.add_argument("--rate", type=float, help="of learning, instead of the method's")
    parser.add_argument("--steps", type=int, default=2000, help="of `dfkd` and `noise`")
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--choose", action="store_true", help="judge by training images")
    args = parser.parse_args()
    reason = common.absent(args.shared, SOURCE, TARGET, TRAIN, TEST)
    rows = [] if reason else rows_of(args)
    common.finish(args, TABLES, rows, reason)


def rows_of(args: argparse.Namespace) -> list[Row]:
    """A row for each method and seed."""
    import dfq_jax

    rows: list[Row] = []
    for method in args.methods:
        path = SOURCE if method.startswith("shot") else TARGET
        known = dfq_jax.load(args.shared / path, arch="resnet20_cifar")
        said = judged(known, args)
        for seed in map(int, args.seeds):
            began = time.perf_counter()
            moved = by_shot if method.startswith("shot") else by_distillation
            made, about = moved(known, method, seed, args)
            seconds = time.perf_counter() - began
            row = {"table": "transfer", "method": method, "seed": seed, "batch": args.batch}
            row |= {"teacher": said, "top1": judged(made, args), "seconds": round(seconds, 1)}
            row |= {"judged": "training images" if args.choose else "test images", **about}
            rows.append(row)
            common.logged(row, TABLES["transfer"])
    return rows


def by_shot(known: Any, method: str, seed: int, args: argparse.Namespace) -> tuple[Any, Row]:
    """The network adapted to unlabelled images."""
    import jax

    from dfq_jax import methods, parts

    images = unlabelled(known, args.images, args.shared)
    how = {"batch": args.batch, "epochs": args.epochs, "count": len(images)}
    how |= {"learning_rate": args.rate} if args.rate else {}
    way = methods.shot(**how, batch_norms=method == "shot")
    made, _ = parts.adapted(known, images, way, args.epochs, jax.random.key(seed))
    steps = args.epochs * (len(images) // args.batch)
    return made, {"images": len(images), "steps": steps}


def by_distillation(
    teacher: Any, method: str, seed: int, args: argparse.Namespace
) -> tuple[Any, Row]:
    """A network of half the channels, taught from the start."""
    import jax

    from dfq_jax import edits, methods, parts

    key, noise = jax.random.split(jax.random.key(seed))
    pixels = jax.random.normal(noise, (1024, *teacher.contract.shape))
    how = edits.Pruning(0.5, "l2", "none", channels="all")
    half = edits.prune(edits.Subject(teacher), how).model
    told = {"steps": args.steps, "batch": args.batch, "warmup": min(400, args.steps // 10)}
    told |= {"learning_rate": args.rate} if args.rate else {}
    way = methods.dfkd(**told)
    if method == "noise":
        way = way._replace(images=parts.FixedImages())
    student = parts.initialised(half, key)
    made, _ = parts.distilled(
        student, teacher, way, parts.TrainingSetup(pixels[:768], pixels[768:], key)
    )
    return made, {"images": 768 if method == "noise" else None, "steps": args.steps}


def unlabelled(model: Any, count: int, shared: Path) -> Any:
    """Training images from behind those that settings are chosen on, normalised."""
    import jax.numpy as jnp
    import numpy as np

    from dfq_jax.data.accuracy import load_example, pick
    from dfq_jax.data.sources import open_source

    source = open_source(str(shared / TRAIN))
    chosen = set(pick(len(source), CHOSEN_ON))
    others = [i for i in range(len(source)) if i not in chosen]
    drawn = np.random.default_rng(0).permutation(others)[:count]
    images = [load_example(source, int(i), model.contract)[0] for i in drawn]
    return jnp.asarray(np.stack(images))


def judged(network: Any, args: argparse.Namespace) -> float:
    """Top-1 on the images that judge."""
    import dfq_jax

    data, limit = (TRAIN, CHOSEN_ON) if args.choose else (TEST, None)
    return dfq_jax.evaluate(network, str(args.shared / data), limit=limit).top1


if __name__ == "__main__":
    main()
