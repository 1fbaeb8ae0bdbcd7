"""Accurate activation clipping: images that excite a network as real ones do, to end ranges at.

He et al. 2022, "Data-Free Quantization with Accurate Activation Clipping and Adaptive Batch
Normalization". Images that match batch-norm statistics do not reach the peaks of activations;
those with strong responses of a class do. Give them to `recipes/dfq.py` as `peaks`.

    loss = CE - response logit_label + statistics BNS + variation TV
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dfq_jax.optim.schedules import rated
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, balanced_labels, recorded
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Observed, Term, label_entropy, natural_variation
from dfq_jax.synthesis.terms.match import batch_norm_match


@recorded
def aac(
    *,
    steps: int = 500,
    batch: int = 64,
    learning_rate: float = 0.1,
    response: float = 0.1,
    statistics: float = 0.1,
    variation: float = 1e-3,
) -> Recipe:
    """Images with strong responses of their classes.

    The paper's settings are not public; these, and the form of the objective, are ours.

    Args:
      steps: Adam steps.
      batch: images optimised together.
      learning_rate: of Adam, in natural units.
      response: weight of the mean score of each image's class, not bounded as the entropy is.
      statistics: weight of batch-norm matching.
      variation: weight of the total variation.

    Returns:
      The recipe.
    """
    terms = (
        Term("CE", 1.0, label_entropy, True),
        Term("response", -response, class_response, True),
        Term("BNS", statistics, batch_norm_match),
        Term("TV", variation, natural_variation),
    )
    return Recipe(
        name="aac",
        batch=batch,
        source=Source(gaussian),
        stages=(Stage(steps, rated(optax.adam, learning_rate)),),
        terms=terms,
        condition=balanced_labels,
        evidence="peaks",
    )


def class_response(observed: Observed) -> Float[Array, ""]:
    """Mean score of each image's class."""
    return jnp.mean(jnp.sum(observed.logits * observed.labels, axis=1))
