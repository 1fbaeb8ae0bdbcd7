"""How far statistics are from recorded ones: one set of statistics, every published distance.

A match is a gap (whose moments: of each sample, of the batch; deviations or variances) and a
distance (squares summed or averaged over channels, norms, divergences), summed or averaged over
layers. Papers differ in nothing else.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.synthesis.terms.base import Observed
from dfq_jax.synthesis.terms.targets import Stats, Target, sample_stats
from dfq_jax.values import Bound, bound

EPS = 1e-6
"""Inside every square root, in both measured and stored deviations (ZeroQ and DSG code)."""


class Gap(NamedTuple):
    """Measured less recorded moments per channel; 0 where what was recorded is unusable."""

    mean: Float[Array, "... c"]
    spread: Float[Array, "... c"]


Measure = Callable[[Stats, Target], Gap]
Distance = Callable[[Gap], Float[Array, "..."]]


def unbiased_std(stats: Stats) -> Float[Array, "b c"]:
    """Standard deviation of each sample over positions, `EPS` inside the root."""
    return jnp.sqrt(stats.var * (stats.positions / max(stats.positions - 1, 1)) + EPS)


def recorded_std(target: Target) -> Float[Array, " c"]:
    """The recorded standard deviation, `EPS` inside the root."""
    return jnp.sqrt(target.var + EPS)


def usable_gap(mean: Array, spread: Array, target: Target) -> Gap:
    """A gap without the channels that recorded nothing."""
    return Gap(jnp.where(target.usable, mean, 0.0), jnp.where(target.usable, spread, 0.0))


def sample_std_gap(stats: Stats, target: Target) -> Gap:
    """Mean and unbiased deviation of each sample.

    Reference:
      Cai et al. 2020, "ZeroQ", as released.
    """
    return usable_gap(stats.mean - target.mean, unbiased_std(stats) - recorded_std(target), target)


def batch_moments(stats: Stats) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and biased variance over samples and positions, from those of the samples."""
    mean = jnp.mean(stats.mean, axis=0)
    return mean, jnp.mean(stats.var + (stats.mean - mean) ** 2, axis=0)


def batch_var_gap(stats: Stats, target: Target) -> Gap:
    """Mean and biased variance of the batch.

    Reference:
      Yin et al. 2020, "Dreaming to Distill".
    """
    mean, var = batch_moments(stats)
    return usable_gap(mean - target.mean, var - target.var, target)


def batch_std_gap(stats: Stats, target: Target) -> Gap:
    """Mean and unbiased deviation of the batch.

    Reference:
      Jeon et al. 2023, "GENIE", as released.
    """
    mean, var = batch_moments(stats)
    count = stats.positions * stats.mean.shape[0]
    std = jnp.sqrt(var * (count / max(count - 1, 1)) + EPS)
    return usable_gap(mean - target.mean, std - recorded_std(target), target)


def relative_batch_gap(stats: Stats, target: Target) -> Gap:
    """Mean and deviation of the batch in units of the recorded deviation (ours)."""
    mean, var = batch_moments(stats)
    unit = recorded_std(target)
    return usable_gap((mean - target.mean) / unit, (jnp.sqrt(var + EPS) - unit) / unit, target)


def squared_sum(gap: Gap) -> Float[Array, "..."]:
    """`sum_c mean gap^2 + spread gap^2`."""
    return jnp.sum(gap.mean**2 + gap.spread**2, axis=-1)


def squared_mean(gap: Gap) -> Float[Array, "..."]:
    """`mean_c mean gap^2 + spread gap^2`."""
    return jnp.mean(gap.mean**2 + gap.spread**2, axis=-1)


def norms(gap: Gap) -> Float[Array, "..."]:
    """`||mean gap||_2 + ||spread gap||_2`, with a finite slope at 0 (Yin et al. 2020)."""
    length = lambda v: jnp.sqrt(jnp.sum(v**2, axis=-1) + 1e-12)
    return length(gap.mean) + length(gap.spread)


