"""Zhu et al.: binary weights that learn from a generator which looks for disagreement.

Zhu et al. 2020, "Towards Accurate Quantization and Pruning via Data-free Knowledge Transfer". The
student keeps real kernels within `[-Delta, Delta]` and multiplies by `Delta sign(theta)`. Norms
begin with statistics of the binary network and keep them, where the paper's follow each batch.
`Delta` is each channel's own here (`training.binary.held_signs`); `delta=` is the paper's one
number. The weight of attention is ours.

    generator:  -KL(t, s) - beta R_a
    student:    KL(t, s) + beta R_a,   R_a = sum_l 1/b sum_b | a_S / |a_S| - a_T / |a_T| |_2
"""

import optax

from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.adversary import opposed
from dfq_jax.training.binary import held_signs, within_delta
from dfq_jax.training.generator import PLAIN_EPSILON, GeneratorKind, plain_noise
from dfq_jax.training.losses import (
    attention_transfer,
    block_outputs,
    distillation,
    symmetric_divergence,
)
from dfq_jax.training.method import GeneratedImages, Training, generating
from dfq_jax.training.student import StudentKind
from dfq_jax.values import bound

LESSONS = 10


def zhu(
    *,
    steps: int = 80_000,
    batch: int = 128,
    learning_rate: float = 2e-3,
    generator_rate: float = 1e-3,
    attention: float = 1.0,
    delta: float | None = None,
) -> Training:
    """Adversarial transfer to binary weights; levels of other bits are rounded to nearest.

    Args:
      steps: of the student, ten in a round (how many is not published).
      batch: images of a step.
      learning_rate: of the student's Adam.
      generator_rate: of the generator's.
      attention: beta, the weight of what blocks attend to.
      delta: what every binary weight is in size; None for each channel's mean.
    """
    kl, attended = distillation(), attention_transfer()
    terms = (Term("KL", 1.0, opposed(kl), True), Term("AT", attention, opposed(attended)))
    generated = GeneratedImages(
        kind=GeneratorKind(*plain_noise(), epsilon=PLAIN_EPSILON),
        terms=terms,
        optimizer=bound(adam_at, generator_rate),
        lessons=LESSONS,
        against=True,
    )
    return Training(
        name="zhu",
        steps=steps,
        batch=batch,
        student=StudentKind(live=True, own_norms=True, signs=held_signs(delta=delta)),
        images=generated,
        terms=(Term("KL", 1.0, kl, True), Term("AT", attention, attended)),
        optimizer=bound(adam_at, learning_rate),
        watch=block_outputs,
        project=within_delta(delta=delta),
        epoch=400 * LESSONS,
    )


def zhu_pruning(
    *,
    steps: int = 80_000,
    batch: int = 128,
    learning_rate: float = 1e-3,
    attention: float = 1.0,
    decay: float = 1e-5,
) -> Training:
    """The same for networks that lose channels: KL both ways, for `training.gates`.

    Args:
      steps: of the student, ten in a round.
      batch: images of a step.
      learning_rate: of the student's Adam, and of the generator's.
      attention: beta.
      decay: lambda, of squared weights; 1e-5 to 6e-5 in the paper, the more the smaller.
    """
    made = zhu(steps=steps, batch=batch, learning_rate=learning_rate, attention=attention)
    told = (Term("KL", 1.0, symmetric_divergence, True), made.terms[1])
    against = (Term("KL", 1.0, opposed(symmetric_divergence), True), *made_against(made)[1:])
    return generating(made, "zhu_pruning", terms=against)._replace(
        terms=told,
        student=StudentKind(live=True),
        optimizer=bound(decayed_adam_at, learning_rate, decay),
        project=None,
    )


def made_against(method: Training) -> tuple[Term, ...]:
    """The terms of a method's generator."""
    return method.images.terms if isinstance(method.images, GeneratedImages) else ()


def decayed_adam_at(rate: float, decay: float, factor: float) -> optax.GradientTransformation:
    """Adam at a rate that stays; slopes of `lambda |w|^2` are added first, as a loss has it."""
    return optax.chain(optax.add_decayed_weights(2 * decay), optax.adam(rate * factor))


def adam_at(rate: float, factor: float) -> optax.GradientTransformation:
    """Adam at a rate that stays."""
    return optax.adam(rate * factor)
