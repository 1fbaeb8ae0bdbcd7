"""What each part of `best` rounding is worth, and what would be added to it.

Every row changes one thing. Images are made by `best_unlabelled` once for each seed, accuracy is
that of the simulator.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import synthesis_quality
from common import Column, Row

COLUMNS = [
    Column("network", "network"),
    Column("scheme", "scheme"),
    Column("layers", "layers preset"),
    Column("variant", "variant"),
    Column("n", "images"),
    Column("steps", "steps"),
    Column("seed", "seed"),
    Column("top1", "top-1 %", ".2fx100"),
    Column("kl", "KL", ".4f"),
    Column("kept", "units better"),
    Column("core_seconds", "core s", ".0f"),
]


def main() -> None:
    """Rows of every scheme and variant."""
    parser = common.parser(__doc__)
    parser.add_argument("--networks", type=common.names, default=("resnet20",))
    parser.add_argument("--schemes", type=common.names, default=("w2a2", "w4a4"))
    parser.add_argument("--variants", type=common.choices(variants(1)), help="default: all")
    parser.add_argument("--layers", default="brecq_8bit_ends_second_shortcuts")
    parser.add_argument("--n", type=int, default=256, help="images")
    parser.add_argument("--steps", type=int, default=300, help="of each unit")
    parser.add_argument("--image-steps", type=int, help="of synthesis (default: as published)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    args = parser.parse_args()
    rows, reason = synthesis_quality.measured(args, COLUMNS, lambda s: rows_of(s, args))
    common.finish(args, {"rounding_ablation": COLUMNS}, rows, reason)


def rows_of(subject: Any, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of one network."""
    images = synthesis_quality.synthesized(
        subject, "best_unlabelled", args.n, args.seed, args.image_steps
    ).images
    for scheme in args.schemes:
        for name in args.variants or variants(1):
            yield row(subject, images, scheme, name, args)


def variants(steps: int) -> dict[str, tuple[tuple[Any, ...], Any]]:
    """{what is different: (methods, what is made of the images first)}."""
    from dfq_jax.numerics.rounding import adaround
    from dfq_jax.recipes.best_rounding import best_rounding
    from dfq_jax.recipes.end_to_end import STEPS, end_to_end
    from dfq_jax.recipes.reconstructions import ENLARGED
    from dfq_jax.reconstruction.closed_form import ClosedForm

    best, last = best_rounding(steps=steps), end_to_end(steps=min(steps, STEPS))
    longer = end_to_end(steps=3 * last.phases[0].steps)
    (phase,) = best.phases
    change: Callable[..., Any] = lambda **k: best._replace(phases=(phase._replace(**k),))
    blocks = {
        "from rounding to nearest": best._replace(start=None),
        "scales of kernels fixed": best._replace(rounding=adaround()),
        "scales of activations fixed": change(edges=False),
        "all activations quantized": change(quantized=1.0, rough=1.0),
        "biases stay": change(biases=False),
        "bits at the papers' rate": best._replace(rates=best.rates._replace(bits=1e-3)),
        "activations at ten times the rate": best._replace(rates=best.rates._replace(edges=1e-3)),
        "8-bit units learn": best._replace(spare=False),
    }
    return {
        "best": ((best,), ENLARGED),
        "then end to end": ((best, last), ENLARGED),
        "end to end three times as long": ((best, longer), ENLARGED),
        "closed form alone": ((ClosedForm(),), ENLARGED),
        "closed form then end to end": ((ClosedForm(), last), ENLARGED),
        "closed form of moments not transported": ((ClosedForm(damping=None),), ENLARGED),
        "closed form not polished": ((ClosedForm(sweeps=0),), ENLARGED),
        "images as they are": ((best,), None),
        **{name: ((changed,), ENLARGED) for name, changed in blocks.items()},
    }


def row(subject: Any, images: Any, scheme: str, name: str, args: argparse.Namespace) -> Row:
    """One variant."""
    import jax

    from dfq_jax.quantization.plan import parse_scheme
    from dfq_jax.recipes.dfq import dfq
    from dfq_jax.recipes.reconstructions import reconstructed

    methods, enlarge = variants(args.steps)[name]
    made = dfq(subject.model, images, parse_scheme(scheme), layers=args.layers, bias="none")
    cpu, key = time.process_time(), jax.random.key(args.seed)
    made, reports = reconstructed(made, images, methods, key, enlarge=enlarge)
    core_seconds = time.process_time() - cpu
    top1, divergence = synthesis_quality.judgement(subject, made.quantized)
    return {
        "table": "rounding_ablation",
        "network": subject.name,
        "scheme": scheme,
        "layers": args.layers,
        "variant": name,
        "n": len(images),
        "steps": args.steps if any(hasattr(m, "phases") for m in methods) else None,
        "seed": args.seed,
        "top1": top1,
        "kl": divergence,
        "kept": f"{sum(r.kept for r in reports)} of {len(reports)}",
        "core_seconds": core_seconds,
    }


if __name__ == "__main__":
    main()
