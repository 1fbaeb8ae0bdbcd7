"""Terms about classes: how sure of a label, how far from a class, how divided two networks are."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import Linear
from dfq_jax.graph.query import classes_of, last_weighted
from dfq_jax.synthesis.recipe import random_labels
from dfq_jax.synthesis.terms.base import Observed
from dfq_jax.synthesis.terms.targets import Targets
from dfq_jax.values import Bound, bound

EPS = 1e-6
"""Least product of two lengths, least count of images, and least doubt about a label."""


class SoftLabels(NamedTuple):
    """What each image of a batch should show, and how sure of it the network should be.

    Attributes:
      labels: one-hot.
      confidence: wanted probability of the label, in (0, 1].
    """

    labels: Float[Array, "b classes"]
    confidence: Float[Array, " b"]


def soft_labels(least: float) -> Bound[SoftLabels]:
    """A `condition`: random labels; half of the confidences uniform from `least` to 1, half 1.

    Reference:
      Zhong et al. 2022, "IntraQ" (soft inception loss), as released.
    """
    return bound(softly_labelled, least)


def softly_labelled(least: float, key: Key[Array, ""], size: int, classes: int) -> SoftLabels:
    """What `soft_labels` gives for one batch."""
    label_key, coin_key, soft_key = jax.random.split(key, 3)
    soft = jax.random.uniform(soft_key, (size,), minval=least, maxval=1.0)
    coin = jax.random.bernoulli(coin_key, 0.5, (size,))
    return SoftLabels(random_labels(label_key, size, classes), jnp.where(coin, soft, 1.0))


def soft_inception(logits: Float[Array, "b classes"], wanted: SoftLabels) -> Float[Array, ""]:
    """Mean squared error of the label's probability; how the rest is spread does not count.

    Reference:
      Zhong et al. 2022, "IntraQ" (soft inception loss), as released.
    """
    found = jnp.sum(wanted.labels * jax.nn.softmax(logits), axis=1)
    return jnp.mean((found - wanted.confidence) ** 2)


def focal_cross_entropy(
    logits: Float[Array, "b classes"],
    labels: Float[Array, "b classes"],
    gamma: float,
    *,
    stop_grad_weight: bool = False,
) -> Float[Array, ""]:
    """Cross-entropy that counts an image the less, the surer the network is of its label.

    Args:
      logits: of the network.
      labels: one-hot.
      gamma: 0 gives cross-entropy; HAST takes 2 for CIFAR and 0.5 for ImageNet.
      stop_grad_weight: no gradient through the factor, which HAST's code lets pass.

    Returns:
      `mean_b (1 - p_y)^gamma CE_b`, with a finite slope at `p_y = 1`.

    Reference:
      Li et al. 2023, "Hard Sample Matters a Lot in Zero-Shot Quantization" (HAST).
    """
    each = -jnp.sum(labels * jax.nn.log_softmax(logits), axis=1)
    sure = jnp.sum(labels * jax.nn.softmax(logits), axis=1)
    factor = (1 - jnp.minimum(sure, 1 - EPS)) ** gamma
    return jnp.mean((jax.lax.stop_gradient(factor) if stop_grad_weight else factor) * each)


def competition(
    student: Float[Array, "b classes"],
    teacher: Float[Array, "b classes"],
    *,
    temperature: float = 3.0,
    exchanged: bool = False,
) -> Float[Array, ""]:
    """1 less the Jensen-Shannon divergence of two networks' probabilities, batch mean.

    Args:
      student: logits.
      teacher: logits.
      temperature: divides both.
      exchanged: the divergence as released, from the mean of both to each instead of from each to
        the mean, with all probabilities kept to 0.01..0.99 and the divergence to 0..1.

    Returns:
      A value in [0, 1]; 1 where the networks agree.

    Reference:
      Yin et al. 2020, "Dreaming to Distill" (adaptive DeepInversion, R_compete).
    """
    p, q = (jax.nn.softmax(v / temperature) for v in (student, teacher))
    if exchanged:
        p, q, mean = (jnp.clip(v, 0.01, 0.99) for v in (p, q, (p + q) / 2))
        apart = 0.5 * jnp.sum(mean * (2 * jnp.log(mean) - jnp.log(p) - jnp.log(q)), axis=1)
        return 1 - jnp.clip(jnp.mean(apart), 0.0, 1.0)
    log_p, log_q = (jax.nn.log_softmax(v / temperature) for v in (student, teacher))
    log_mean = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    return 1 - 0.5 * jnp.mean(jnp.sum(p * (log_p - log_mean) + q * (log_q - log_mean), axis=1))


class ClassMemory(NamedTuple):
    """Features of the images finished so far, class by class."""

    sums: Float[Array, "classes width"]
    counts: Float[Array, " classes"]


FEATURES = "features"
"""Under which name a recipe that remembers classes watches the features."""


def no_classes_yet(
    targets: Targets, turns: int, classes: int, features: Mapping[str, int]
) -> ClassMemory:
    """A memory's `start`: nothing remembered of any class."""
    del targets, turns
    return ClassMemory(jnp.zeros((classes, features[FEATURES])), jnp.zeros(classes))


