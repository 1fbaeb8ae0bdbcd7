"""What each part of `best` is worth, and what parts of other methods would add to it.

Every row changes one thing. The quantizer is that of `synthesis_quality.py` at W4A4; the divergence
from the float network tells rows apart where accuracy, on so few images, cannot.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import common
import image_measures
import synthesis_quality
from common import Column, Row

SCHEME = "w4a4"
COLUMNS = [
    Column("network", "network"),
    Column("variant", "variant"),
    Column("n", "images"),
    Column("steps", "steps"),
    Column("seeds", "seeds"),
    Column("seconds", "core s", ".0f"),
    Column("bn_loss", "BN loss", ".3f"),
    Column("spread", "spread", ".2f"),
    Column("cosine", "cosine", ".2f"),
    Column("classes", "classes %", ".0fx100"),
    Column(SCHEME, "W4A4 %", ".2fx100"),
    Column(f"{SCHEME}_kl", "KL", ".3f"),
]
MEASURES = ("seconds", "bn_loss", "spread", "cosine", "classes", SCHEME, f"{SCHEME}_kl")
STARTS = {"noise": "dead leaves and pink noise", "pink": "pink noise alone"}
BUDGETS = {"resnet20": (256, 128, 60), "efficientnet_lite0": (64, 16, 40)}
"""{network: (images, batch, steps)}."""


def main() -> None:
    """One row a network and variant, the mean over seeds."""
    args = arguments()
    each = lambda s: (row(s, *way, args) for way in variants(s, args.steps).items())
    rows, reason = synthesis_quality.measured(args, COLUMNS, each)
    common.finish(args, {"best_ablation": COLUMNS}, rows, reason)


def arguments() -> argparse.Namespace:
    """What to run."""
    parser = common.parser(__doc__)
    parser.add_argument("--networks", type=common.choices(BUDGETS), default=tuple(BUDGETS))
    parser.add_argument("--seeds", type=lambda t: [int(v) for v in common.names(t)], default=[0])
    parser.add_argument("--steps", type=int, help="instead of the usual ones")
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    return parser.parse_args()


def variants(subject: Any, steps: int | None) -> dict[str, Any]:
    """{what is different: recipe}; the same seconds where images are seen at two sizes."""
    from dfq_jax.recipes.best import COARSE, best, settings_for
    from dfq_jax.recipes.sizes import is_small
    from dfq_jax.synthesis.recipe import Recipe, Source
    from dfq_jax.synthesis.sources.augment import resized_crop
    from dfq_jax.synthesis.sources.pixels import gaussian
    from dfq_jax.synthesis.sources.swing import swing
    from dfq_jax.synthesis.terms.base import Term, correlation

    _, batch, usual = BUDGETS[subject.name]
    steps, small = steps or usual, is_small(subject.model.contract)
    given = {"steps": steps, "batch": batch, **settings_for(subject.model)}
    plain = best(**given)
    shown = lambda augment: tuple(s._replace(augment=augment) for s in best(**full).stages)
    full = {**given, "coarse": 0.0, "steps": full_steps(steps, given.get("coarse", 0.0))}
    start = "noise" if small else "pink"
    correlated = Term("correlation", 0.01, lambda o: correlation(o.natural))
    found: dict[str, Recipe] = {
        "best": plain,
        f"start: {STARTS[start]}": best(**{**given, "start": start}),
        "start: Gaussian noise": plain._replace(source=Source(gaussian)),
        "labels left out": best(**{**given, "labels": 0.0}),
        "labels three times as strong": best(**{**given, "labels": 3 * given.get("labels", 1.0)}),
        "statistics of each image (ZeroQ)": with_match(plain, "sample"),
        "absolute statistics (GENIE)": with_match(plain, "absolute"),
        "tolerance, each image (DSG)": with_match(plain, "slack"),
        "pixels of any value": plain._replace(bounded=False),
        "with swing convolutions (GENIE)": plain._replace(distort=swing(1)),
        "with correlation inhibited (DSG)": plain._replace(terms=(*plain.terms, correlated)),
        "with crops (IntraQ)": best(**full)._replace(stages=shown(resized_crop(smallest=0.5))),
    }
    if small:
        return found | {"most steps at half the size": best(**{**given, "coarse": COARSE})}
    return found | {"all steps at full size": best(**full)}


def full_steps(steps: int, coarse: float) -> int:
    """Steps at full size that cost as much as these: one at half the size costs a quarter."""
    return max(round(steps * (1 - 0.75 * coarse)), 1)


def with_match(recipe: Any, kind: str) -> Any:
    """The recipe with other statistics to match."""
    from dfq_jax.synthesis.terms import match
    from dfq_jax.synthesis.terms.base import Term
    from dfq_jax.synthesis.terms.slack import slack_margins

    terms: dict[str, Callable[[Any], Any]] = {
        "sample": match.batch_norm_match,
        "absolute": match.matched(match.batch_std_gap, match.squared_mean),
        "slack": lambda o: match.enhanced(match.layer_losses(o, o.shared), 2.0),
    }
    recipe = recipe._replace(terms=(Term("batch norm", 1.0, terms[kind]), *recipe.terms[1:]))
    return recipe._replace(prepare=slack_margins) if kind == "slack" else recipe


def row(subject: Any, variant: str, recipe: Any, args: argparse.Namespace) -> Row:
    """A variant, averaged over seeds."""
    import numpy as np

    n = BUDGETS[subject.name][0]
    found = [judged(subject, recipe, n, seed) for seed in args.seeds]
    about = {"table": "best_ablation", "network": subject.name, "variant": variant, "n": n}
    about |= {"steps": recipe.steps, "seeds": len(args.seeds)}
    return about | {key: float(np.mean([f[key] for f in found])) for key in MEASURES}


def judged(subject: Any, recipe: Any, n: int, seed: int) -> Row:
    """The images of a recipe, what they look like to the network and how they quantize it."""
    import jax

    from dfq_jax.synthesis.run.engine import synthesize_images

    start = time.process_time()
    images = synthesize_images(subject.model, recipe, n, jax.random.key(seed)).images
    found: Row = {"seconds": time.process_time() - start}
    found |= image_measures.looks(subject.model, subject.targets, images)
    return found | synthesis_quality.judged_with(subject, images, SCHEME)


if __name__ == "__main__":
    main()
