"""QuantFace: a network of embeddings learns to point where the float network points.

Boutros et al. 2022, "QuantFace: Towards Lightweight Face Recognition by Synthetic Data Low-bit
Quantization", as released, but that its faces come from a generator that was trained on faces: here
they are ours, or images given, and there are no labels either way.

    L = 1 / (b D) sum_b |t / |t| - s / |s||^2 = 2 / (b D) sum_b (1 - cos(t, s))

Ranges of activations widen to the extremes of the first 300 steps and then stay. Batch norms keep
their statistics, where released code lets them follow the images.
"""

import optax

from dfq_jax.recipes.best_training import IMAGES
from dfq_jax.synthesis.sources.augment import flip
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.losses import embedding_loss
from dfq_jax.training.method import AtFactor, FixedImages, Training, nesterov
from dfq_jax.training.student import StudentKind
from dfq_jax.training.tracking import Tracking
from dfq_jax.values import bound

RANGED = 300
"""Steps in which ranges widen."""
EPOCH = 1031
"""Whole batches of 512 in its 528,227 faces."""
BATCH = 512
"""Images of a step on its four devices, for which its rate is meant."""


def quantface(
    *,
    steps: int = 11 * EPOCH,
    batch: int = BATCH,
    learning_rate: float = 0.1,
    longest: float = 5.0,
) -> Training:
    """QuantFace with its values: 11 epochs.

    Args:
      steps: of SGD; its rate falls to a tenth for the last eleventh of them.
      batch: images of a step.
      learning_rate: the first, of batches of 512; for others in proportion.
      longest: slopes of all variables together are no longer than this.
    """
    drops = (max(steps * 10 // 11, 1),)
    descending = nesterov(learning_rate * batch / BATCH, decay=5e-4, drops=drops)
    return Training(
        name="quantface",
        steps=steps,
        batch=batch,
        student=StudentKind(live=True, tracking=Tracking(RANGED, momentum=None)),
        images=FixedImages(flip(together=False)),
        terms=(Term("MSE", 1.0, embedding_loss),),
        optimizer=bound(clipped_before, longest, descending),
        epoch=EPOCH,
        recipe="best_unlabelled",
        n=IMAGES,
        directions=True,
    )


def clipped_before(
    longest: float, optimizer: AtFactor, factor: float
) -> optax.GradientTransformation:
    """What an optimizer makes of slopes that are no longer than so much."""
    return optax.chain(optax.clip_by_global_norm(longest), optimizer(factor))