def with_images(
    memory: ClassMemory, features: Float[Array, "b width"], labels: Float[Array, "b classes"]
) -> ClassMemory:
    """The memory with the images of one more batch."""
    own, classes = jnp.argmax(labels, axis=1), labels.shape[1]
    total = lambda v: jax.ops.segment_sum(v, own, num_segments=classes)
    features = jnp.asarray(features, jnp.float32)
    return ClassMemory(
        memory.sums + total(features), memory.counts + total(jnp.ones(len(features)))
    )


def class_distance(
    features: Float[Array, "b width"], labels: Float[Array, "b classes"], memory: ClassMemory
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Cosine distance of each image to the mean of its class's earlier images.

    Args:
      features: of the images.
      labels: one-hot.
      memory: the earlier images.

    Returns:
      Distances in [0, 2], and 1 where the class has earlier images, else 0.
    """
    centre = labels @ (memory.sums / jnp.maximum(memory.counts, 1.0)[:, None])
    features = jnp.asarray(features, jnp.float32)
    dot = jnp.sum(features * centre, axis=1)
    lengths = jnp.sum(features**2, axis=1) * jnp.sum(centre**2, axis=1)
    known = (labels @ memory.counts > 0).astype(jnp.float32)
    return 1 - dot * jax.lax.rsqrt(jnp.maximum(lengths, EPS**2)), known


def class_margin(
    features: Float[Array, "b width"],
    labels: Float[Array, "b classes"],
    memory: ClassMemory,
    lower: float,
    upper: float,
) -> Float[Array, ""]:
    """How far images are from a distance between `lower` and `upper` to their class's mean.

    Args:
      features: of the images.
      labels: one-hot.
      memory: the images that make up the means.
      lower: least cosine distance that costs nothing.
      upper: largest one.

    Returns:
      `[lower - distance]_+ + [distance - upper]_+`, mean over images whose class has a mean.

    Reference:
      Zhong et al. 2022, "IntraQ" (marginal distance constraint).
    """
    distance, known = class_distance(features, labels, memory)
    outside = jax.nn.relu(lower - distance) + jax.nn.relu(distance - upper)
    return jnp.sum(known * outside) / (jnp.sum(known) + EPS)


def penultimate(graph: Graph) -> str:
    """The final linear layer, whose input are a classifier's features.

    Raises:
      UnsupportedModelError: if the last layer with weights is no linear layer.
    """
    last = last_weighted(graph)
    if not last or not isinstance(graph[last[0]].op, Linear):
        found = f"its last layer with weights is {graph[last[0]]}" if last else "it has no weights"
        raise UnsupportedModelError(
            f"class features are not available for this network: it lacks a final linear layer to "
            f"read them ({found}). Choose a method that does without, or widen its class margin "
            "to 0..2."
        )
    return last[0]


def asked_confidence(observed: Observed) -> Float[Array, ""]:
    """SIL: how far each image is from the confidence it asks for."""
    return soft_inception(observed.logits, observed.labels)


def penultimate_features(graph: Graph) -> dict[str, str]:
    """What the last layer reads."""
    return {FEATURES: penultimate(graph)}


def margin_of_classes(lower: float, upper: float, o: Observed) -> Float[Array, ""]:
    """MDC: how far features are beyond the margin around the means of their classes."""
    return class_margin(o.taps[FEATURES], o.labels.labels, o.memory, lower, upper)


def remember_classes(o: Observed) -> PyTree:
    """The means of classes with the features of a finished batch."""
    return with_images(o.memory, o.taps[FEATURES], o.labels.labels)


def classes_needed(model: Model, targets: Targets, key: Key[Array, ""]) -> tuple[()]:
    """Raises UnsupportedModelError for a network that is no classifier; shares nothing."""
    del targets, key
    if not classes_of(model):
        raise UnsupportedModelError(
            "knowledge_within: the network tells no classes apart, which is all that "
            'scheme="inception" asks of images. Use scheme="bns".'
        )
    return ()
