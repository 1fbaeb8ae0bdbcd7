"""AAC and ABN with training: GDFQ whose ranges end at class peaks, from norms estimated anew.

He et al. 2022, "Data-Free Quantization with Accurate Activation Clipping and Adaptive Batch
Normalization". Ranges of activations are the extremes of images that excite classes
(`recipes.aac`), and stay; means and variances behind rounding take the place of those recorded
before the student begins. No code exists: how norms are estimated, and that it is done once, are
ours. Norms are folded, since rounding moves them apart from what they recorded.

    generator, student:  as GDFQ's
"""

from dfq_jax.recipes.gdfq import GDFQ_GENERATOR, gdfq
from dfq_jax.training.generator import GeneratorKind
from dfq_jax.training.method import Training
from dfq_jax.training.student import StudentKind


def aac_abn(
    *,
    steps: int = 79_200,
    batch: int = 200,
    learning_rate: float = 1e-4,
    warmup: int = 800,
    kind: GeneratorKind = GDFQ_GENERATOR,
) -> Training:
    """AAC and ABN on GDFQ's schedule; for ImageNet `batch=16, learning_rate=1e-6, warmup=10_000`.

    Args:
      steps: of the student.
      batch: images of a step.
      learning_rate: of the student's SGD.
      warmup: steps of the generator alone.
      kind: of generator.
    """
    made = gdfq(steps=steps, batch=batch, learning_rate=learning_rate, warmup=warmup, kind=kind)
    return made._replace(name="aac_abn", student=StudentKind(), recipe="aac", reestimate=True)
