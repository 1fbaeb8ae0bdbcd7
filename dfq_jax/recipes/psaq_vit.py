"""PSAQ-ViT: images whose patches look diverse to the attention of a vision transformer.

Li et al. 2022, "Patch Similarity Aware Data-Free Quantization for Vision Transformers". It needs no
batch norm. With `p` the density of cosines between all pairs of patches of an attention's output:

    PSE  = sum_blocks mean_images -integral p log p
    loss = -PSE + CE + 0.05 |TV - v|,  v ~ U(2500, 3000)
"""

from dfq_jax.optim.schedules import adam_to_zero, rated
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, random_labels, recorded
from dfq_jax.synthesis.sources.augment import compose, flip, jitter
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Term, label_entropy
from dfq_jax.synthesis.terms.patches import (
    attention_outputs,
    drawn_variation,
    patch_entropy,
    variation_gap,
)


@recorded
def psaq_vit(
    *,
    steps: int = 1000,
    batch: int = 32,
    learning_rate: float = 0.2,
    labels: float = 1.0,
    variation: float = 0.05,
    reach: tuple[int, int] = (15, 30),
) -> Recipe:
    """PSAQ-ViT's images.

    Args:
      steps: Adam steps in both stages together.
      batch: images optimised together.
      learning_rate: highest of Adam, in natural units; the paper takes 0.25 for Swin.
      labels: weight of the cross-entropy to random labels.
      variation: weight of the distance to a variation drawn once from 2500..3000.
      reach: most pixels by which images are rolled, in the first and in the second stage.

    Returns:
      The recipe.
    """
    halves = (steps - steps // 2, steps // 2)
    stages = zip(halves, reach, strict=True)
    return Recipe(
        name="psaq_vit",
        batch=batch,
        source=Source(gaussian),
        stages=tuple(rolling_stage(count, far, learning_rate) for count, far in stages if count),
        terms=(
            Term("PSE", -1.0, patch_entropy),
            Term("CE", labels, label_entropy, True),
            Term("TV", variation, variation_gap),
        ),
        prepare=drawn_variation,
        condition=random_labels,
        watch=attention_outputs,
        bounded=True,
        statistics=False,
    )


def rolling_stage(steps: int, reach: int, learning_rate: float) -> Stage:
    """A stage with images rolled by the same offset along both axes, and mirrored or not."""
    optimizer = rated(adam_to_zero, learning_rate, steps=steps, b1=0.5, b2=0.9, warmup=100)
    return Stage(steps, optimizer, compose(jitter(reach, same=True), flip()))
