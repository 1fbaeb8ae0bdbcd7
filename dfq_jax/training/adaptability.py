"""Terms about how far two networks are apart, for a generator that keeps that within bounds.

Qian et al. 2023, "Adaptive Data-Free Quantization" and "Rethinking Data-Free Quantization as a
Zero-Sum Game". A generator's terms find both answers in the `Lesson` that they share.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.synthesis.terms.base import Observed, cross_entropy
from dfq_jax.training.losses import Lesson
from dfq_jax.values import Bound, bound


def disagreed_labels(observed: Observed) -> Float[Array, ""]:
    """CE of `t - s` to the labels: images whose class the student misses."""
    return cross_entropy(apart(observed.shared), observed.labels)


def agreed_labels(observed: Observed) -> Float[Array, ""]:
    """CE of `t + s` to the labels: images that both networks recognise."""
    lesson: Lesson = observed.shared
    return cross_entropy(lesson.teacher.logits + lesson.student.logits, observed.labels)


def kept_between(least: float, most: float) -> Bound[Array]:
    """`[least - H]+ + [H - most]+` of the mean entropy of `softmax(t - s)` over its largest."""
    return bound(outside, least, most)


def outside(least: float, most: float, observed: Observed) -> Float[Array, ""]:
    """What `kept_between` computes."""
    scores = apart(observed.shared)
    entropy = jnp.mean(entropies(scores)) / jnp.log(jnp.float32(scores.shape[-1]))
    return jax.nn.relu(least - entropy) + jax.nn.relu(entropy - most)


def even_gap(*, temperature: float) -> Bound[Array]:
    """`-mean H(softmax((t - s) / T))`: least where the networks differ by the same in all classes.

    A loss of the student's.
    """
    return bound(unevenness, temperature)


def unevenness(temperature: float, lesson: Lesson) -> Float[Array, ""]:
    """What `even_gap` computes."""
    return -jnp.mean(entropies(apart(lesson) / temperature))


def apart(lesson: Lesson) -> Float[Array, "b classes"]:
    """Scores that the teacher has more than the student."""
    return lesson.teacher.logits - lesson.student.logits


def entropies(scores: Float[Array, "b classes"]) -> Float[Array, " b"]:
    """Of the probabilities of each image, in nats."""
    log_p = jax.nn.log_softmax(scores)
    return -jnp.sum(jnp.exp(log_p) * log_p, -1)
