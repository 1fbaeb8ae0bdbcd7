"""Our composition: images a network is sure about, with the statistics it was trained on.

Batch statistics (DeepInversion's granularity) in units of each channel's own deviation, so that
deep and shallow, wide and narrow layers pull equally; random class labels, so that late features
are as strong as real ones (matching every sample to the mean leaves them flat and clips real
images later); pixels that a camera could deliver; a start with the 1/f spectrum of natural images;
a cosine schedule, so that a few dozen steps suffice.
"""

import optax

from dfq_jax.synthesis.match import relative_batch_match
from dfq_jax.synthesis.pixels import pink
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, random_labels
from dfq_jax.synthesis.terms import Term, cross_entropy


def best(
    *, steps: int = 200, batch: int = 64, learning_rate: float = 0.1, labels: float = 1.0
) -> Recipe:
    """Class-conditional images matched in relative batch statistics.

    Args:
      steps: Adam steps.
      batch: images whose statistics are taken together.
      learning_rate: initial, in natural units; falls to 0 along a cosine.
      labels: weight of the cross-entropy to random labels.

    Returns:
      The recipe.
    """
    optimizer = lambda scale: optax.adam(optax.cosine_decay_schedule(learning_rate * scale, steps))
    return Recipe(
        name="best",
        settings={"learning_rate": learning_rate, "labels": labels},
        batch=batch,
        source=Source(pink),
        stages=(Stage(steps, optimizer),),
        terms=(
            Term("batch norm", 1.0, relative_batch_match),
            Term("labels", labels, lambda o: cross_entropy(o.logits, o.labels), True),
        ),
        condition=random_labels,
        bounded=True,
    )
