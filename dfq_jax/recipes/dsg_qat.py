"""DSG with training: GDFQ whose generator is held to statistics within tolerances.

Qin et al. 2023, "Diverse Sample Generation: Pushing the Limit of Generative Data-free
Quantization", its QAT. As the formulas mean it: released code draws gaps to the tolerance from both
sides, and takes the number of a layer for that of a channel. Of a batch that shares its statistics,
a layer that counts more for each sample is a factor of all, so there is no enhancement here.

    generator:  CE(t, y) + 0.1 BNS + SCI,
    BNS = 1/L sum_l |[ |m - mu| - delta_l ]+|^2 + |[ |v - sigma^2| - gamma_l ]+|^2   of the batch
    student:    as GDFQ's
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.recipes.gdfq import GDFQ_GENERATOR, gdfq
from dfq_jax.synthesis.terms.base import Observed, Term, label_entropy
from dfq_jax.synthesis.terms.match import batch_var_gap, beyond, squared_sum
from dfq_jax.synthesis.terms.slack import slack_margins
from dfq_jax.synthesis.terms.spectrum import spectral_correlation
from dfq_jax.training.generator import GeneratorKind
from dfq_jax.training.method import Training, generating
from dfq_jax.values import bound


def dsg_qat(
    *,
    steps: int = 79_200,
    batch: int = 200,
    learning_rate: float = 1e-4,
    warmup: int = 800,
    quantile: float = 0.9,
    noise_images: int = 256,
    statistics: float = 0.1,
    correlation: float = 1.0,
    kind: GeneratorKind = GDFQ_GENERATOR,
) -> Training:
    """DSG-QAT on GDFQ's schedule; for ImageNet `batch=16, learning_rate=1e-6, warmup=10_000`.

    Args:
      steps: of the student.
      batch: images of a step.
      learning_rate: of the student's SGD.
      warmup: steps of the generator alone.
      quantile: epsilon of the tolerances.
      noise_images: Gaussian images that measure them (how many is not published).
      statistics: weight of the batch norms.
      correlation: weight of the correlation of samples, which is over the number of batch norms.
      kind: of generator.
    """
    made = gdfq(steps=steps, batch=batch, learning_rate=learning_rate, warmup=warmup, kind=kind)
    terms = (
        Term("CE", 1.0, label_entropy, True),
        Term("BNS", statistics, slack_batch_match),
        Term("SCI", correlation, spectral_correlation),
    )
    margins = bound(slack_margins, quantile=quantile, count=noise_images, variances=True)
    return generating(made, "dsg_qat", terms=terms, prepare=margins)


def slack_batch_match(observed: Observed) -> Float[Array, ""]:
    """BNS: squared distance of the batch to every layer's moments beyond its tolerances."""
    gaps = (
        squared_sum(beyond(batch_var_gap(observed.stats[name], target), observed.shared[name]))
        for name, target in observed.targets.items()
    )
    return jnp.mean(jnp.stack(list(gaps)))
