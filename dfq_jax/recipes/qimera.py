"""Qimera: GDFQ with codes between classes, whose images lie where the teacher decides.

Choi et al. 2021, "Qimera: Data-free Quantization with Synthetic Boundary Supporting Samples"
(`training.superposed`), as in the paper: with the linear map that the released scripts leave out,
and vectors of classes that begin as the rows of the teacher's classifier.

    generator:  CE(t, y) + 0.1 BNS,        y soft where classes are mixed
    student:    CE(s, y) + T^2 KL / (b K),   T = 20
"""

from dfq_jax.recipes.gdfq import gdfq
from dfq_jax.training.generator import GeneratorKind
from dfq_jax.training.method import Training
from dfq_jax.training.superposed import superposed_classes


def qimera(
    *,
    steps: int = 79_200,
    batch: int = 200,
    learning_rate: float = 1e-4,
    warmup: int = 800,
    mixed: int = 2,
    chance: float = 0.4,
    width: int = 64,
    length: int = 64,
    rows: bool = True,
    by_class: bool = False,
) -> Training:
    """Qimera with its values for CIFAR-10; the schedule is GDFQ's.

    The released scripts take `mixed=10` for CIFAR-100; for ImageNet `batch=16, learning_rate=1e-6,
    warmup=10_000, length=100, by_class=True` with `mixed=500` for ResNet-18, `chance=0.7,
    mixed=500` for ResNet-50, `mixed=100` for MobileNetV2; and vectors drawn at random (`rows=False`
    with `width` 64 for CIFAR-10, 512 for ResNet-18, 1280 for MobileNetV2).

    Args:
      steps: of the student.
      batch: images of a step.
      learning_rate: of the student's SGD.
      warmup: steps of the generator alone.
      mixed: classes of a superposed code.
      chance: that a step's codes are superposed.
      width: of a class's vector, where it is drawn at random.
      length: of a code.
      rows: vectors begin as the rows of the teacher's classifier, if that is a linear layer or a
        convolution of 1x1.
      by_class: norms of the generator have scales of their own for each class.
    """
    codes = superposed_classes(mixed=mixed, chance=chance, width=width, length=length, rows=rows)
    made = gdfq(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        warmup=warmup,
        kind=GeneratorKind(*codes, length=length, by_class=by_class),
    )
    return made._replace(name="qimera")
