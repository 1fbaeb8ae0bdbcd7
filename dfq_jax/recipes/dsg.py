"""DSG: diverse images through tolerant statistics, one emphasised layer per sample, decorrelation.

Zhang et al. 2021, "Diversifying Sample Generation for Accurate Data-Free Quantization" (slack
distribution alignment, layerwise sample enhancement) and Qin et al. 2023, "Diverse Sample
Generation" (sample correlation inhibition). With statistics `m, s` of a sample and recorded ones
`mu, sigma` of a batch norm i, and `S` the cosines between flattened images:

    SDA_i = |[ |m - mu| - delta_i ]+|^2 + |[ |s - sigma| - gamma_i ]+|^2
    LSE   = 1/B sum_j sum_i (1 + [i = j mod N]) SDA_i(image j)
    SCI   = |S - I|_F^2 / B

    loss  = LSE + image + 0.01 SCI

`delta` and `gamma` are a quantile of the gaps that noise shows (`terms.slack`); `image` takes the
image for one more layer, as in ZeroQ.
"""

from typing import Literal

from jaxtyping import Array, Float, Key

from dfq_jax.graph.graph import Model
from dfq_jax.optim.schedules import adam_with_plateau, rated
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, random_labels, recorded
from dfq_jax.synthesis.sources.pixels import gaussian, uniform
from dfq_jax.synthesis.terms.base import (
    Observed,
    Term,
    image_statistics,
    label_entropy,
    natural_correlation,
    natural_norm,
    natural_variation,
)
from dfq_jax.synthesis.terms.match import enhanced, layer_losses
from dfq_jax.synthesis.terms.slack import slack_margins
from dfq_jax.synthesis.terms.targets import Targets
from dfq_jax.values import bound

Variant = Literal["paper", "code"]


@recorded
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
    factor = {"paper": 2.0, "code": 4.0}[variant] if enhance else 1.0
    optimizer = rated(adam_with_plateau, learning_rate, patience=260, floor=1e-4)
    return Recipe(
        name="dsg",
        batch=batch,
        source=Source(uniform if variant == "code" else gaussian),
        stages=(Stage(steps, optimizer),),
        terms=dsg_terms(variant, factor, inhibit),
        prepare=bound(slack_margins, quantile=quantile, count=noise_images) if slack else exactly,
        condition=random_labels,
        per_layer=True,
    )


def exactly(model: Model, targets: Targets, key: Key[Array, ""]) -> None:
    """No tolerances."""
    del model, targets, key


def slack_match(factor: float, observed: Observed) -> Float[Array, ""]:
    """SDA, distances beyond the tolerances; LSE, a layer counts more in each sample."""
    return enhanced(layer_losses(observed, observed.shared), factor)


def dsg_terms(variant: Variant, factor: float, inhibit: float) -> tuple[Term, ...]:
    """The objective, and the code's extra terms."""
    terms = [
        Term("LSE" if factor != 1 else "SDA", 1.0, bound(slack_match, factor)),
        Term("image", 1.0, image_statistics),
    ]
    if inhibit > 0:
        terms.append(Term("SCI", inhibit, natural_correlation))
    if variant == "code":
        terms += [
            Term("CE", 2.0, label_entropy, True),
            Term("TV", 0.01, natural_variation),
            Term("l2", 0.01, natural_norm),
        ]
    return tuple(terms)
