"""Ours: from where learned rounding ends, all of the network at once.

Block reconstruction leaves what errors of blocks add up to. The student begins at its codes, steps
and biases, and learns by LSQ to say what the teacher says, and to make what its blocks make; as
many weights change their codes as the images ask for. Rates and weights are not chosen yet: that
takes an ablation on held-out training images (`benchmarks/training.py --choose`).

    KL(t, s; T = 2) + FitNets,   FitNets = mean_l |x_T - x_S|^2 / var x_T   of what blocks put out
"""

import optax

from dfq_jax.synthesis.sources.augment import flip
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.level_rules import learned_steps
from dfq_jax.training.losses import block_outputs, distillation, feature_gap, score_gap
from dfq_jax.training.method import AtFactor, FixedImages, FixedRows, Training, rates_apart, to_zero
from dfq_jax.training.student import StudentKind

IMAGES = 1024
"""As many as are made to learn from."""
ROWS = 128
"""Rows of ids or values, where a network reads such."""


def best_training(
    *,
    steps: int = 2000,
    batch: int = 64,
    learning_rate: float = 2e-4,
    step_rate: float = 1e-4,
    temperature: float = 2.0,
    features: float = 1.0,
    average: float | None = None,
    classes: bool = True,
    rows: bool = False,
) -> Training:
    """LSQ from a post-training result, on images of ours mirrored at random.

    Args:
      steps: of Adam.
      batch: images of a step.
      learning_rate: of kernels and biases; it falls to 0 along a cosine.
      step_rate: of step sizes, in units of each, likewise.
      temperature: of the KL.
      features: weight of what blocks put out; 0 for the outputs alone.
      average: weight of the past in the average that the result is; None for the last step.
      classes: whether outputs are scores of classes; the squared gap of outputs where they are
        not.
      rows: whether the network reads ids or plain values: it is shown rows as they are, those that
        a language model wrote itself.
    """
    weights: AtFactor = to_zero(optax.adam, learning_rate, steps)
    own_units: AtFactor = to_zero(optax.adam, step_rate, steps, relative=True)
    return Training(
        name="best",
        steps=steps,
        batch=batch,
        student=StudentKind(learned_steps(scaled=False), learned_steps(scaled=False, images=True)),
        images=FixedRows() if rows else FixedImages(flip(together=False)),
        terms=best_losses(temperature, features, classes=classes),
        optimizer=rates_apart(weights, own_units, own_units),
        watch=block_outputs,
        average=average,
        start="post_training",
        recipe="best_unlabelled",
        n=ROWS if rows else IMAGES,
    )


def best_losses(temperature: float, features: float, *, classes: bool) -> tuple[Term, ...]:
    """What a student of ours is told: to say what the teacher says, and make what its blocks make.

    Args:
      temperature: of the KL.
      features: weight of what blocks put out; 0 for the outputs alone.
      classes: whether outputs are scores of classes.
    """
    said = Term("KL", 1.0, distillation(temperature=temperature), True)
    told = said if classes else Term("outputs", 1.0, score_gap)
    return (told, Term("FitNets", features, feature_gap())) if features else (told,)
