"""Loss terms of image synthesis: pure functions of one `Observed`, composed by weighted sums."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dfq_jax.synthesis.terms.targets import Stats, Targets

EPS = 1e-6
"""Inside the square roots of norms, whose slope at 0 would not be finite."""


class Observed(NamedTuple):
    """Everything a term may look at.

    Attributes:
      images: what the network saw, normalised, Float[b h w c].
      natural: the same in units where natural images have mean 0 and std 1 per channel.
      logits: the first output: Float[b classes] for a classifier.
      stats: {batch norm: per-sample statistics of its input}.
      taps: {name: tensor the recipe watches}.
      targets: {batch norm: recorded moments}.
      shared: what the recipe's `prepare` returned, e.g. tolerances.
      labels: what the recipe's `condition` returned for this batch, e.g. one-hot classes.
      memory: what the recipe remembers of earlier steps or batches.
      turn: whose turn it is, where batches take turns; else 0.
      step: steps taken so far in this stage.
      key: fresh randomness for this step.
    """

    images: Float[Array, "b h w c"]
    natural: Float[Array, "b h w c"]
    logits: Float[Array, "b ..."]
    stats: Mapping[str, Stats]
    taps: Mapping[str, Array]
    targets: Targets
    shared: Any
    labels: Any
    memory: Any
    turn: Int[Array, ""]
    step: Int[Array, ""]
    key: Key[Array, ""]


class Term(NamedTuple):
    """One part of an objective.

    Attributes:
      name: what reports call it.
      weight: its factor.
      fn: its value, of what an objective sees: `Observed` in synthesis, a `Lesson` in training.
      classes: whether it needs the scores of classes, which not every network has.
    """

    name: str
    weight: float
    fn: Callable[[Any], Float[Array, ""]]
    classes: bool = False


def weighted(
    terms: Sequence[Term], observed: Any
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of `terms`, and each term unweighted under its name."""
    parts = {t.name: t.fn(observed) for t in terms}
    return sum((t.weight * parts[t.name] for t in terms), jnp.zeros(())), parts


def image_statistics(observed: Observed) -> Float[Array, ""]:
    """Squared distance of each image's channel mean and std to 0 and 1, natural units.

    Reference:
      ZeroQ, released code: the input counts as one more layer with mean 0 and std 1.
    """
    mean, std = image_moments(observed.natural)
    return jnp.mean(jnp.sum(mean**2 + (std - 1) ** 2, axis=1))


def image_moments(
    images: Float[Array, "b h w c"],
) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """Mean and unbiased deviation of each image and channel, `EPS` inside the root."""
    mean = jnp.mean(images, (1, 2), keepdims=True)
    var = jnp.sum((images - mean) ** 2, (1, 2)) / max(images.shape[1] * images.shape[2] - 1, 1)
    return mean[:, 0, 0], jnp.sqrt(var + EPS)


def natural_correlation(observed: Observed) -> Float[Array, ""]:
    """`correlation` in natural units."""
    return correlation(observed.natural)


def correlation(images: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """`||S - I||_F^2 / b` for the cosine similarity matrix S of flattened images.

    Equals the mean squared distance of S's eigenvalues from 1, those of independent noise.

    Reference:
      Qin et al. 2023, "Diverse Sample Generation", sample correlation inhibition; this is the
      closed form of its magnitude part.
    """
    similarity = similarities(images) - jnp.eye(images.shape[0])
    return jnp.sum(similarity**2) / images.shape[0]


def similarities(images: Float[Array, "b h w c"]) -> Float[Array, "b b"]:
    """Cosines between flattened images."""
    flat = images.reshape(images.shape[0], -1)
    unit = flat * jax.lax.rsqrt(jnp.sum(flat**2, axis=1, keepdims=True) + EPS)
    return unit @ unit.T


def cross_entropy(
    logits: Float[Array, "b classes"], labels: Float[Array, "b classes"]
) -> Float[Array, ""]:
    """Mean cross-entropy to one-hot or soft labels."""
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=1))


def label_entropy(observed: Observed) -> Float[Array, ""]:
    """`cross_entropy` of the scores to the labels of the batch."""
    return cross_entropy(observed.logits, observed.labels)


def total_variation(images: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Sum of the l2 norms, over the whole batch, of differences in four directions.

    Reference:
      Yin et al. 2020, "Dreaming to Distill" (the l2 form of its code).
    """
    down = images[:, 1:] - images[:, :-1]
    right = images[:, :, 1:] - images[:, :, :-1]
    diagonal = images[:, 1:, 1:] - images[:, :-1, :-1]
    other = images[:, 1:, :-1] - images[:, :-1, 1:]
    norm = lambda d: jnp.sqrt(jnp.sum(d**2) + EPS)
    return norm(down) + norm(right) + norm(diagonal) + norm(other)


def natural_variation(observed: Observed) -> Float[Array, ""]:
    """`total_variation` in natural units."""
    return total_variation(observed.natural)


def natural_norm(observed: Observed) -> Float[Array, ""]:
    """`image_norm` in natural units."""
    return image_norm(observed.natural)


def image_norm(images: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Mean l2 norm of an image (Yin et al. 2020)."""
    return jnp.mean(jnp.sqrt(jnp.sum(images**2, axis=(1, 2, 3)) + EPS))
