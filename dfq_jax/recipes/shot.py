"""SHOT: a classifier adapts to unlabelled images, and the data it was trained on are not needed.

Liang et al. 2020, "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for
Unsupervised Domain Adaptation", as released for digits and objects. The classifier stays, what
makes features learns: to be sure of every image, to find all classes among them, and to agree with
the labels of nearest centres, found anew each epoch. All weights share one rate, since networks of
the zoo have no bottleneck of their own to learn faster.

    L = mean H(p) - H(mean p) + 0.3 CE(p, pseudo label)

    adapted(model, images, shot(batch=64, epochs=15, count=len(images)), 15, key)
"""

from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.adaptation import EpochTraining
from dfq_jax.training.losses import label_loss
from dfq_jax.training.method import FixedImages, Training, nesterov
from dfq_jax.training.pseudo_labels import information_loss
from dfq_jax.training.student import StudentKind
from dfq_jax.values import bound


def shot(
    *,
    count: int,
    epochs: int = 15,
    batch: int = 64,
    learning_rate: float = 1e-3,
    pseudo: float = 0.3,
    batch_norms: bool = True,
) -> EpochTraining:
    """How a network learns in each epoch.

    Args:
      count: images there are; an epoch shows each once.
      epochs: in all, along which the rate falls.
      batch: images of a step.
      learning_rate: the first, a tenth of the paper's 1e-2, as it has for what makes features.
      pseudo: weight of the pseudo labels.
      batch_norms: norms take statistics of each batch, as in the paper, and those of all images at
        the end; else they keep theirs (ours): of few images, or batches of few, statistics can
        lose more than the weights make up for.
    """
    method = Training(
        name="shot",
        steps=max(count // batch, 1),
        batch=batch,
        student=StudentKind(live=True, batch_norms=batch_norms),
        images=FixedImages(),
        terms=(
            Term("IM", 1.0, information_loss, True),
            Term("pseudo", pseudo, label_loss, True),
        ),
        optimizer=nesterov(learning_rate, decay=1e-3),
    )
    return EpochTraining(method, bound(falling_pace, epochs))


def falling_pace(epochs: int, number: int) -> float:
    """`(1 + 10 progress)^-0.75` of the first rate, at the beginning of an epoch."""
    return (1 + 10 * number / epochs) ** -0.75
