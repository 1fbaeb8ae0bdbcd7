"""Our composition: images a network is sure about, with the statistics it was trained on.

Batch statistics (DeepInversion's granularity) in units of each channel's own deviation, so that
deep and shallow, wide and narrow layers pull equally; random class labels, so that late features
are as strong as real ones (matching every sample to the mean leaves them flat and clips real
images later); pixels that a camera could deliver; a start from dead leaves and pink noise, which
have the spectrum and the edges of photographs (small images: from pink noise alone); most steps at
half the size where the network can read it, a quarter of the cost; a cosine schedule, so that a few
dozen steps suffice. What each of these is worth is measured in `docs/RESULTS.md`; `settings_for`
says what suits which network.

Labels make a network sure of every image. A quantizer that takes no more than ranges from images
gains a little by that; rounding that is learned should see close decisions as well, and takes
images of `best_unlabelled`. What judges a network should see both.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dfq_jax.graph.graph import Model
from dfq_jax.optim.schedules import adam_to_zero, rated
from dfq_jax.recipes.sizes import gains_from_halves, is_small
from dfq_jax.synthesis.recipe import Offer, Recipe, Source, Stage, random_labels, recorded
from dfq_jax.synthesis.sources.augment import halve
from dfq_jax.synthesis.sources.noise import noise
from dfq_jax.synthesis.sources.pixels import pink
from dfq_jax.synthesis.terms.base import Term, label_entropy
from dfq_jax.synthesis.terms.match import relative_batch_match

STARTS = {"noise": noise, "pink": pink}
IMAGES = 256
"""Made where nobody says how many, and no preset cuts them."""
COARSE = 0.8
"""Share of the steps at half the size, where images are large."""
SMALL: Mapping[str, Any] = {"start": "pink", "labels": 0.3, "learning_rate": 0.15}
"""On small images edges of dead leaves are as long as objects, and take steps to wear off."""


@recorded
def best(
    *,
    steps: int = 200,
    batch: int = 64,
    learning_rate: float = 0.1,
    labels: float = 1.0,
    coarse: float = 0.0,
    start: str = "noise",
) -> Recipe:
    """Class-conditional images matched in relative batch statistics.

    Args:
      steps: Adam steps of both sizes.
      batch: images whose statistics are taken together.
      learning_rate: initial at either size, in natural units; falls to 0 along a cosine.
      labels: weight of the cross-entropy to random labels; 0 for images without labels.
      coarse: share of the steps in which the network sees the images at half their size; 0.8 pays
        for images of 224 pixels.
      start: `noise` (dead leaves and pink noise in turn) or `pink`.

    Returns:
      The recipe.

    Raises:
      ValueError: unless 0 <= coarse < 1 and the start is known.
    """
    if not 0 <= coarse < 1 or start not in STARTS:
        raise ValueError(f"best() got coarse={coarse} (0..1) and start={start!r} {list(STARTS)}.")
    small = int(steps * coarse)
    falling = partial(rated, adam_to_zero, learning_rate)
    stages = (Stage(small, falling(steps=small), halve),) if small else ()
    unlabelled = Recipe(
        name="best_unlabelled",
        batch=batch,
        source=Source(STARTS[start]),
        stages=(*stages, Stage(steps - small, falling(steps=steps - small))),
        terms=(Term("batch norm", 1.0, relative_batch_match),),
        bounded=True,
    )
    if labels == 0:
        return unlabelled
    sure = Term("labels", labels, label_entropy, True)
    terms = (*unlabelled.terms, sure)
    return unlabelled._replace(name="best", terms=terms, condition=random_labels)


best_unlabelled = partial(best, labels=0.0)
"""`best` for rounding that is learned: images that the network may be unsure about."""


def settings_for(model: Model) -> Mapping[str, Any]:
    """How `best` is set for a network: by the size of its images, and whether it reads halves."""
    if is_small(model.contract):
        return SMALL
    return {"coarse": COARSE} if gains_from_halves(model) else {}


def suited(model: Model, given: Mapping[str, Any]) -> Recipe:
    """`best` as it suits a network."""
    return best(**{**settings_for(model), **given})


def suited_unlabelled(model: Model, given: Mapping[str, Any]) -> Recipe:
    """`best_unlabelled` as it suits a network."""
    return best(**{**settings_for(model), **given, "labels": 0.0})


BEST = Offer(best, suited, images=IMAGES, ours=True)
BEST_UNLABELLED = Offer(best_unlabelled, suited_unlabelled, images=IMAGES, ours=True)
