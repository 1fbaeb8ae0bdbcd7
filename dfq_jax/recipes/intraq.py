"""IntraQ: images that differ within their class.

Zhong et al. 2022, "IntraQ: Learning Synthetic Images with Intra-Class Heterogeneity for Zero-Shot
Network Quantization": crops during synthesis (local object reinforcement), a margin for the
distance to earlier images of the class, and soft labels. With features `f` of an image, their mean
`c` over earlier images of its class, and `tau` the confidence it asks for:

    BNS = mean_l mean((m - mu)^2) + mean((v - sigma^2)^2)      of crops (LOR)
    SIL = mean_b (softmax(logits)_label - tau)^2
    MDC = mean_b [lower - d]+ + [d - upper]+,  d = 1 - cos(f, c)

    loss = BNS + SIL + MDC
"""

from collections.abc import Mapping
from typing import Any

from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import classes_of
from dfq_jax.optim.schedules import adam_with_plateau, rated
from dfq_jax.recipes.sizes import is_small
from dfq_jax.synthesis.recipe import Memory, Offer, Recipe, Source, Stage, recorded
from dfq_jax.synthesis.sources.augment import at_random, compose, flip, resized_crop, unchanged
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.synthesis.terms.classes import (
    asked_confidence,
    margin_of_classes,
    no_classes_yet,
    penultimate_features,
    remember_classes,
    soft_labels,
)
from dfq_jax.synthesis.terms.match import batch_var_gap, matched, squared_mean
from dfq_jax.values import bound


@recorded
def intraq(
    *,
    steps: int = 1000,
    batch: int = 256,
    learning_rate: float = 0.5,
    smallest: float = 0.5,
    crops: float = 0.5,
    lower: float = 0.05,
    upper: float = 0.8,
    target: float = 0.95,
) -> Recipe:
    """IntraQ's images, with the released values for CIFAR-10.

    The released scripts take `CIFAR_100` for CIFAR-100, and `IMAGENET` for ImageNet, which leaves
    the margin out and makes labels hard; `suited` says what a network gets by name.

    Args:
      steps: Adam steps.
      batch: images whose statistics are taken together.
      learning_rate: of Adam, in natural units; cut to a tenth on plateaus of 50 steps.
      smallest: least share of the area of a crop.
      crops: chance that a step shows a crop of each image, flipped every other time.
      lower: least cosine distance of an image to the mean of its class's earlier images.
      upper: largest one; with 0 and 2, which hold for all, nothing is remembered.
      target: least confidence in a label that an image may ask for.

    Returns:
      The recipe; batches are made one after the other, each looking back at all before.
    """
    optimizer = rated(adam_with_plateau, learning_rate, patience=50, floor=1e-4)
    cropped = compose(resized_crop(smallest=smallest), flip(together=False))
    recipe = Recipe(
        name="intraq",
        batch=batch,
        source=Source(gaussian),
        stages=(Stage(steps, optimizer, at_random(cropped, crops) if crops else unchanged),),
        terms=(
            Term("BNS", 1.0, matched(batch_var_gap, squared_mean, mean=True)),
            Term("SIL", 1.0, asked_confidence, True),
        ),
        condition=soft_labels(target),
    )
    return recipe if lower <= 0 and upper >= 2 else with_margin(recipe, lower, upper)


def suited(model: Model, given: Mapping[str, Any]) -> Recipe:
    """IntraQ with the released values for a network's images: CIFAR-10's, CIFAR-100's, ImageNet's.

    Of small images and other numbers of classes, CIFAR-10's up to 10, else CIFAR-100's.
    """
    if not is_small(model.contract):
        return intraq(**{**IMAGENET, **given})
    return intraq(**{**(CIFAR_100 if classes_of(model) > 10 else {}), **given})


IMAGENET: Mapping[str, Any] = {"lower": 0.0, "upper": 2.0, "target": 1.0}
CIFAR_100: Mapping[str, Any] = {"lower": 0.02, "upper": 1.0, "target": 0.6}
INTRAQ = Offer(intraq, suited, images=5120)


def with_margin(recipe: Recipe, lower: float, upper: float) -> Recipe:
    """The recipe with a memory of classes and the margin around their means."""
    margin = bound(margin_of_classes, lower, upper)
    return recipe._replace(
        terms=(*recipe.terms, Term("MDC", 1.0, margin, True)),
        watch=penultimate_features,
        memory=Memory(start=no_classes_yet, batch=remember_classes),
    )
