"""GZSQ: images for networks without batch norm, by statistics estimated from weights alone.

Sharma et al. 2022, "A Generalized Zero-Shot Quantization of Deep Convolutional Neural Networks via
Learned Weights Statistics". The recipe matches whatever statistics a network holds;
`synthesis.terms.estimates` makes a network hold estimated ones.

    L_Z = sum_l | |m - mu| / sqrt((s + 1e-6)^2 + (sigma + 1e-6)^2) |

    loss = L_Z + the same of the image itself, drawn to N(0, 1)
"""

from dfq_jax.optim.schedules import adam_with_plateau, rated
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, recorded
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.synthesis.terms.estimates import with_estimates
from dfq_jax.synthesis.terms.match import image_z_score, z_match


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
