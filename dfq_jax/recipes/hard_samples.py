"""HAST's images: those whose class is hard to tell count most.

Li et al. 2023, "Hard Sample Matters a Lot in Zero-Shot Quantization" (HAST), as released:

    BNS = mean_l mean((m - mu)^2) + mean((v - sigma^2)^2)
    HSE = 1/b sum_b (1 - p_y)^gamma CE_b,   p = softmax(logits)

    loss = BNS + beta HSE
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from dfq_jax.graph.graph import Model
from dfq_jax.optim.schedules import adam_with_plateau, rated
from dfq_jax.recipes.qat import CROPPED
from dfq_jax.recipes.sizes import is_small
from dfq_jax.synthesis.recipe import Offer, Recipe, Source, Stage, random_labels, recorded
from dfq_jax.synthesis.sources.augment import at_random, unchanged
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Observed, Term
from dfq_jax.synthesis.terms.classes import focal_cross_entropy
from dfq_jax.synthesis.terms.match import batch_var_gap, matched, squared_mean
from dfq_jax.values import bound


@recorded
def hard_samples(
    *,
    steps: int = 1000,
    batch: int = 256,
    learning_rate: float = 0.5,
    hardness: float = 10.0,
    exponent: float = 2.0,
    crops: float = 0.0,
) -> Recipe:
    """Hard samples, with the released values for CIFAR.

    For ImageNet the released script takes `hardness=0.1, exponent=0.5, crops=0.5`.

    Args:
      steps: Adam steps.
      batch: images whose statistics are taken together.
      learning_rate: of Adam, in natural units; cut to a tenth on plateaus of 50 steps.
      hardness: beta, the weight of the classes.
      exponent: gamma, by which hard images count more.
      crops: chance that a step shows a crop of each image.
    """
    optimizer = rated(adam_with_plateau, learning_rate, patience=50, floor=1e-4)
    augment = at_random(CROPPED.augment, crops) if crops else unchanged
    return Recipe(
        name="hard_samples",
        batch=batch,
        source=Source(gaussian),
        stages=(Stage(steps, optimizer, augment),),
        terms=(
            Term("BNS", 1.0, matched(batch_var_gap, squared_mean, mean=True)),
            Term("HSE", hardness, bound(hard_entropy, exponent), True),
        ),
        condition=random_labels,
    )


def suited(model: Model, given: Mapping[str, Any]) -> Recipe:
    """Hard samples with the released values for images of a network's size."""
    large = {"hardness": 0.1, "exponent": 0.5, "crops": 0.5}
    return hard_samples(**({} if is_small(model.contract) else large), **given)


HARD_SAMPLES = Offer(hard_samples, suited, images=5120)


def hard_entropy(exponent: float, observed: Observed) -> Float[Array, ""]:
    """HSE: cross-entropy weighted by how hard an image is."""
    return focal_cross_entropy(observed.logits, observed.labels, exponent)
