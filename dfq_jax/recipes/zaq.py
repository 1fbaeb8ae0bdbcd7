"""ZAQ: a generator that looks for images on which features of student and teacher disagree.

Liu et al. 2021, "Zero-shot Adversarial Quantization", with the values of released code for CIFAR.
That code compares features by attended maps, the paper by how channels relate, as here. Its
quantized activations end at the widest range met so far; here ranges are the extremes of images
made beforehand, and stay.

    student:    mean |t - s| + alpha CRM,   CRM = sum_l mean |G_T - G_S|
    generator:  -(mean |t - s| + alpha CRM) - beta mean |f|,   f the last features of the teacher
"""

import optax

from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.adversary import opposed, quiet
from dfq_jax.training.generator import PLAIN_EPSILON, GeneratorKind, plain_noise
from dfq_jax.training.losses import block_outputs, channel_relations, score_distance
from dfq_jax.training.method import GeneratedImages, Training, milestones, momentum
from dfq_jax.training.student import StudentKind

LESSONS = 5


def zaq(
    *,
    steps: int = 90_000,
    batch: int = 256,
    learning_rate: float = 0.1,
    alpha: float = 1.0,
    beta: float = 0.1,
    length: int = 256,
) -> Training:
    """ZAQ with its values for CIFAR: 300 epochs of 60 rounds, five lessons and a generator's step.

    Args:
      steps: of the student.
      batch: images of a step.
      learning_rate: of the student's SGD; both rates fall to a tenth after each third of the run.
      alpha: weight of the relations of channels.
      beta: weight of what images excite.
      length: of a code.
    """
    rounds = -(-steps // LESSONS)
    kind = GeneratorKind(*plain_noise(length=length), length=length, epsilon=PLAIN_EPSILON)
    terms = (
        Term("L1", 1.0, opposed(score_distance)),
        Term("CRM", alpha, opposed(channel_relations())),
        Term("activity", beta, quiet),
    )
    adam = milestones(optax.adam, 1e-3, thirds(rounds))
    return Training(
        name="zaq",
        steps=steps,
        batch=batch,
        student=StudentKind(live=True),
        images=GeneratedImages(kind, terms, adam, lessons=LESSONS, against=True),
        terms=(Term("L1", 1.0, score_distance), Term("CRM", alpha, channel_relations())),
        optimizer=momentum(learning_rate, decay=5e-4, drops=thirds(steps)),
        watch=block_outputs,
        epoch=60 * LESSONS,
    )


def thirds(steps: int) -> tuple[int, ...]:
    """Where the second and the last third of so many steps begin."""
    return steps // 3, steps * 2 // 3
