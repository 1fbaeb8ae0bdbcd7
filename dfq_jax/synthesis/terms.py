"""Loss terms of image synthesis: pure functions of one `Observed`, composed by weighted sums."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dfq_jax.synthesis.targets import Stats, Target, Targets

EPS = 1e-6
"""Inside every square root, in both measured and stored deviations (ZeroQ and DSG code)."""


class Observed(NamedTuple):
    """Everything a term may look at.

    Attributes:
      images: what the network saw, normalised, Float[b h w c].
      natural: the same in units where natural images have mean 0 and std 1 per channel.
      logits: the first output: Float[b classes] for a classifier.
      stats: {batch norm: per-sample statistics of its input}.
      targets: {batch norm: recorded moments}.
      shared: what the recipe's `prepare` returned, e.g. tolerances.
      labels: what the recipe's `condition` returned for this batch, e.g. one-hot classes.
      key: fresh randomness for this step.
    """

    images: Float[Array, "b h w c"]
    natural: Float[Array, "b h w c"]
    logits: Float[Array, "b ..."]
    stats: Mapping[str, Stats]
    targets: Targets
    shared: Any
    labels: Any
    key: Key[Array, ""]


class Term(NamedTuple):
    """One part of an objective.

    Attributes:
      name: what reports call it.
      weight: its factor.
      fn: its value.
      classes: whether it needs the scores of classes, which not every network has.
    """

    name: str
    weight: float
    fn: Callable[[Observed], Float[Array, ""]]
    classes: bool = False


def weighted(
    terms: Sequence[Term], observed: Observed
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of `terms`, and each term unweighted under its name."""
    parts = {t.name: t.fn(observed) for t in terms}
    return sum((t.weight * parts[t.name] for t in terms), jnp.zeros(())), parts


def unbiased_std(stats: Stats) -> Float[Array, "b c"]:
    """Standard deviation over positions, `EPS` inside the root."""
    return jnp.sqrt(stats.var * (stats.positions / max(stats.positions - 1, 1)) + EPS)


def distances(
    mean: Float[Array, "... c"], std: Float[Array, "... c"], target: Target
) -> tuple[Float[Array, "... c"], Float[Array, "... c"]]:
    """|mean - target| and |std - target| per channel; 0 where the target is unusable."""
    mean_gap = jnp.abs(mean - target.mean)
    std_gap = jnp.abs(std - jnp.sqrt(target.var + EPS))
    return jnp.where(target.usable, mean_gap, 0.0), jnp.where(target.usable, std_gap, 0.0)


def gaps(stats: Stats, target: Target) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """|mean - target| and |std - target|, per sample and channel."""
    return distances(stats.mean, unbiased_std(stats), target)


Slack = Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]]
"""{batch norm: (tolerance of means, tolerance of deviations)}."""


def layer_losses(observed: Observed, slack: Slack | None = None) -> Float[Array, "b layers"]:
    """Squared distance to each layer's moments, per sample, beyond a tolerance.

    Args:
      observed: one forward pass.
      slack: tolerances per layer; None for an exact match.

    Returns:
      `sum_c [|mean gap| - delta]_+^2 + [|std gap| - gamma]_+^2`, layers in the order of
      `observed.targets`.

    Reference:
      Cai et al. 2020, "ZeroQ", Eq. 3, on standard deviations as released; with tolerances Zhang
      et al. 2021, "Diversifying Sample Generation", Eq. 5.
    """
    columns = []
    for name, target in observed.targets.items():
        mean_gap, std_gap = gaps(observed.stats[name], target)
        delta, gamma = (0.0, 0.0) if slack is None else slack[name]
        hinge = lambda gap, tolerance: jnp.sum(jax.nn.relu(gap - tolerance) ** 2, axis=1)
        columns.append(hinge(mean_gap, delta) + hinge(std_gap, gamma))
    return jnp.stack(columns, axis=1)


def batch_norm_match(observed: Observed) -> Float[Array, ""]:
    """ZeroQ's loss: layers summed, samples averaged.

    Reference:
      Cai et al. 2020, "ZeroQ", Eq. 3.
    """
    return jnp.mean(jnp.sum(layer_losses(observed), axis=1))


