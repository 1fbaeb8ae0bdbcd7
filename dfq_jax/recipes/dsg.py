"""DSG: diverse images through tolerant statistics and one emphasised layer per sample.

Zhang et al. 2021, "Diversifying Sample Generation for Accurate Data-Free Quantization" (slack
distribution alignment, layerwise sample enhancement), which is `dsg`; its journal version, Qin et
al. 2023, "Diverse Sample Generation", as released, is `dsg_journal` (sample correlation inhibition,
labels, priors). With statistics `m, s` of a sample and recorded ones `mu, sigma` of a batch norm i:

    SDA_i = |[ |m - mu| - delta_i ]+|^2 + |[ |s - sigma| - gamma_i ]+|^2
    LSE   = 1/B sum_j sum_i (1 + [i = j mod N]) SDA_i(image j)

    dsg          LSE + image
    dsg_journal  LSE' + image + SCI + 2 CE + 0.01 TV + 0.01 l2

`delta` and `gamma` are a quantile of the gaps that noise shows (`terms.slack`); `image` takes the
image for one more layer, as in ZeroQ; `LSE'` doubles gaps before they are squared, and leaves
samples beyond the number of layers plain; `SCI` is `terms.spectrum`'s.
"""

from dfq_jax.optim.schedules import adam_with_plateau, rated
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, random_labels, recorded
from dfq_jax.synthesis.sources.pixels import gaussian, uniform
from dfq_jax.synthesis.terms.base import (
    Term,
    image_statistics,
    label_entropy,
    natural_correlation,
    natural_norm,
    natural_variation,
)
from dfq_jax.synthesis.terms.slack import exactly, slack_margins, slack_match
from dfq_jax.synthesis.terms.spectrum import spectral_correlation
from dfq_jax.values import bound


@recorded
def dsg(
    *,
    steps: int = 500,
    batch: int = 1,
    learning_rate: float = 0.9,
    quantile: float = 0.9,
    noise_images: int = 256,
    slack: bool = True,
    enhance: bool = True,
    inhibit: float = 0.0,
) -> Recipe:
    """DSG's diverse images, as the conference paper has them: one for each batch norm.

    Args:
      steps: Adam steps; as many as the released code of the journal.
      batch: images optimised together, rounded to a multiple of the number of batch norms, which
        is the least.
      learning_rate: of Adam, in natural units; cut to a tenth on plateaus of 260 steps.
      quantile: epsilon of the tolerances.
      noise_images: Gaussian images that measure the tolerances (how many is not published).
      slack: slack distribution alignment; off gives exact matching.
      enhance: layerwise sample enhancement.
      inhibit: weight of the journal's correlation term in closed form (ours), e.g. 0.01.

    Returns:
      The recipe.
    """
    match = bound(slack_match, 2.0 if enhance else 1.0, once=False)
    terms = [Term("LSE" if enhance else "SDA", 1.0, match), Term("image", 1.0, image_statistics)]
    if inhibit > 0:
        terms.append(Term("SCI", inhibit, natural_correlation))
    return Recipe(
        name="dsg",
        batch=batch,
        source=Source(gaussian),
        stages=stages_of(steps, learning_rate),
        terms=tuple(terms),
        prepare=bound(slack_margins, quantile=quantile, count=noise_images) if slack else exactly,
        per_layer=True,
    )


@recorded
def dsg_journal(
    *,
    steps: int = 500,
    batch: int = 40,
    learning_rate: float = 0.9,
    quantile: float = 0.9,
    noise_images: int = 256,
) -> Recipe:
    """The journal's images, as released, but for jitter that its priors alone see.

    Args:
      steps: Adam steps.
      batch: images optimised together.
      learning_rate: as of `dsg`.
      quantile: likewise.
      noise_images: likewise.

    Returns:
      The recipe.
    """
    return Recipe(
        name="dsg_journal",
        batch=batch,
        source=Source(uniform),
        stages=stages_of(steps, learning_rate),
        terms=(
            Term("LSE", 1.0, bound(slack_match, 4.0, once=True)),
            Term("image", 1.0, image_statistics),
            Term("SCI", 1.0, spectral_correlation),
            Term("CE", 2.0, label_entropy, True),
            Term("TV", 0.01, natural_variation),
            Term("l2", 0.01, natural_norm),
        ),
        prepare=bound(slack_margins, quantile=quantile, count=noise_images),
        condition=random_labels,
    )


def stages_of(steps: int, learning_rate: float) -> tuple[Stage, ...]:
    """Adam, whose rate falls on plateaus."""
    return (Stage(steps, rated(adam_with_plateau, learning_rate, patience=260, floor=1e-4)),)
