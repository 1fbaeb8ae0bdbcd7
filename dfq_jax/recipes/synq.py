"""SynQ: smooth images, hard labels for easy images alone, and the teacher's class activation maps.

Kim et al. 2025, "SynQ: Accurate Zero-shot Quantization by Synthesis-aware Fine-tuning". Released
code differs by networks in whether perturbed images count for the attention of channels, and makes
its images around class centres; here they do, and images are those of `hard_samples`, which it
builds on too. Ranges of activations are found on the images themselves (`recipes.qat`).

    low-pass   x = F^-1[F[x] exp(-D^2 / 2 D0^2)]
    loss       alpha KL + lambda FA + CE of easy images + CAM,   at x and at x + eps sign(d L / d x)
"""

from dfq_jax.recipes.qat import CROPPED, EPOCH, STUDENT, falling_sgd
from dfq_jax.synthesis.sources.augment import compose
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.activation_maps import activation_map_loss, feature_map
from dfq_jax.training.frequencies import low_pass
from dfq_jax.training.losses import (
    branch_outputs,
    channel_attention,
    distillation,
    easy_label_loss,
    watched_by,
)
from dfq_jax.training.method import FixedImages, Training
from dfq_jax.training.wrappers import perturbed_images

EPOCHS, DROPS = 104, (20, 40, 60)


def synq(
    *,
    steps: int = 20_000,
    batch: int = 256,
    learning_rate: float = 1e-5,
    alpha: float = 20.0,
    temperature: float = 20.0,
    attention: float = 1000.0,
    labels: float = 0.5,
    hardest: float = 0.7,
    maps: float = 50.0,
    reach: float = 0.01,
    radius: float = 80 / 224,
) -> Training:
    """SynQ with its values for CIFAR-10: 100 epochs of 200 steps.

    For ImageNet the released script takes `batch=16, learning_rate=1e-6, attention=4000,
    hardest=0.5`.

    Args:
      steps: of SGD; its rate falls as HAST's does.
      batch: images of a step.
      learning_rate: the first; HAST's for CIFAR, which SynQ starts from.
      alpha: weight of the KL, which is summed over classes.
      temperature: of the KL.
      attention: weight of the attention of channels (FA).
      labels: weight of the cross-entropy.
      hardest: tau, the most that the teacher may doubt an image whose label counts: 1 - p_y.
      maps: weight of the class activation maps (CAM).
      reach: eps, by which images are moved.
      radius: D0 of the low-pass filter as a share of the image's side: 80 of 224 pixels.
    """
    return Training(
        name="synq",
        steps=steps,
        batch=batch,
        student=STUDENT,
        images=FixedImages(compose(low_pass(radius=radius), CROPPED.augment)),
        terms=(
            Term("KL", alpha, distillation(temperature=temperature), True),
            Term("FA", attention, channel_attention()),
            Term("CE", labels, easy_label_loss(hardest=hardest), True),
            Term("CAM", maps, activation_map_loss, True),
        ),
        optimizer=falling_sgd(learning_rate, steps, EPOCHS, DROPS),
        watch=watched_by(branch_outputs, feature_map),
        wrappers=(perturbed_images(reach=reach),),
        epoch=EPOCH,
        recipe="hard_samples",
    )
