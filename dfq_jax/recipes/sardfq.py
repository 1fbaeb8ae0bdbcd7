"""SARDFQ: images that a vision transformer attends to in places, with several classes in each.

Zhong et al. 2025, "Semantic Alignment and Reinforcement for Data-Free Quantization of Vision
Transformers", as its text can be read; no code of it was. It needs no batch norm. With `A` the
attention of the class token in block `l` of `L` and head `h`, and `y` soft labels:

    APA  = sum_{l >= L/2} l/L sum_h MSE(A_{l,h}, map of up to 5 Gaussians)
    SL   = CE of whole images,   MSR = CE of 1 to 4 crops of each, with labels of their own
    loss = alpha APA + SL + MSR + 0.05 TV,   y = softmax(u e_class),  u ~ U(5, 10)

Its optimizer's rate and momenta are those of PSAQ-ViT.
"""

from dfq_jax.optim.schedules import adam_to_zero, rated
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, recorded
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Term, natural_variation
from dfq_jax.synthesis.terms.semantics import (
    attention_prior,
    attention_weights,
    crop_entropy,
    prior_of,
    soft_label_entropy,
    soft_semantics,
)


@recorded
def sardfq(
    *,
    steps: int = 1000,
    batch: int = 32,
    learning_rate: float = 0.2,
    attention: float = 1000.0,
    labels: float = 1.0,
    crops: float = 1.0,
    variation: float = 0.05,
) -> Recipe:
    """SARDFQ's images.

    Args:
      steps: of Adam.
      batch: images optimised together.
      learning_rate: highest of Adam, in natural units.
      attention: alpha, which the paper searches in 1..1e5 for each network; the value is ours.
      labels: weight of the classes of whole images.
      crops: weight of those of crops; 0 saves their forward pass.
      variation: weight of total variation.

    Returns:
      The recipe.
    """
    optimizer = rated(adam_to_zero, learning_rate, steps=steps, b1=0.5, b2=0.9)
    reinforced = (Term("MSR", crops, crop_entropy, True),) if crops else ()
    return Recipe(
        name="sardfq",
        batch=batch,
        source=Source(gaussian),
        stages=(Stage(steps, optimizer),),
        terms=(
            Term("APA", attention, attention_prior),
            Term("SL", labels, soft_label_entropy, True),
            *reinforced,
            Term("TV", variation, natural_variation),
        ),
        prepare=prior_of,
        condition=soft_semantics,
        watch=attention_weights,
        bounded=True,
        statistics=False,
    )
