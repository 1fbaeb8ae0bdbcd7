"""What unlabelled images seem to be: labels by the nearest centre of features (SHOT)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Edge, Model
from dfq_jax.graph.query import last_weighted
from dfq_jax.training.losses import Lesson

SMALLEST = 1e-8
AT_ONCE = 64
"""Images of a forward pass."""


def classifier_of(model: Model) -> str:
    """The last layer, whose rows stand for classes.

    Raises:
      UnsupportedModelError: if there are several outputs, or none depends on a layer.
    """
    last = last_weighted(model.graph)
    if len(last) != 1:
        raise UnsupportedModelError(
            f"this needs a network with one classifier, and {len(last)} layers come last here."
        )
    return last[0]


def pseudo_labels(
    model: Model, images: Float[Array, "n h w c"], *, rounds: int = 1
) -> Int[Array, " n"]:
    """Labels of images: the class whose centre lies nearest, by cosine.

        c_k = sum_i p_ik f_i / sum_i p_ik,   f = features and a 1, of length 1

    Centres are then those of the labels, and images are labelled again.

    Args:
      model: a classifier.
      images: normalised, unlabelled.
      rounds: how often centres are found again from labels.

    Reference:
      Liang et al. 2020, "Do We Really Need to Access the Source Data? Source Hypothesis Transfer
      for Unsupervised Domain Adaptation" (SHOT), Eq. 4 to 6.
    """
    name = classifier_of(model)
    parts = [features_and_scores(model, name, images[i : i + AT_ONCE]) for i in starts(images)]
    features, scores = (jnp.concatenate(each) for each in zip(*parts, strict=True))
    return nearest_centres(features, scores, rounds)


def likely_classes(model: Model, images: Float[Array, "n h w c"]) -> Int[Array, " n"]:
    """The class of the largest score of each image, by batches as of `pseudo_labels`."""
    name = classifier_of(model)
    parts = [features_and_scores(model, name, images[i : i + AT_ONCE])[1] for i in starts(images)]
    return jnp.argmax(jnp.concatenate(parts), -1)


def starts(images: Float[Array, "n h w c"]) -> range:
    """Where batches begin."""
    return range(0, len(images), AT_ONCE)


@partial(jax.jit, static_argnums=1)
def features_and_scores(
    model: Model, name: str, images: Float[Array, "n h w c"]
) -> tuple[Float[Array, "n f"], Float[Array, "n classes"]]:
    """What the classifier reads, flat, and the probabilities of classes."""
    (scores, *_), taps = evaluate(model, images, taps=(Edge(name, 0),))
    return taps[Edge(name, 0)].reshape(len(images), -1), jax.nn.softmax(scores)


@partial(jax.jit, static_argnums=2)
def nearest_centres(
    features: Float[Array, "n f"], scores: Float[Array, "n classes"], rounds: int
) -> Int[Array, " n"]:
    """What `pseudo_labels` finds, from features and probabilities."""
    ones = jnp.ones((len(features), 1), features.dtype)
    unit = unit_length(jnp.concatenate([features, ones], 1))

    def labelled(weights: Float[Array, "n classes"]) -> Int[Array, " n"]:
        centres = weights.T @ unit / (jnp.sum(weights, 0)[:, None] + SMALLEST)
        near = unit @ unit_length(centres).T
        return jnp.argmax(jnp.where(jnp.sum(weights, 0) > 0, near, -jnp.inf), -1)

    found = labelled(scores)
    for _ in range(rounds):
        found = labelled(jax.nn.one_hot(found, scores.shape[-1]))
    return found


def unit_length(x: Float[Array, "n f"]) -> Float[Array, "n f"]:
    """Every row as a direction."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), SMALLEST)


def information_loss(lesson: Lesson) -> Float[Array, ""]:
    """Information maximization: sure of every image, and all classes as often as others.

        L = 1/b sum_b H(p_b) - H(mean_b p_b),   H(p) = -sum_k p_k log(p_k + 1e-5)

    Reference:
      Liang et al. 2020 (SHOT), Eq. 2 and 3, as released.
    """
    p = jax.nn.softmax(lesson.student.logits)
    entropy = lambda q: -jnp.sum(q * jnp.log(q + 1e-5), -1)
    return jnp.mean(entropy(p)) - entropy(jnp.mean(p, 0))
