"""Ours: what is left of a pruned network learns from the whole one, in float.

Layers fitted anew leave what errors of layers add up to. All weights learn at once, to say what
the whole network says and to make what its blocks make, on windows of images of ours, mirrored at
random. Rate, weight and windows were chosen on 5,000 training images of CIFAR-10 (JPEG).

    KL(t, s; T = 2) + 20 FitNets,   FitNets = mean_l |x_T - x_S|^2 / var x_T   of block outputs
"""

import optax

from dfq_jax.recipes.best_training import PASTED, ROWS, SMALL_IMAGES, best_losses
from dfq_jax.training.losses import block_outputs
from dfq_jax.training.method import FixedRows, Training, to_zero
from dfq_jax.training.student import StudentKind


def retraining(
    *,
    steps: int = 2000,
    batch: int = 64,
    learning_rate: float = 2e-3,
    temperature: float = 2.0,
    features: float = 20.0,
    n: int = SMALL_IMAGES,
    classes: bool = True,
    rows: bool = False,
) -> Training:
    """The training behind `dfq compress --train`.

    Args:
      steps: of Adam.
      batch: images of a step.
      learning_rate: of all parameters; it falls to 0 along a cosine.
      temperature: of the KL.
      features: weight of what blocks put out; 0 for the outputs alone.
      n: images that are made to learn from.
      classes: whether outputs are scores of classes; the squared gap of outputs where they are
        not.
      rows: whether the network reads ids or plain values: it is shown rows as they are.
    """
    return Training(
        name="retraining",
        steps=steps,
        batch=batch,
        student=StudentKind(live=True),
        images=FixedRows() if rows else PASTED,
        terms=best_losses(temperature, features, classes=classes),
        optimizer=to_zero(optax.adam, learning_rate, steps),
        watch=block_outputs,
        recipe="best_unlabelled",
        n=ROWS if rows else n,
    )
