"""Learned rounding of low-bit networks, judged on labelled images.

Every row quantizes the network by `recipes.dfq` on the grids of one layer preset, from the images
named (made by that method of synthesis, or `real` ones of the training set), and then by one
reconstruction. `released` is what GENIE's released code reaches on this checkpoint with as many
images and steps of batch 32 on 2 cores: its own synthetic images for synthetic ones, real images
for real ones. It leaves the shortcuts of this network in float (`reconstruction_reference.py`), so
the preset to compare with is `brecq_8bit_ends_second_shortcuts`. Accuracy is that of the simulator,
which computes what ONNX Runtime does (see `verify.py`).
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import common
import synthesis_quality
from common import Column, Row

SCHEMES = ("w4a4", "w3a3", "w2a4", "w2a2")
RELEASED = {
    "synthetic": {"w4a4": 0.8773, "w3a3": 0.8682, "w2a4": 0.8518, "w2a2": 0.7978},
    "real": {"w4a4": 0.8792, "w2a4": 0.8602, "w2a2": 0.8085},
}
NAMES = ("table", "network", "images", "scheme", "layers", "reconstruction", "steps")
COLUMNS = [
    Column("network", "network"),
    Column("images", "images"),
    Column("n", "n"),
    Column("scheme", "scheme"),
    Column("layers", "layers preset"),
    Column("reconstruction", "reconstruction"),
    Column("steps", "steps"),
    Column("seeds", "seeds"),
    Column("top1", "top-1 %", ".2fx100"),
    Column("deviation", "+-", ".2fx100"),
    Column("kl", "KL", ".4f"),
    Column("released", "released %", ".2fx100"),
    Column("image_seconds", "s images", ".0f"),
    Column("seconds", "s rounding", ".0f"),
    Column("core_seconds", "core s", ".0f"),
]


def main() -> None:
    """Rows of every image set, scheme and reconstruction."""
    args = arguments()
    sets = [(method, seed) for seed in args.seeds for method in args.images]
    each = lambda s: (found for way in sets for found in compared(s, *way, args))
    rows, reason = synthesis_quality.measured(args, COLUMNS, each)
    common.finish(args, {args.table: COLUMNS}, averaged(rows), reason)


def arguments() -> argparse.Namespace:
    """What to run."""
    parser = common.parser(__doc__)
    kinds = common.choices(synthesis_quality.SETTINGS)
    parser.add_argument("--networks", type=kinds, default=("resnet20",))
    parser.add_argument("--images", type=common.names, default=("best_unlabelled", "real"))
    parser.add_argument("--schemes", type=common.names, default=SCHEMES)
    parser.add_argument("--layers", default="brecq_8bit_ends_second")
    parser.add_argument(
        "--reconstructions",
        type=common.names,
        default=("nearest", "closed_form", "genie_m", "best"),
    )
    parser.add_argument("--steps", type=int, default=2000, help="of each unit")
    parser.add_argument("--image-steps", type=int, help="of synthesis (default: as published)")
    parser.add_argument("--n", type=int, default=256, help="images")
    parser.add_argument("--seeds", type=lambda t: [int(v) for v in common.names(t)], default=[0])
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    parser.add_argument("--table", default="reconstruction", help="name of the table")
    return parser.parse_args()


def compared(subject: Any, method: str, seed: int, args: argparse.Namespace) -> Iterator[Row]:
    """One set of images, used in every way."""
    import jax.numpy as jnp

    start = time.monotonic()
    images = jnp.asarray(drawn(subject, method, seed, args))
    seconds = None if method == "real" else time.monotonic() - start
    for scheme in args.schemes:
        for name in args.reconstructions:
            facts: Row = {"table": args.table, "network": subject.name, "images": method}
            facts |= {"n": len(images), "scheme": scheme, "layers": args.layers}
            found = facts | rounded(subject, images, scheme, name, seed, args)
            released_top1 = released(subject, method, scheme, name, args.layers)
            yield found | {"image_seconds": seconds, "released": released_top1}


def drawn(subject: Any, method: str, seed: int, args: argparse.Namespace) -> Any:
    """The images of a method."""
    if method == "real":
        return synthesis_quality.real_images(subject, args.n, seed)
    made = synthesis_quality.synthesized(subject, method, args.n, seed, args.image_steps)
    return made.images


def released(subject: Any, method: str, scheme: str, name: str, layers: str) -> float | None:
    """What the released code reaches, beside rows that learn with as precise shortcuts."""
    if subject.name != "resnet20" or name == "nearest" or not layers.endswith("shortcuts"):
        return None
    return RELEASED["real" if method == "real" else "synthetic"].get(scheme)


def rounded(
    subject: Any, images: Any, scheme: str, name: str, seed: int, args: argparse.Namespace
) -> Row:
    """One reconstruction."""
    import jax

    from dfq_jax.quantization.plan import parse_scheme
    from dfq_jax.recipes.dfq import dfq
    from dfq_jax.recipes.reconstructions import LEARNED, enlarges, methods_of, reconstructed

    steps = args.steps if name in LEARNED else None
    methods = methods_of(name, steps)
    start, cpu = time.monotonic(), time.process_time()
    bias = "none" if methods else "analytic"
    made = dfq(subject.model, images, parse_scheme(scheme), layers=args.layers, bias=bias)
    if methods:
        more = enlarges(name, subject.model.contract)
        made, _ = reconstructed(made, images, methods, jax.random.key(seed), enlarge=more)
    jax.block_until_ready(made.quantized.qparams)
    seconds, core_seconds = time.monotonic() - start, time.process_time() - cpu
    top1, divergence = synthesis_quality.judgement(subject, made.quantized)
    return {
        "reconstruction": name,
        "steps": steps,
        "seeds": 1,
        "top1": top1,
        "kl": divergence,
        "seconds": seconds,
        "core_seconds": core_seconds,
    }


def averaged(rows: list[Row]) -> list[Row]:
    """One row for all seeds: means, and the deviation of the accuracy."""
    import numpy as np

    groups: dict[tuple[Any, ...], list[Row]] = {}
    for found in rows:
        groups.setdefault(tuple(found[name] for name in NAMES), []).append(found)
    merged = []
    for same in groups.values():
        numbers = ("top1", "kl", "seconds", "core_seconds", "image_seconds")
        means = {k: None if same[0][k] is None else np.mean([r[k] for r in same]) for k in numbers}
        spread = float(np.std([r["top1"] for r in same])) if len(same) > 1 else None
        plain = {k: None if v is None else float(v) for k, v in means.items()}
        merged.append(same[0] | plain | {"seeds": len(same), "deviation": spread})
    return merged


if __name__ == "__main__":
    main()
