"""GENIE: a new small generator and its latent codes for every batch, and swing convolutions.

Jeon, Lee, Kim 2023, "GENIE: Show Me the Data for Quantization" (its data half, GENIE-D). With
statistics `m, s` of a batch at batch norm l:

    BNS  = sum_l mean_channels (m - mu)^2 + (s - sigma)^2
    loss = BNS + image      as ZeroQ's, of each image
"""

from collections.abc import Hashable

import optax

from dfq_jax.optim.schedules import adam_with_plateau
from dfq_jax.synthesis.recipe import Offer, Recipe, Stage, recorded
from dfq_jax.synthesis.sources.generator import latent_source
from dfq_jax.synthesis.sources.swing import swing
from dfq_jax.synthesis.terms.base import Term, image_statistics
from dfq_jax.synthesis.terms.match import batch_std_gap, matched, squared_mean
from dfq_jax.values import bound


@recorded
def genie(
    *,
    steps: int = 4000,
    batch: int = 128,
    latent_rate: float = 0.1,
    generator_rate: float = 0.01,
    reach: int = 1,
    latent: int = 256,
    channels: tuple[int, int] = (128, 64),
) -> Recipe:
    """GENIE's generated images.

    Args:
      steps: of both optimizers.
      batch: images whose statistics are taken together.
      latent_rate: of the codes' Adam; cut to a tenth on plateaus of 100 steps, to 1e-4 at least.
      generator_rate: of the generator's Adam; falls by 5 % every 100 steps.
      reach: pixels by which strided convolutions swing; 0 keeps them still.
      latent: length of a code.
      channels: of the generator's first and its hidden feature map.

    Returns:
      The recipe.
    """
    return Recipe(
        name="genie",
        batch=batch,
        source=latent_source(latent=latent, channels=channels),
        stages=(Stage(steps, bound(optimizer, latent_rate, generator_rate)),),
        terms=(
            Term("BNS", 1.0, matched(batch_std_gap, squared_mean)),
            Term("image", 1.0, image_statistics),
        ),
        distort=swing(reach) if reach else None,
    )


GENIE = Offer(genie, images=1024)


def optimizer(
    latent_rate: float, generator_rate: float, factor: float
) -> optax.GradientTransformation:
    """Adam for codes, and another for the generator."""
    decay = optax.exponential_decay(generator_rate * factor, 100, 0.95, staircase=True)
    rules: dict[Hashable, optax.GradientTransformation] = {
        "latent": adam_with_plateau(latent_rate * factor, patience=100, floor=1e-4),
        "generator": optax.adam(decay),
    }
    return optax.partition(rules, {name: name for name in rules})
