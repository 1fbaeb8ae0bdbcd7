"""LQ-Nets with training: kernels and activations on learned levels, which follow the kernels.

Zhang et al. 2018, "LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural
Networks", without its data: images are synthetic and labels are what the float network says. It
begins at `recipes.lq_nets`; bases of kernels are solved anew at every step
(`training.level_rules.solved_anew`), those of activations stay as fitted, where the paper lets both
follow with a moving average. There is no file for such networks, so there is no `dfq train` for it:

    student = lq_nets(made, images).quantized
    setup = TrainingSetup(images, held_out, key)
    trained(student, made.reference, lq_nets_qat(steps=1000), setup)
"""

from dfq_jax.recipes.qat import CROPPED
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.level_rules import solved_anew, within_levels
from dfq_jax.training.losses import label_loss
from dfq_jax.training.method import Training, momentum
from dfq_jax.training.student import StudentKind

EPOCHS, DROPS = 110, (30, 60, 85, 95, 105)


def lq_nets_qat(
    *,
    steps: int = 22_000,
    batch: int = 256,
    learning_rate: float = 0.1,
    turns: int = 2,
) -> Training:
    """LQ-Nets' training with its values for ImageNet; epochs of 200 steps are ours.

    Args:
      steps: of SGD with a weight decay of 5e-5, of which the paper's 110 epochs are made.
      batch: images of a step.
      learning_rate: the first; it falls to a tenth at epochs 30, 60, 85, 95 and 105.
      turns: of the fit of a kernel's basis at a step.
    """
    drops = tuple(max(steps * drop // EPOCHS, 1) for drop in DROPS)
    return Training(
        name="lq_nets_qat",
        steps=steps,
        batch=batch,
        student=StudentKind(solved_anew(turns=turns), within_levels()),
        images=CROPPED,
        terms=(Term("CE", 1.0, label_loss, True),),
        optimizer=momentum(learning_rate, decay=5e-5, drops=drops),
        recipe="best_unlabelled",
    )
