"""Ours: from where learned rounding ends, all of the network at once.

Block reconstruction leaves what errors of blocks add up to. The student begins at its codes, steps
and biases, and learns by LSQ to say what the teacher says, and to make what its blocks make; as
many weights change their codes as the images ask for. It sees windows of many images, mirrored and
with windows of others in them: of few images as they are it learns by heart what tells nothing of
real ones. Rates, weights, windows and number of images were chosen on 5,000 training images of
CIFAR-10 (`docs/EXPERIMENTS.md`).

    KL(t, s; T = 2) + 20 FitNets,   FitNets = mean_l |x_T - x_S|^2 / var x_T   of block outputs
"""

import optax

from dfq_jax.synthesis.sources.augment import compose, cutmix, flip, resized_crop
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.level_rules import learned_steps
from dfq_jax.training.losses import block_outputs, distillation, feature_gap, score_gap
from dfq_jax.training.method import AtFactor, FixedImages, FixedRows, Training, rates_apart, to_zero
from dfq_jax.training.student import StudentKind

IMAGES, SMALL_IMAGES = 1024, 4096
"""As many as are made to learn from; of small ones more."""
ROWS = 128
"""Rows of ids or values, where a network reads such."""
PASTED = FixedImages(compose(resized_crop(smallest=0.5), flip(together=False), cutmix(chance=0.5)))
"""Half of an image at least, mirrored every other time, every other with a window of another."""


def best_training(
    *,
    steps: int = 2000,
    batch: int = 64,
    learning_rate: float = 1e-3,
    step_rate: float = 5e-4,
    temperature: float = 2.0,
    features: float = 20.0,
    average: float | None = None,
    n: int = SMALL_IMAGES,
    classes: bool = True,
    rows: bool = False,
) -> Training:
    """LSQ from a post-training result, on windows of images of ours, mirrored and mixed.

    Args:
      steps: of Adam.
      batch: images of a step.
      learning_rate: of kernels and biases; it falls to 0 along a cosine.
      step_rate: of step sizes, in units of each, likewise.
      temperature: of the KL.
      features: weight of what blocks put out; 0 for the outputs alone.
      average: weight of the past in the average that the result is; None for the last step.
      n: images that are made to learn from.
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
        images=FixedRows() if rows else PASTED,
        terms=best_losses(temperature, features, classes=classes),
        optimizer=rates_apart(weights, own_units, own_units),
        watch=block_outputs,
        average=average,
        start="post_training",
        recipe="best_unlabelled",
        n=ROWS if rows else n,
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