def layer_distances(
    observed: Observed, measure: Measure, distance: Distance
) -> Float[Array, "layers ..."]:
    """The distance of every layer, in the order of `observed.targets`."""
    gaps = (measure(observed.stats[name], target) for name, target in observed.targets.items())
    return jnp.stack([distance(gap) for gap in gaps])


def moments_match(
    observed: Observed, *, measure: Measure, distance: Distance, mean: bool, first: float
) -> Float[Array, ""]:
    """A distance of all layers, summed or averaged; see `matched`."""
    each = layer_distances(observed, measure, distance)
    each = each.reshape(each.shape[0], -1).mean(1)
    total = jnp.sum(each) + (first - 1) * each[0]
    return total / each.shape[0] if mean else total


def matched(
    measure: Measure, distance: Distance, *, mean: bool = False, first: float = 1.0
) -> Bound[Float[Array, ""]]:
    """A term's function: the distance of all layers; samples, where apart, are averaged.

    Args:
      measure: whose moments, e.g. `batch_var_gap`.
      distance: of the channels of a layer, e.g. `squared_mean`.
      mean: average over layers instead of summing.
      first: factor of the first layer.

    Returns:
      observed -> the match.
    """
    return bound(moments_match, measure=measure, distance=distance, mean=mean, first=first)


batch_norm_match = matched(sample_std_gap, squared_sum)
"""ZeroQ's loss: layers summed, samples averaged (Cai et al. 2020)."""

relative_batch_match = matched(relative_batch_gap, squared_mean)
"""Every layer counts alike, whatever its width and scale: `best`'s match (the units are ours)."""


Slack = Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]]
"""{batch norm: (tolerance of means, tolerance of deviations)}."""


def beyond(gap: Gap, slack: tuple[Array | float, Array | float]) -> Gap:
    """How far a gap is beyond its tolerances.

    Reference:
      Zhang et al. 2021, "Diversifying Sample Generation".
    """
    hinge = lambda v, tolerance: jax.nn.relu(jnp.abs(v) - tolerance)
    return Gap(hinge(gap.mean, slack[0]), hinge(gap.spread, slack[1]))


def layer_losses(observed: Observed, slack: Slack | None = None) -> Float[Array, "b layers"]:
    """Squared distance to each layer's moments, per sample, beyond a tolerance.

    Args:
      observed: one forward pass.
      slack: tolerances per layer; None for an exact match.

    Returns:
      `sum_c [|mean gap| - delta]_+^2 + [|std gap| - gamma]_+^2`, layers in the order of
      `observed.targets`.

    Reference:
      Cai et al. 2020, "ZeroQ", on standard deviations as released; with tolerances Zhang
      et al. 2021, "Diversifying Sample Generation".
    """
    columns = []
    for name, target in observed.targets.items():
        gap = sample_std_gap(observed.stats[name], target)
        columns.append(squared_sum(gap if slack is None else beyond(gap, slack[name])))
    return jnp.stack(columns, axis=1)


def enhanced(
    losses: Float[Array, "b layers"], factor: float, *, once: bool = False
) -> Float[Array, ""]:
    """Mean over samples of the sum over layers; sample j counts layer `j mod layers` more.

    Args:
      losses: of each sample at each layer.
      factor: by which a sample counts its own layer.
      once: samples beyond the number of layers have none, as in the journal's released code.

    Reference:
      Zhang et al. 2021, section 3.3 (layerwise sample enhancement), read per sample.
    """
    batch, layers = losses.shape
    sample = jnp.arange(batch)[:, None]
    own = (sample if once else sample % layers) == jnp.arange(layers)
    return jnp.sum(jnp.where(own, factor, 1.0) * losses) / batch


