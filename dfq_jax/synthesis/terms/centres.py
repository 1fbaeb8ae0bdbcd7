"""Statistics of each class: where the samples of a class gather in the deep layers.

A centre is two vectors for every class and deep batch norm: a mean, and a spread, which is a
deviation or a variance as the moments it was made from. Images are drawn to the centre of their
class (`centre_distance`) or to a point drawn around it (`distorted`).
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dfq_jax.graph.graph import Model
from dfq_jax.synthesis.terms.base import EPS, Observed
from dfq_jax.synthesis.terms.match import batch_moments, recorded_std, squared_mean, usable_gap
from dfq_jax.synthesis.terms.targets import Stats, Targets, batch_norm_targets, observe


class Centre(NamedTuple):
    """A mean and a spread (deviation or variance) per channel, for each class or sample."""

    mean: Float[Array, "... c"]
    spread: Float[Array, "... c"]


Centres = Mapping[str, Centre]
"""{deep batch norm: its centres}."""
MomentsOf = Callable[[Stats], tuple[Float[Array, "... c"], Float[Array, "... c"]]]
"""Statistics of the samples -> what is compared with a centre."""


def deep_layers(layers: Sequence[str]) -> tuple[str, ...]:
    """The second half of the layers and a few before it, in which classes part.

    Args:
      layers: names in execution order, at least one.

    Returns:
      Those from number `floor((L + 1) / 2) - 2` on, counted from 0.

    Reference:
      Zhong et al. 2022, "Fine-grained Data Distribution Alignment for Post-Training
      Quantization", and Gao et al. 2022, "ClusterQ", released codes.
    """
    return tuple(layers[max((len(layers) + 1) // 2 - 2, 0) :])


def sample_moments(stats: Stats) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """Mean and biased deviation of each sample, `EPS` inside the root."""
    return stats.mean, jnp.sqrt(stats.var + EPS)


def of_class(centres: Centres, label: Int[Array, "..."]) -> dict[str, Centre]:
    """The centre of one class, or of the class of each sample."""
    return {name: Centre(c.mean[label], c.spread[label]) for name, c in centres.items()}


def distorted(
    wanted: Centres,
    key: Key[Array, ""],
    noise: tuple[float, float],
    units: Mapping[str, Float[Array, " c"]] | None = None,
) -> dict[str, Centre]:
    """Points drawn around centres.

    Args:
      wanted: centres of one class, or one for each sample.
      key: of this draw.
      noise: deviations of the Gaussian around means and around spreads.
      units: what the noise is multiplied by in each layer; 1 if not given.

    Returns:
      Noisy centres, of the same shapes; spreads may be negative.

    Reference:
      Zhong et al. 2022, FDDA (distorted loss); Gao et al. 2022, ClusterQ (intra-class variation).
    """

    def around(name: str, centre: Centre) -> Centre:
        keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(name.encode())), 2)
        unit = jnp.ones(()) if units is None else units[name]
        drawn = (
            v + nu * unit * jax.random.normal(k, v.shape)
            for v, nu, k in zip(centre, noise, keys, strict=True)
        )
        return Centre(*drawn)

    return {name: around(name, centre) for name, centre in wanted.items()}


def centre_distance(
    observed: Observed, wanted: Centres, moments: MomentsOf
) -> Float[Array, "*samples"]:
    """Distance to centres: squares averaged over channels, then over the layers of `wanted`.

    Args:
      observed: one forward pass.
      wanted: of one class for moments of the batch, of each sample for moments of samples.
      moments: `match.batch_moments` or `sample_moments`.

    Returns:
      `mean_l mean_c (m - mean)^2 + (s - spread)^2`, of the batch or of each sample.

    Reference:
      Zhong et al. 2022, FDDA (centralised loss); Gao et al. 2022, ClusterQ (SFDA).
    """
    distances = []
    for name, centre in wanted.items():
        mean, spread = moments(observed.stats[name])
        gap = usable_gap(mean - centre.mean, spread - centre.spread, observed.targets[name])
        distances.append(squared_mean(gap))
    return jnp.mean(jnp.stack(distances), axis=0)


def masked_mean(values: Float[Array, " b"], mask: Bool[Array, " b"]) -> Float[Array, ""]:
    """Mean over the samples of a mask; 0 if there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1)


def classified(
    logits: Float[Array, "b classes"], labels: Float[Array, "b classes"]
) -> Bool[Array, " b"]:
    """Which samples the network assigns to the class of their label."""
    return jnp.argmax(logits, axis=1) == jnp.argmax(labels, axis=1)


def class_means(
    values: Float[Array, "b c"], label: Int[Array, " b"], mask: Bool[Array, " b"], classes: int
) -> Float[Array, "classes c"]:
    """Mean of the masked samples of each class; 0 for classes without any."""
    weights = mask.astype(values.dtype)
    sums = jax.ops.segment_sum(values * weights[:, None], label, num_segments=classes)
    return sums / jnp.maximum(class_counts(label, mask, classes), 1)[:, None].astype(values.dtype)


