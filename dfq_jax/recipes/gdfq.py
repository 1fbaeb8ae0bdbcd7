"""GDFQ: a generator and a student in turn.

Xu et al. 2020, "Generative Low-bitwidth Data Free Quantization", as released. The generator makes
images of labels that the teacher recognises, with the statistics of its batch norms; the student
learns what the teacher says of them, and the labels.

    generator:  CE(t, y) + 0.1 BNS,   BNS = 1/L sum_l mean (m - mu)^2 + mean (v - sigma^2)^2
    student:    CE(s, y) + alpha KL,  KL = T^2 / (b K) sum p log p / q,  T = 20

Ranges of activations follow the generator's images in its first four epochs alone, and then stay.
The student is shown images of the generator as it is after its step, of codes of their own;
released code has it learn from the batch that the generator learned from. Which tensors are of few
bits is the plan's: `layers="zsq_all_rectified"` is as released.
"""

import optax

from dfq_jax.synthesis.terms.base import Term, label_entropy
from dfq_jax.synthesis.terms.match import batch_var_gap, matched, squared_mean
from dfq_jax.training.generator import GeneratorKind, labelled_noise, plain_noise
from dfq_jax.training.losses import distillation, label_loss
from dfq_jax.training.method import GeneratedImages, Training, milestones, nesterov
from dfq_jax.training.student import StudentKind
from dfq_jax.training.tracking import Tracking

EPOCH = 200
TRACKED = 4 * EPOCH
"""Steps in which ranges follow, however long the generator plays alone."""
GENERATOR_TERMS = (
    Term("CE", 1.0, label_entropy, True),
    Term("BNS", 0.1, matched(batch_var_gap, squared_mean, mean=True)),
)
GDFQ_GENERATOR = GeneratorKind(*labelled_noise())
GDFQ_BY_CLASS = GeneratorKind(*plain_noise(), by_class=True)


def gdfq(
    *,
    steps: int = 79_200,
    batch: int = 200,
    learning_rate: float = 1e-4,
    warmup: int = 800,
    alpha: float = 1.0,
    temperature: float = 20.0,
    kind: GeneratorKind = GDFQ_GENERATOR,
) -> Training:
    """GDFQ with its values for CIFAR: 400 epochs of 200 steps, in 4 of which the student rests.

    For ImageNet the released scripts take `batch=16, learning_rate=1e-6, warmup=10_000,
    kind=GDFQ_BY_CLASS`.

    Args:
      steps: of the student.
      batch: images of a step.
      learning_rate: of the student's SGD; both rates fall to a tenth at every quarter of the run,
        the student's of its own steps, where the generator plays alone for a quarter or longer.
      warmup: steps of the generator alone.
      alpha: weight of the KL, which is averaged over all entries, as released.
      temperature: of the KL.
      kind: of generator; `GDFQ_BY_CLASS` is told labels by its norms, not its codes.
    """
    rounds = steps + warmup
    adam = milestones(optax.adam, 1e-3, quarters(rounds), b1=0.5)
    late = tuple(drop - warmup for drop in quarters(rounds))
    drops = late if late[0] > 0 else quarters(steps)
    generated = GeneratedImages(kind, GENERATOR_TERMS, adam, warmup)
    kl = distillation(temperature=temperature, reduction="entries")
    return Training(
        name="gdfq",
        steps=steps,
        batch=batch,
        student=StudentKind(live=True, tracking=Tracking(min(max(warmup, 1), TRACKED))),
        images=generated,
        terms=(Term("CE", 1.0, label_loss, True), Term("KL", alpha, kl, True)),
        optimizer=nesterov(learning_rate, decay=1e-4, drops=drops),
        epoch=EPOCH,
    )


def quarters(steps: int) -> tuple[int, ...]:
    """Where the second, third and last quarter of so many steps begin."""
    return tuple(steps * k // 4 for k in (1, 2, 3))
