"""AIT: the teacher's word alone, and updates as large as it takes to change codes.

Choi et al. 2022, "It's All In the Teacher: Zero-Shot Quantization Brought Closer to the Teacher",
on images of GDFQ's generator. Labels are left out, whose loss is steep where that of the teacher's
word is flat; kernels move until a share of their codes changes (`training.inflation`). The share
falls as GDFQ's rates do, and no update is made smaller: the paper's own course of it is not known
here.

    student:    alpha KL,   KL = T^2 / (b K) sum p log p / q,   T = 20
"""

from dfq_jax.recipes.gdfq import GDFQ_GENERATOR, gdfq, quarters
from dfq_jax.training.generator import GeneratorKind
from dfq_jax.training.inflation import falling_share
from dfq_jax.training.method import Training, nesterov


def ait(
    *,
    steps: int = 79_200,
    batch: int = 200,
    learning_rate: float = 1e-4,
    warmup: int = 800,
    share: float = 1e-3,
    kind: GeneratorKind = GDFQ_GENERATOR,
) -> Training:
    """AIT on GDFQ; for ImageNet `batch=16, warmup=10_000, kind=GDFQ_BY_CLASS`.

    Args:
      steps: of the student.
      batch: images of a step.
      learning_rate: of SGD without weight decay; it stays, since updates are made larger.
      warmup: steps of the generator alone.
      share: of each kernel's codes that change in a step, at first.
      kind: of generator.
    """
    made = gdfq(steps=steps, batch=batch, warmup=warmup, kind=kind)
    return made._replace(
        name="ait",
        terms=tuple(term for term in made.terms if term.name == "KL"),
        optimizer=nesterov(learning_rate),
        inflation=falling_share(share, drops=quarters(steps + warmup)),
    )
