"""The Knowledge Within: images whose statistics, read as Gaussians, diverge least from recorded.

Haroush et al. 2020, "The Knowledge Within: Methods for Data-Free Model Compression". With
statistics of a batch and recorded ones at every batch norm:

    BNS  = mean KL( N(mu, sigma^2) || N(m, s^2) )
    loss = BNS + 0.1 CE
"""

from collections.abc import Mapping
from typing import Any, Literal

import optax

from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import classes_of
from dfq_jax.optim.schedules import rated
from dfq_jax.synthesis.recipe import (
    Offer,
    Recipe,
    Source,
    Stage,
    nothing,
    random_labels,
    recorded,
)
from dfq_jax.synthesis.sources.augment import jitter, unchanged
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Term, label_entropy
from dfq_jax.synthesis.terms.classes import classes_needed
from dfq_jax.synthesis.terms.match import matched_kl

ImageScheme = Literal["bns", "inception", "both"]


@recorded
def knowledge_within(
    *,
    scheme: ImageScheme = "both",
    steps: int = 1000,
    batch: int = 128,
    learning_rate: float = 0.1,
    labels: float = 0.1,
    reach: int = 2,
    limit: float = 1e3,
) -> Recipe:
    """Images by batch-norm statistics and by classes, the paper's whole objective, or by either.

    The paper names no steps, batches or rates: these are ours, for images of CIFAR's size. For
    ImageNet twice the steps, and 64 to 128 images.

    Args:
      scheme: `both`; `bns`: only statistics, for networks that tell no classes apart; `inception`:
        only random labels. Labels come with jitter as the prior that makes images smooth.
      steps: Adam steps.
      batch: images whose statistics are taken together.
      learning_rate: of Adam, in natural units.
      labels: weight of the cross-entropy in `both`, relative to the divergence of a channel.
      reach: of the jitter where there are labels, in pixels.
      limit: divergence of a channel beyond which only its logarithm counts.

    Returns:
      The recipe.
    """
    stage = Stage(
        steps,
        rated(optax.adam, learning_rate),
        unchanged if scheme == "bns" else jitter(reach),
    )
    return Recipe(
        name="knowledge_within",
        batch=batch,
        source=Source(gaussian),
        stages=(stage,),
        terms=terms_of(scheme, labels, limit),
        prepare=classes_needed if scheme == "inception" else nothing,
        condition=random_labels,
        statistics=scheme != "inception",
    )


def suited(model: Model, given: Mapping[str, Any]) -> Recipe:
    """The whole objective; of statistics alone where a network tells no classes apart."""
    scheme: ImageScheme = "both" if classes_of(model) else "bns"
    return knowledge_within(scheme=scheme, **given)


KNOWLEDGE_WITHIN = Offer(knowledge_within, suited)


def terms_of(scheme: ImageScheme, labels: float, limit: float) -> tuple[Term, ...]:
    """The objective of a scheme; alone, labels have weight 1."""
    divergence = Term("BNS", 1.0, matched_kl(mean=True, limit=limit))
    weight = 1.0 if scheme == "inception" else labels
    classes = Term("CE", weight, label_entropy, True)
    return {"bns": (divergence,), "inception": (classes,), "both": (divergence, classes)}[scheme]
