"""DSG: diverse images through tolerant statistics, one emphasised layer per sample, decorrelation.

Zhang et al. 2021, "Diversifying Sample Generation for Accurate Data-Free Quantization" (slack
distribution alignment, layerwise sample enhancement) and Qin et al. 2023, "Diverse Sample
Generation" (sample correlation inhibition).
"""

from typing import Literal

from jaxtyping import Array, Key

from dfq_jax.graph.graph import Model
from dfq_jax.optim.schedules import adam_with_plateau
from dfq_jax.synthesis.match import Slack, enhanced, layer_losses
from dfq_jax.synthesis.pixels import gaussian, uniform
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, random_labels
from dfq_jax.synthesis.slack import slack_margins
from dfq_jax.synthesis.targets import Targets
from dfq_jax.synthesis.terms import (
    Term,
    correlation,
    cross_entropy,
    image_norm,
    image_statistics,
    total_variation,
)

Variant = Literal["paper", "code"]


def dsg(
    *,
    variant: Variant = "paper",
    steps: int = 500,
    batch: int = 40,
    learning_rate: float = 0.9,
    quantile: float = 0.9,
    noise_images: int = 256,
    slack: bool = True,
    enhance: bool = True,
    inhibit: float = 1e-2,
) -> Recipe:
    """DSG's diverse images.

    Args:
      variant: `paper`: enhancement 2, Gaussian start, statistics and diversity terms only; `code`:
        enhancement 4 (the residual is doubled before squaring), uniform start, plus
        cross-entropy (weight 2), total variation and norm (0.01 each).
      steps: Adam steps.
      batch: images optimised together, rounded to a multiple of the number of batch norms.
      learning_rate: of Adam, in natural units; cut to a tenth on plateaus of 260 steps.
      quantile: epsilon of the tolerances.
      noise_images: Gaussian images that measure the tolerances.
      slack: slack distribution alignment; off gives exact matching.
      enhance: layerwise sample enhancement.
      inhibit: weight of sample correlation inhibition, 0 to leave it out.

    Returns:
      The recipe.
    """
    settings = {
        "variant": variant,
        "learning_rate": learning_rate,
        "quantile": quantile,
        "noise_images": noise_images,
        "slack": slack,
        "enhance": enhance,
        "inhibit": inhibit,
    }

    def tolerances(model: Model, targets: Targets, key: Key[Array, ""]) -> Slack | None:
        if not slack:
            return None
        return slack_margins(model, targets, key, quantile=quantile, count=noise_images)

    factor = {"paper": 2.0, "code": 4.0}[variant] if enhance else 1.0
    optimizer = lambda scale: adam_with_plateau(learning_rate * scale, patience=260, floor=1e-4)
    return Recipe(
        name="dsg",
        settings=settings,
        batch=batch,
        source=Source(uniform if variant == "code" else gaussian),
        stages=(Stage(steps, optimizer),),
        terms=dsg_terms(variant, factor, inhibit),
        prepare=tolerances,
        condition=random_labels,
        per_layer=True,
    )


def dsg_terms(variant: Variant, factor: float, inhibit: float) -> tuple[Term, ...]:
    """The objective: slack match, image statistics, decorrelation, and the code's extra terms."""
    terms = [
        Term("slack match", 1.0, lambda o: enhanced(layer_losses(o, o.shared), factor)),
        Term("image", 1.0, image_statistics),
    ]
    if inhibit > 0:
        terms.append(Term("correlation", inhibit, lambda o: correlation(o.natural)))
    if variant == "code":
        terms += [
            Term("cross-entropy", 2.0, lambda o: cross_entropy(o.logits, o.labels), True),
            Term("variation", 0.01, lambda o: total_variation(o.natural)),
            Term("norm", 0.01, lambda o: image_norm(o.natural)),
        ]
    return tuple(terms)
