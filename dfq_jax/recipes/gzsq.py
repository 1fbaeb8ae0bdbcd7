"""GZSQ: images for networks without batch norm, by statistics estimated from weights alone.

Sharma et al. 2022, "A Generalized Zero-Shot Quantization of Deep Convolutional Neural Networks via
Learned Weights Statistics". The recipe matches whatever statistics a network holds; `estimated`
makes a network hold estimated ones.

    L_Z = sum_l | |m - mu| / sqrt((s + 1e-6)^2 + (sigma + 1e-6)^2) |

    loss = L_Z + the same of the image itself, drawn to N(0, 1)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dfq_jax.graph.graph import Model
from dfq_jax.optim.schedules import adam_with_plateau, rated
from dfq_jax.passes.estimate import Estimator, SizeRule, with_estimated_norms
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, recorded
from dfq_jax.synthesis.sources.noise import noise
from dfq_jax.synthesis.sources.pixels import clip_to_pixels, from_natural, gaussian
from dfq_jax.synthesis.terms.base import Observed, Term
from dfq_jax.synthesis.terms.match import batch_z_gap, norms, z_match
from dfq_jax.synthesis.terms.targets import Target, recorded_statistics, sample_stats
from dfq_jax.types import InputContract, Moments

ESTIMATED = (
    "the statistics that the images match are estimated from the network's weights alone, none "
    "were recorded in training"
)
ESTIMATED_ANEW = (
    "gzsq folds batch norms away: the statistics that the images match are estimated from the "
    "network's weights alone, in spite of those recorded"
)


@recorded
def gzsq(
    *, steps: int = 500, batch: int = 32, learning_rate: float = 0.5, bounded: bool = True
) -> Recipe:
    """GZSQ's distilled images.

    What we know of the paper says nothing about the optimiser; what stands here is ZeroQ's.

    Args:
      steps: Adam steps.
      batch: images whose statistics are taken together.
      learning_rate: of Adam, in natural units; cut to a tenth on plateaus of 100 steps.
      bounded: only possible pixels (ours). Without, the distance, which shrinks as deviations grow,
        drives images to many times the contrast of photographs, and ranges with them.

    Returns:
      The recipe. It looks at a network that `estimated` makes.
    """
    optimizer = rated(adam_with_plateau, learning_rate, patience=100, floor=1e-4)
    return Recipe(
        name="gzsq",
        batch=batch,
        source=Source(gaussian),
        stages=(Stage(steps, optimizer),),
        terms=(Term("L_Z", 1.0, z_match), Term("image", 1.0, image_z_score)),
        bounded=bounded,
        sees=with_estimates,
        evidence="estimates",
    )


def with_estimates(model: Model) -> tuple[Model, str]:
    """The network with estimated statistics, and what to say of them."""
    note = ESTIMATED_ANEW if recorded_statistics(model)[0] else ESTIMATED
    return estimated(model), note


def image_z_score(observed: Observed) -> Float[Array, ""]:
    """Z-score distance of the batch to N(0, 1) per colour, natural units."""
    none = jnp.zeros(observed.natural.shape[-1])
    normal = Target(none, none + 1, none == 0)
    return norms(batch_z_gap(sample_stats(observed.natural, none), normal))


def estimated(
    model: Model,
    mode: Estimator = "gzsq",
    *,
    rule: SizeRule = "mean",
    images: int = 32,
    key: Key[Array, ""] | None = None,
) -> Model:
    """The network with its batch norms folded away, and norms of estimated statistics instead.

    Every recipe that matches batch norms then works, whether or not the network had any.

    Args:
      model: the network.
      mode: `gzsq` as in the paper; `analytic`, which propagates normal variables and is nearer to
        the truth; `noise`: what pink noise and dead leaves show.
      rule: how `gzsq` makes vectors of different sizes equal.
      images: how many of noise.
      key: for noise.

    Returns:
      The same function. Images are taken to have mean 0 and variance 1 in natural units.
    """
    model, contract = fold_batch_norm(model), model.contract
    seen = None
    if mode == "noise":
        shape = (images, *contract.shape)
        made = jax.jit(noise, static_argnums=1)
        natural = made(jax.random.key(0) if key is None else key, shape)
        seen = from_natural(clip_to_pixels(natural, contract), contract)
    inputs = natural_inputs(contract)
    return with_estimated_norms(model, mode, inputs=inputs, images=seen, rule=rule)


def natural_inputs(contract: InputContract) -> Moments:
    """Moments, as the network reads them, of images with mean 0 and variance 1 natural units."""
    ends = jnp.array([0.0, 1.0])[:, None, None, None] * jnp.ones((1, 1, 1, contract.channels))
    mean, above = from_natural(ends, contract).reshape(2, -1)
    return Moments(mean, (above - mean) ** 2)
