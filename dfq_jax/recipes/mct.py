"""MCT: smoothed images, all of which together match the statistics, optimised in turn.

Dikstein et al. 2025, "Data Generation for Hardware-Friendly Post-Training Quantization" (DGH), and
the data generation of Sony's Model Compression Toolkit (MCT). With statistics `m, s` of all
images, of which only one batch moves at a time, and the range of scores of an image:

    BNS    = mean_l mean_channels (m - mu)^2 + 10 (s - sigma)^2
    output = mean_images -(max - min) + [what its last statistics are off by, beyond 0.5]+

    loss   = BNS + 3e-7 output
"""

from typing import Literal

from dfq_jax.optim.schedules import radam_with_plateau, rated
from dfq_jax.synthesis.recipe import Offer, Recipe, Stage
from dfq_jax.synthesis.sources.augment import blur, compose, flip
from dfq_jax.synthesis.sources.canvas import canvas, crop_at_random
from dfq_jax.synthesis.terms.aggregate import (
    aggregate_match,
    all_batches,
    confidence,
    image_itself,
    last_target,
    typical_confidence,
)
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.values import bound

Variant = Literal["paper", "code"]


def mct(
    *,
    variant: Variant = "paper",
    steps: int = 1000,
    batch: int = 128,
    learning_rate: float = 16.0,
    output: float | None = None,
    margin: int | None = None,
    sigma: float = 1.25,
) -> Recipe:
    """DGH's or MCT's images.

    Args:
      variant: `paper`: DGH, deviations count ten times, images far from the statistics of the last
        batch norm cost extra; `code`: MCT, neither.
      steps: RAdam steps of each batch (MCT: 500).
      batch: images optimised together (MCT: 32); all batches share their statistics.
      learning_rate: of RAdam, in natural units; halved on plateaus of 1/50 of the steps. As
        released; steps this large take pixels to their bounds until it has been halved often.
      output: weight of the range of outputs; by default 3e-7 (DGH for ResNet-18) or 1e-5 (MCT).
      margin: by how much canvases are larger than images; by default 32 (DGH) or 64 (MCT).
      sigma: of the blur.

    Returns:
      The recipe.
    """
    paper = variant == "paper"
    weight = {"paper": 3e-7, "code": 1e-5}[variant] if output is None else output
    room = {"paper": 32, "code": 64}[variant] if margin is None else margin
    wide = typical_confidence if paper else confidence
    optimizer = rated(radam_with_plateau, learning_rate, steps=steps)
    return Recipe(
        name="mct",
        settings={
            "variant": variant,
            "learning_rate": learning_rate,
            "output": weight,
            "margin": room,
            "sigma": sigma,
        },
        batch=batch,
        source=canvas(room, sigma),
        stages=(
            Stage(steps, optimizer, compose(flip(), blur(sigma), bound(crop_at_random, room))),
        ),
        terms=(
            Term("BNS", 1.0, bound(aggregate_match, spread=10.0 if paper else 1.0)),
            Term("output", weight, wide),
        ),
        prepare=last_target,
        watch=image_itself,
        memory=all_batches(),
        turns=True,
        bounded=True,
    )


MCT = Offer(mct, images=1024)