def class_counts(
    label: Int[Array, " b"], mask: Bool[Array, " b"], classes: int
) -> Int[Array, " classes"]:
    """How many masked samples each class has."""
    return jax.ops.segment_sum(mask.astype(jnp.int32), label, num_segments=classes)


class Clusters(NamedTuple):
    """Centres that follow the images of their class.

    Attributes:
      centres: means and deviations per class.
      known: classes whose centre has been measured.
    """

    centres: Centres
    known: Bool[Array, " classes"]


def recorded_clusters(targets: Targets, classes: int) -> Clusters:
    """Every class at the recorded moments of the deep layers; `targets` in execution order."""
    rows = lambda v: jnp.tile(v, (classes, 1))
    deep = {name: targets[name] for name in deep_layers(list(targets))}
    centres = {k: Centre(rows(t.mean), rows(recorded_std(t))) for k, t in deep.items()}
    return Clusters(centres, jnp.zeros(classes, bool))


def followed(
    clusters: Clusters,
    stats: Mapping[str, Stats],
    label: Int[Array, " b"],
    mask: Bool[Array, " b"],
    rate: float,
) -> Clusters:
    """Centres moved towards the means of the masked samples of their class.

    A class seen for the first time takes over what is measured; one without samples stays.

    Args:
      clusters: before.
      stats: of a batch.
      label: class of each sample.
      mask: samples that count.
      rate: beta of the paper, the share of what is measured.

    Returns:
      `(1 - beta) centre + beta mean`.

    Reference:
      Gao et al. 2022, "ClusterQ" (centroid update by exponential moving average).
    """
    classes = clusters.known.shape[0]
    present = class_counts(label, mask, classes) > 0
    share = jnp.where(present, jnp.where(clusters.known, rate, 1.0), 0.0)[:, None]

    def moved(name: str, centre: Centre) -> Centre:
        found = (class_means(v, label, mask, classes) for v in sample_moments(stats[name]))
        return Centre(*((1 - share) * v + share * f for v, f in zip(centre, found, strict=True)))

    centres = {name: moved(name, centre) for name, centre in clusters.centres.items()}
    return Clusters(centres, clusters.known | present)


class ClassCentres(NamedTuple):
    """Centres measured on images.

    Attributes:
      centres: mean and biased variance of each class, 0 for classes without an image.
      seen: classes with an image.
      right: classes of whose images the network gets more than half right.
    """

    centres: Centres
    seen: Bool[Array, " classes"]
    right: Bool[Array, " classes"]


def class_centres(
    model: Model,
    images: Float[Array, "n h w c"],
    labels: Int[Array, " n"],
    classes: int,
    *,
    batch: int = 32,
) -> ClassCentres:
    """Statistics of the images of each class in the deep layers, as of one batch.

    Args:
      model: a classifier with its batch norms in place.
      images: normalised; one for each class suffices.
      labels: their classes, 0..classes-1.
      classes: how many there are.
      batch: images per forward pass.

    Returns:
      Centres; that of a class with one image holds the statistics of this image.

    Raises:
      ValueError: if there are no images, or labels that are no classes.
      UnsupportedModelError: if the network has no usable batch-norm statistics.

    Reference:
      Zhong et al. 2022, FDDA (centres of batch-norm statistics).
    """
    if not len(images) or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"class_centres() needs images with labels in 0..{classes - 1}.")
    targets, _ = batch_norm_targets(model)
    starts = range(0, len(images), batch)
    deep = {name: targets[name] for name in deep_layers(list(targets))}
    parts = [logits_and_stats(model, deep, images[i : i + batch]) for i in starts]
    logits, stats = jax.tree.map(lambda *v: jnp.concatenate(v), *parts)
    label, all_of = labels.astype(jnp.int32), jnp.ones(len(images), bool)
    pooled = {name: pooled_centre(s, label, classes) for name, s in stats.items()}
    count = class_counts(label, all_of, classes)
    right = class_counts(label, jnp.argmax(logits, axis=1) == label, classes)
    return ClassCentres(pooled, count > 0, 2 * right > count)


@jax.jit
def logits_and_stats(
    model: Model, targets: Targets, images: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b classes"], Mapping[str, Stats]]:
    """What the network says of images, and their statistics at the targeted batch norms."""
    seen = observe(model, targets, images)
    return seen.logits, seen.stats


def pooled_centre(stats: Stats, label: Int[Array, " b"], classes: int) -> Centre:
    """Mean and biased variance of all samples of each class, taken together."""
    every = jnp.ones(label.shape, bool)
    mean = class_means(stats.mean, label, every, classes)
    return Centre(
        mean, class_means(stats.var + (stats.mean - mean[label]) ** 2, label, every, classes)
    )


def batch_distance(observed: Observed, wanted: Centres) -> Float[Array, ""]:
    """Distance of the moments of the batch, mean and biased variance, to one centre."""
    return centre_distance(observed, wanted, batch_moments)
