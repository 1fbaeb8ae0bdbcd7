"""ClusterQ with training: GDFQ whose images of a class gather around a centre in the deep layers.

Gao et al. 2022, "Towards Feature Distribution Alignment and Diversity Enhancement for Data-Free
Quantization", as its formulas have it (`recipes.clusterq`); released code fills centres with the
recorded statistics and gives the diversity term no slope. Statistics are of single images, so that
classes share a batch.

    generator:  CE(t, y) + 0.1 BNS + 0.9 SFDA + 0.6 ICV
    student:    CE(s, y) + KL,   KL = T^2 / b sum p log p / q,  T = 20
"""

from dfq_jax.recipes.gdfq import GDFQ_GENERATOR, GENERATOR_TERMS, gdfq
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.synthesis.terms.clusters import after, alignment, followers, variation
from dfq_jax.training.generator import GeneratorKind
from dfq_jax.training.losses import distillation, label_loss
from dfq_jax.training.method import Training, generating
from dfq_jax.values import bound


def clusterq_qat(
    *,
    steps: int = 78_000,
    batch: int = 512,
    learning_rate: float = 1e-4,
    warmup: int = 2_000,
    align: float = 0.9,
    diversify: float = 0.6,
    rate: float = 0.2,
    noise: tuple[float, float] = (0.5, 1.0),
    temperature: float = 20.0,
    kind: GeneratorKind = GDFQ_GENERATOR,
) -> Training:
    """ClusterQ with its values for CIFAR-10: 400 epochs of 200 steps, centres from the tenth on.

    For CIFAR-100 it takes `batch=200`, for ImageNet `batch=16, learning_rate=1e-6, warmup=10_000`.

    Args:
      steps: of the student.
      batch: images of a step.
      learning_rate: of the student's SGD.
      warmup: steps of the generator alone, after which centres count.
      align: a2, weight of the distance to the centre of the class.
      diversify: a3, weight of the distance to a point drawn around it.
      rate: beta, by which centres follow the images.
      noise: deviations of that draw, of means and of deviations, absolute.
      temperature: of the KL.
      kind: of generator.
    """
    varied = bound(variation, noise=noise, relative=False)
    terms = (
        *GENERATOR_TERMS,
        Term("SFDA", align, bound(after, warmup, alignment), True),
        Term("ICV", diversify, bound(after, warmup, varied), True),
    )
    made = gdfq(steps=steps, batch=batch, learning_rate=learning_rate, warmup=warmup, kind=kind)
    kl = Term("KL", 1.0, distillation(temperature=temperature), True)
    student = made._replace(terms=(Term("CE", 1.0, label_loss, True), kl))
    return generating(student, "clusterq_qat", terms=terms, memory=followers(warmup, rate))
