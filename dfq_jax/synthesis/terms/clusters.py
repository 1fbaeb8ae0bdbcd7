"""Terms of images that gather around centres of their classes, which follow the images.

Reference:
  Gao et al. 2022, "Towards Feature Distribution Alignment and Diversity Enhancement for Data-Free
  Quantization" (ClusterQ).
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.synthesis.recipe import Memory
from dfq_jax.synthesis.terms.base import Observed
from dfq_jax.synthesis.terms.centres import (
    Clusters,
    centre_distance,
    classified,
    distorted,
    followed,
    masked_mean,
    of_class,
    recorded_clusters,
    sample_moments,
)
from dfq_jax.synthesis.terms.match import recorded_std
from dfq_jax.synthesis.terms.targets import Targets
from dfq_jax.values import bound


def followers(warmup: int, rate: float) -> Memory:
    """Centres of the classes, which pass from step to step and from batch to batch."""
    return Memory(
        start=begun_clusters,
        step=bound(moving, warmup=warmup, rate=rate),
    )


def begun_clusters(
    targets: Targets, turns: int, classes: int, features: Mapping[str, int]
) -> Clusters:
    """Every class begins where the network recorded all."""
    del turns, features
    return recorded_clusters(targets, classes)


def after(
    warmup: int, fn: Callable[[Observed], Float[Array, ""]], observed: Observed
) -> Float[Array, ""]:
    """What a term is, 0 in the warm-up."""
    return jnp.where(observed.step >= warmup, fn(observed), 0.0)


def moving(observed: Observed, warmup: int, rate: float) -> Clusters:
    """Centres that stay in the warm-up; its last step measures them, later ones move them."""
    clusters, label = observed.memory, jnp.argmax(observed.labels, axis=1)
    right = classified(observed.logits, observed.labels) & (observed.step + 1 >= warmup)
    return followed(clusters, observed.stats, label, right, rate)


def alignment(observed: Observed) -> Float[Array, ""]:
    """SFDA: distance of the samples to the centre of their class."""
    wanted = of_class(observed.memory.centres, jnp.argmax(observed.labels, axis=1))
    distance = centre_distance(observed, wanted, sample_moments)
    return masked_mean(distance, classified(observed.logits, observed.labels))


def variation(
    observed: Observed, noise: tuple[float, float], *, relative: bool
) -> Float[Array, ""]:
    """ICV: distance of the samples to points drawn around the centre of their class."""
    wanted = of_class(observed.memory.centres, jnp.argmax(observed.labels, axis=1))
    units = {k: recorded_std(t) for k, t in observed.targets.items()} if relative else None
    drawn = distorted(wanted, observed.key, noise, units)
    distance = centre_distance(observed, drawn, sample_moments)
    return masked_mean(distance, classified(observed.logits, observed.labels))