def relative_batch_match(observed: Observed) -> Float[Array, ""]:
    """Squared gaps of batch mean and deviation in units of the recorded deviation.

    Channels averaged, layers summed: every layer counts alike, whatever its width and scale.

    Reference:
      Yin et al. 2020, "Dreaming to Distill", Eq. 4, for the granularity; the units are ours.
    """
    total = jnp.zeros(())
    for name, target in observed.targets.items():
        stats = observed.stats[name]
        mean = jnp.mean(stats.mean, axis=0)
        var = jnp.mean(stats.var + (stats.mean - mean) ** 2, axis=0)
        mean_gap, std_gap = distances(mean, jnp.sqrt(var + EPS), target)
        total = total + jnp.mean((mean_gap**2 + std_gap**2) / (target.var + EPS))
    return total


def image_statistics(observed: Observed) -> Float[Array, ""]:
    """Squared distance of each image's channel mean and std to 0 and 1, natural units.

    Reference:
      ZeroQ, released code: the input counts as one more layer with mean 0 and std 1.
    """
    stats = sample_stats_of(observed.natural)
    channels = observed.natural.shape[-1]
    ones = jnp.ones(channels, bool)
    target = Target(jnp.zeros(channels), jnp.ones(channels) - EPS, ones)
    mean_gap, std_gap = gaps(stats, target)
    return jnp.mean(jnp.sum(mean_gap**2 + std_gap**2, axis=1))


def sample_stats_of(x: Float[Array, "b h w c"]) -> Stats:
    """Two-pass statistics of images."""
    mean = jnp.mean(x, (1, 2), keepdims=True)
    var = jnp.mean((x - mean) ** 2, (1, 2))
    return Stats(mean[:, 0, 0], var, x.shape[1] * x.shape[2])


def enhanced(losses: Float[Array, "b layers"], factor: float) -> Float[Array, ""]:
    """Mean over samples of the sum over layers; sample j counts layer `j mod layers` more.

    Reference:
      Zhang et al. 2021, section 3.3 (layerwise sample enhancement), read per sample.
    """
    batch, layers = losses.shape
    own = jnp.arange(batch)[:, None] % layers == jnp.arange(layers)
    return jnp.sum(jnp.where(own, factor, 1.0) * losses) / batch


def correlation(images: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """`||S - I||_F^2 / b` for the cosine similarity matrix S of flattened images.

    Equals the mean squared distance of S's eigenvalues from 1, those of independent noise.

    Reference:
      Qin et al. 2023, "Diverse Sample Generation", sample correlation inhibition; this is the
      closed form of its magnitude part.
    """
    flat = images.reshape(images.shape[0], -1)
    unit = flat * jax.lax.rsqrt(jnp.sum(flat**2, axis=1, keepdims=True) + EPS)
    similarity = unit @ unit.T - jnp.eye(flat.shape[0])
    return jnp.sum(similarity**2) / flat.shape[0]


def cross_entropy(
    logits: Float[Array, "b classes"], labels: Float[Array, "b classes"]
) -> Float[Array, ""]:
    """Mean cross-entropy to one-hot or soft labels."""
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=1))


def total_variation(images: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Sum of the l2 norms, over the whole batch, of differences in four directions.

    Reference:
      Yin et al. 2020, "Dreaming to Distill", Eq. 3 (the l2 form of its code).
    """
    down = images[:, 1:] - images[:, :-1]
    right = images[:, :, 1:] - images[:, :, :-1]
    diagonal = images[:, 1:, 1:] - images[:, :-1, :-1]
    other = images[:, 1:, :-1] - images[:, :-1, 1:]
    norm = lambda d: jnp.sqrt(jnp.sum(d**2) + EPS)
    return norm(down) + norm(right) + norm(diagonal) + norm(other)


def image_norm(images: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Mean l2 norm of an image (Yin et al. 2020, Eq. 3)."""
    return jnp.mean(jnp.sqrt(jnp.sum(images**2, axis=(1, 2, 3)) + EPS))