def gauss_kl(
    mean: Float[Array, "... c"],
    var: Float[Array, "... c"],
    mean_q: Float[Array, "... c"],
    var_q: Float[Array, "... c"],
) -> Float[Array, "... c"]:
    """`KL(N(mean, var) || N(mean_q, var_q))`; variances below `EPS` count as `EPS`.

    Reference:
      Haroush et al. 2020, "The Knowledge Within".
    """
    var, var_q = jnp.maximum(var, EPS), jnp.maximum(var_q, EPS)
    return 0.5 * (jnp.log(var_q / var) + (var + (mean - mean_q) ** 2) / var_q - 1)


def kl_match(
    observed: Observed, *, reverse: bool, mean: bool, limit: float | None
) -> Float[Array, ""]:
    """Divergences of all channels, summed or averaged; see `matched_kl`."""
    each, usable = [], []
    for name, target in observed.targets.items():
        pair = [(target.mean, target.var), batch_moments(observed.stats[name])]
        first, second = pair[::-1] if reverse else pair
        each.append(gauss_kl(*first, *second))
        usable.append(target.usable)
    channels, counted = jnp.concatenate(each), jnp.concatenate(usable)
    total = jnp.sum(jnp.where(counted, tamed(channels, limit), 0.0))
    return total / jnp.sum(counted.astype(jnp.float32)) if mean else total


def matched_kl(
    *, reverse: bool = False, mean: bool = False, limit: float | None = None
) -> Bound[Float[Array, ""]]:
    """A term's function: divergence of the batch's moments from recorded ones, as Gaussians.

    Args:
      reverse: `KL(batch || recorded)` instead of `KL(recorded || batch)`.
      mean: average over the channels of all layers instead of summing.
      limit: beyond it a channel's divergence grows with its logarithm only.

    Returns:
      observed -> the match.

    Reference:
      Haroush et al. 2020, "The Knowledge Within"; the limit is ours.
    """
    return bound(kl_match, reverse=reverse, mean=mean, limit=limit)


def tamed(values: Float[Array, "..."], limit: float | None) -> Float[Array, "..."]:
    """Positive values as they are up to a limit, beyond it `limit (1 + log(value / limit))`.

    A collapsed channel then neither drowns the others nor loses its slope, as it would if clipped.
    """
    if limit is None:
        return values
    return jnp.minimum(values, limit) + limit * jnp.log(jnp.maximum(values / limit, 1.0))


def z_score(
    mean: Float[Array, "... c"],
    std: Float[Array, "... c"],
    mean_q: Float[Array, "... c"],
    std_q: Float[Array, "... c"],
) -> Float[Array, "... c"]:
    """`|mean - mean_q| / sqrt((std + s)^2 + (std_q + s)^2)` with s = 1e-6.

    Deviations are only the unit: nothing pulls them together, and larger ones cost less.

    Reference:
      Sharma et al. 2022, "A Generalized Zero-Shot Quantization of Deep Convolutional Neural
      Networks via Learned Weights Statistics", absolute Z-score distance.
    """
    s = 1e-6
    return jnp.abs(mean - mean_q) / jnp.sqrt((std + s) ** 2 + (std_q + s) ** 2)


def batch_z_gap(stats: Stats, target: Target) -> Gap:
    """The Z-score of the batch's mean; no gap of deviations."""
    mean, var = batch_moments(stats)
    z = z_score(mean, jnp.sqrt(var + EPS), target.mean, recorded_std(target))
    return usable_gap(z, jnp.zeros_like(z), target)


z_match = matched(batch_z_gap, norms)
"""GZSQ's loss: norms over channels, layers summed."""


def image_z_score(observed: Observed) -> Float[Array, ""]:
    """Z-score distance of the batch to N(0, 1) per colour, natural units."""
    none = jnp.zeros(observed.natural.shape[-1])
    normal = Target(none, none + 1, none == 0)
    return norms(batch_z_gap(sample_stats(observed.natural, none), normal))
