"""Statistics to match where none were recorded: a network that holds estimated ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dfq_jax.graph.graph import Model
from dfq_jax.passes.estimate import Estimator, SizeRule, with_estimated_norms
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.synthesis.sources.noise import noise
from dfq_jax.synthesis.sources.pixels import clip_to_pixels, from_natural
from dfq_jax.synthesis.terms.targets import recorded_statistics
from dfq_jax.types import InputContract, Moments

ESTIMATED = (
    "the statistics that the images match are estimated from the network's weights alone, none "
    "were recorded in training"
)


ESTIMATED_ANEW = (
    "gzsq folds batch norms away: the statistics that the images match are estimated from the "
    "network's weights alone, in spite of those recorded"
)


def with_estimates(model: Model) -> tuple[Model, str]:
    """The network with estimated statistics, and what to say of them."""
    note = ESTIMATED_ANEW if recorded_statistics(model)[0] else ESTIMATED
    return estimated(model), note


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
