"""IntraQ's student: fixed images that differ within their class, cropped anew at every step.

Zhong et al. 2022, "IntraQ: Learning Synthetic Images with Intra-Class Heterogeneity for Zero-Shot
Network Quantization", as released for CIFAR, but that ranges of activations are found on the images
themselves (`recipes.qat`), and labels are what the teacher says.

    CE(s, y) + alpha KL,   KL = T^2 / b sum p log p / q,   alpha = T = 20
"""

from dfq_jax.recipes.qat import CROPPED, EPOCH, STUDENT, falling_sgd
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.losses import distillation, label_loss
from dfq_jax.training.method import Training

EPOCHS, DROPS = 151, (20, 40, 60)


def intraq_qat(
    *,
    steps: int = 29_400,
    batch: int = 256,
    learning_rate: float = 1e-4,
    alpha: float = 20.0,
    temperature: float = 20.0,
    drops: tuple[int, ...] = DROPS,
) -> Training:
    """IntraQ's training with its values for CIFAR: 147 epochs of 200 steps.

    For ImageNet the released script takes `batch=16, learning_rate=1e-6, drops=(100, 200, 350)`.

    Args:
      steps: of SGD, all that 151 epochs have.
      batch: images of a step.
      learning_rate: the first.
      alpha: weight of the KL, which is summed over classes.
      temperature: of the KL.
      drops: epochs at which the rate falls to a tenth; those after the last do nothing.
    """
    return Training(
        name="intraq_qat",
        steps=steps,
        batch=batch,
        student=STUDENT,
        images=CROPPED,
        terms=(
            Term("CE", 1.0, label_loss, True),
            Term("KL", alpha, distillation(temperature=temperature), True),
        ),
        optimizer=falling_sgd(learning_rate, steps, EPOCHS, drops),
        epoch=EPOCH,
        recipe="intraq",
    )
