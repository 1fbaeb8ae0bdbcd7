"""ZeroQ: images whose every sample matches the batch-norm statistics.

Cai et al. 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", section 3.1 and released code.
With the mean `m` and deviation `s` of one image at batch norm l, and the recorded `mu` and `sigma`:

    BNS   = mean_images sum_l |m - mu|^2 + |s - sigma|^2
    image = the same of the image itself, drawn to mean 0 and deviation 1

    loss  = BNS + image
"""

from dfq_jax.optim.schedules import adam_with_plateau, rated
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, recorded
from dfq_jax.synthesis.sources.pixels import gaussian, nearly_black
from dfq_jax.synthesis.terms.base import Term, image_statistics
from dfq_jax.synthesis.terms.match import batch_norm_match


@recorded
def zeroq(
    *, steps: int = 500, batch: int = 32, learning_rate: float = 0.5, dark_start: bool = True
) -> Recipe:
    """ZeroQ's distilled images.

    Args:
      steps: Adam steps.
      batch: images optimised together (they do not interact).
      learning_rate: of Adam, in natural units; cut to a tenth on plateaus of 100 steps.
      dark_start: start from almost black noise, as released, instead of N(0, 1).

    Returns:
      The recipe.
    """
    optimizer = rated(adam_with_plateau, learning_rate, patience=100, floor=1e-4)
    return Recipe(
        name="zeroq",
        batch=batch,
        source=Source(nearly_black if dark_start else gaussian),
        stages=(Stage(steps, optimizer),),
        terms=(
            Term("BNS", 1.0, batch_norm_match),
            Term("image", 1.0, image_statistics),
        ),
    )
