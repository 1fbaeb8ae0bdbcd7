"""Data-free distillation: a teacher's knowledge in a network of another architecture.

The losses of Fang et al. 2022, "Up to 100x Faster Data-Free Knowledge Distillation" (Fast): images
are of a class for the teacher, have the statistics of its norms, and are such that the student
disagrees where it agreed; the student learns the teacher's soft words. A generator that learns all
along makes them, as in Choi et al. 2020: Fast's meta generator, which begins anew from the best
start for each batch, and its pool of old images are left out. Norms of the student follow each
batch; statistics are matched by squares, averaged over channels and layers, not by lengths.

    generator:  0.4 CE(t, argmax t) + 10 BN - 1.1 KL(t, s) where argmax s = argmax t
    student:    T^2 KL(t, s),  T = 20

    setup = TrainingSetup(images, held_out, key)
    student, report = distilled(initialised(net, key), teacher, dfkd(), setup)
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dfq_jax.numerics.softmax import divergences
from dfq_jax.synthesis.terms.base import Observed, Term, cross_entropy
from dfq_jax.synthesis.terms.match import batch_var_gap, matched, squared_mean
from dfq_jax.training.generator import PLAIN_EPSILON, GeneratorKind, plain_noise
from dfq_jax.training.losses import distillation
from dfq_jax.training.method import GeneratedImages, Training, cosine_sgd, to_zero
from dfq_jax.training.student import StudentKind


def dfkd(
    *,
    steps: int = 80_000,
    batch: int = 256,
    learning_rate: float = 0.2,
    warmup: int = 400,
    lessons: int = 5,
    sure: float = 0.4,
    statistics: float = 10.0,
    disagreement: float = 1.1,
    temperature: float = 20.0,
) -> Training:
    """Fast's losses and student on CIFAR-10, with a generator in turn.

    Args:
      steps: of the student's SGD, whose rate falls to 0 along a cosine.
      batch: images of a step.
      learning_rate: the first.
      warmup: rounds of the generator alone.
      lessons: steps of the student in a round.
      sure: weight of the class that the teacher sees (`oh`).
      statistics: weight of the norms' statistics (`bn`).
      disagreement: weight of what the student gets wrong (`adv`).
      temperature: of the student's KL.
    """
    rounds = warmup + -(-steps // lessons)
    kind = GeneratorKind(*plain_noise(length=256), length=256, epsilon=PLAIN_EPSILON)
    terms = (
        Term("sure", sure, own_label_entropy, True),
        Term("BN", statistics, matched(batch_var_gap, squared_mean, mean=True)),
        Term("disagreement", disagreement, agreed_gap, True),
    )
    adam = to_zero(optax.adam, 1e-3, rounds, b1=0.5)
    return Training(
        name="dfkd",
        steps=steps,
        batch=batch,
        student=StudentKind(live=True, batch_norms=True),
        images=GeneratedImages(kind, terms, adam, warmup, lessons=lessons, against=True),
        terms=(Term("KL", 1.0, distillation(temperature=temperature), True),),
        optimizer=cosine_sgd(learning_rate, steps, decay=1e-4),
    )


def own_label_entropy(observed: Observed) -> Float[Array, ""]:
    """CE of the teacher's scores to the class that it sees itself: images of one class each."""
    scores = observed.logits
    seen = jax.nn.one_hot(jnp.argmax(jax.lax.stop_gradient(scores), -1), scores.shape[-1])
    return cross_entropy(scores, seen)


def agreed_gap(observed: Observed) -> Float[Array, ""]:
    """-KL(t, s), averaged over the batch, of images on which both networks see the same class."""
    exact, rough = (a.logits for a in (observed.shared.teacher, observed.shared.student))
    same = (jnp.argmax(exact, -1) == jnp.argmax(rough, -1)).astype(jnp.float32)
    return -jnp.mean(jax.lax.stop_gradient(same) * divergences(exact, rough, 1.0))
