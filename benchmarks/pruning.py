"""Channels removed without data and without training, judged on labelled images.

Every row removes a share of the inner channels of every layer and restores what it can. Images are
made by `best` once for each network and seed. Nothing is chosen on the images that judge.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import common
from common import Column, Row

TABLES = {
    "pruning": (
        Column("network", "network"),
        Column("share", "channels removed %", ".0fx100"),
        Column("criterion", "criterion"),
        Column("restore", "restored by"),
        Column("seed", "seed"),
        Column("macs", "of MACs %", ".1fx100"),
        Column("top1", "top-1 %", ".2fx100"),
        Column("seconds", "s", ".1f"),
    )
}
DATA = "data/cifar10-jpeg-test.zip"


class Trained(NamedTuple):
    """A network: its checkpoint in the data folder, and its architecture."""

    checkpoint: str
    arch: str


NETWORKS = {
    "resnet20": Trained("checkpoints/resnet20-cifar10-jpeg.pth", "resnet20_cifar"),
    "resnet56": Trained("checkpoints/resnet56-4bfd9763.th", "resnet56_cifar"),
}
RESTORATIONS = ("none", "means", "merging", "lbyl", "udfc", "norms", "ridge")


def main() -> None:
    """Rows of every network, share, criterion and restoration."""
    parser = common.parser(__doc__)
    parser.add_argument("--networks", type=common.choices(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--shares", type=common.names, default=("0.1", "0.2", "0.3", "0.5"))
    parser.add_argument("--criteria", type=common.names, default=("energy",))
    parser.add_argument("--restore", type=common.choices(RESTORATIONS), default=RESTORATIONS)
    parser.add_argument("--seeds", type=common.names, default=("0",))
    parser.add_argument("--n", type=int, default=128, help="images")
    parser.add_argument("--steps", type=int, default=100, help="of a batch of them")
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    args = parser.parse_args()
    needed = [DATA, *(NETWORKS[name].checkpoint for name in args.networks)]
    reason = common.absent(args.shared, *needed)
    made = (row for name in args.networks for row in rows_of(name, args))
    rows = [] if reason else [common.logged(row, TABLES["pruning"]) for row in made]
    common.finish(args, TABLES, rows, reason)


def rows_of(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of one network."""
    import dfq_jax as dfq

    about = NETWORKS[name]
    model = dfq.load(args.shared / about.checkpoint, arch=about.arch)
    top1 = lambda network: dfq.evaluate(network, str(args.shared / DATA), limit=args.limit).top1
    row = {"table": "pruning", "network": name, "macs": 1.0}
    yield row | {"share": 0.0, "restore": "float", "top1": top1(model), "seconds": 0.0}
    for seed in map(int, args.seeds):
        images = dfq.synthesize(model, "best", args.n, seed=seed, steps=args.steps).images
        for share, criterion, restore in itertools.product(
            args.shares, args.criteria, args.restore
        ):
            start = time.perf_counter()
            made = pruned(model, images, float(share), criterion, restore)
            seconds = time.perf_counter() - start
            yield row | {
                "share": float(share),
                "criterion": criterion,
                "restore": restore,
                "seed": seed,
                "macs": made.macs[1] / made.macs[0],
                "top1": top1(made.model),
                "seconds": seconds,
            }


def pruned(model: Any, images: Any, share: float, criterion: Any, restore: Any) -> Any:
    """The network without a share of the inner channels of every layer."""
    from dfq_jax.pruning.groups import Subject
    from dfq_jax.pruning.prune import Pruning, prune

    return prune(Subject(model, images), Pruning(share, criterion, restore))


if __name__ == "__main__":
    main()
