"""Choi et al.: a generator against the student, held to the teacher's statistics.

Choi et al. 2020, "Data-Free Network Quantization With Adversarial Knowledge Distillation". No
official code exists: values are those of an independent implementation, of CIFAR, and how weights
and activations are quantized is not known: as in GDFQ here, kernels end at their extremes at every
step, ranges of activations are those of images made beforehand. One generator and one student; the
paper's several of each are left out. Batch norms of the student keep their statistics, where that
implementation takes those of each batch.

    generator:  -KL(t, s) + alpha (L_bn + L_ins + L_bal)
    L_bn  = sum over layers and channels of KL(N(m, d^2) || N(mu, sigma^2))
    L_ins = -1/b sum_b sum_k p log p,   L_bal = sum_k q_k log q_k,  q the mean of p over images
    student:    KL(t, s)
"""

import optax

from dfq_jax.synthesis.terms.base import Term
from dfq_jax.synthesis.terms.match import matched_kl
from dfq_jax.training.adversary import imbalance, opposed, own_entropy
from dfq_jax.training.generator import PLAIN_EPSILON, GeneratorKind, plain_noise
from dfq_jax.training.losses import distillation
from dfq_jax.training.method import GeneratedImages, Training, to_zero
from dfq_jax.training.student import StudentKind


def choi(
    *,
    steps: int = 800_000,
    batch: int = 256,
    learning_rate: float = 0.1,
    warmup: int = 20_000,
    lessons: int = 10,
    alpha: float = 0.01,
    length: int = 512,
    channels: tuple[int, ...] = (512, 256, 128, 64),
) -> Training:
    """Adversarial distillation: 200 epochs of 400 rounds, a generator's step and ten lessons each.

    Args:
      steps: of the student.
      batch: images of a step.
      learning_rate: of the student's SGD, which falls to 0 along a cosine.
      warmup: rounds of the generator alone, on its statistics.
      lessons: steps of the student in a round.
      alpha: weight of statistics, entropy and balance.
      length: of a code.
      channels: of the generator's feature maps.
    """
    rounds = warmup + -(-steps // lessons)
    kind = GeneratorKind(
        *plain_noise(length=length),
        length=length,
        channels=channels,
        leak=0.0,
        epsilon=PLAIN_EPSILON,
    )
    terms = (
        Term("KL", 1.0, opposed(distillation(), after=warmup), True),
        Term("BN", alpha, matched_kl(reverse=True)),
        Term("entropy", alpha, own_entropy, True),
        Term("balance", alpha, imbalance, True),
    )
    adam = to_zero(optax.adam, 1e-3, rounds, b1=0.5)
    return Training(
        name="choi",
        steps=steps,
        batch=batch,
        student=StudentKind(live=True),
        images=GeneratedImages(kind, terms, adam, warmup, lessons=lessons, against=True),
        terms=(Term("KL", 1.0, distillation(), True),),
        optimizer=to_zero(optax.sgd, learning_rate, steps, momentum=0.9, nesterov=True),
        epoch=400 * lessons,
    )
