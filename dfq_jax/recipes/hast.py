"""HAST: hard samples, made harder at every step, and attention of channels as in the teacher.

Li et al. 2023, "Hard Sample Matters a Lot in Zero-Shot Quantization", as released for CIFAR-10, but
that ranges of activations are found on the images themselves (`recipes.qat`).

    L(x) = alpha KL(x) + lambda FA(x),   x' = x + eps sign(d L / d x),   L(x) + L(x')

Its images are those of `hard_samples`.
"""

from dfq_jax.recipes.qat import CROPPED, EPOCH, STUDENT, falling_sgd
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.losses import branch_outputs, channel_attention, distillation
from dfq_jax.training.method import Training
from dfq_jax.training.wrappers import perturbed_images

EPOCHS, DROPS = 151, (20, 40, 60)


def hast(
    *,
    steps: int = 29_400,
    batch: int = 256,
    learning_rate: float = 1e-5,
    alpha: float = 20.0,
    temperature: float = 20.0,
    attention: float = 1000.0,
    reach: float = 0.01,
) -> Training:
    """HAST with its values for CIFAR-10: 147 epochs of 200 steps; 24 of them do most.

    The released code takes `attention=2000, reach=0.02` for CIFAR-100, and for ImageNet
    `attention=4000` in batches of 16.

    Args:
      steps: of SGD; its rate falls to a tenth at epochs 20, 40 and 60 of 151.
      batch: images of a step, four processes of 64 together.
      learning_rate: the first.
      alpha: weight of the KL, which is summed over classes.
      temperature: of the KL.
      attention: lambda, the weight of the attention of channels (FA).
      reach: eps, by which images are moved.
    """
    return Training(
        name="hast",
        steps=steps,
        batch=batch,
        student=STUDENT,
        images=CROPPED,
        terms=(
            Term("KL", alpha, distillation(temperature=temperature), True),
            Term("FA", attention, channel_attention()),
        ),
        optimizer=falling_sgd(learning_rate, steps, EPOCHS, DROPS),
        watch=branch_outputs,
        wrappers=(perturbed_images(reach=reach),),
        epoch=EPOCH,
        recipe="hard_samples",
    )
