"""Vertical layers: one network that serves every width, its kernels cut to as many bits as wanted.

Wu et al. 2022, "Vertical Layering of Quantized Neural Networks for Heterogeneous Inference", of
which the abstract is public: one set of weights, widths cut from one another, all trained at once.
Formulas are ours (`numerics.bit_planes`), as is that every width learns from the float network at
every step, with equal weights; losses and rates are those of `best_training`.

    q_b = q_8 >> (8 - b),   w_b = t_b (q_b + 1/2),   loss = sum_b KL(t, s_b; T = 2) + FitNets_b

Steps `t_b` of output channels and biases are each width's own, which are norms of its own, folded.
Layers that the preset keeps at 8 bits are not cut. `dfq narrow OUT --bits 4 -o small.onnx` writes
the file of a width; in Python `parts.narrowed(result.vertical, 4)`.
"""

import optax

from dfq_jax.recipes.best_training import IMAGES, best_losses
from dfq_jax.synthesis.sources.augment import flip
from dfq_jax.training.level_rules import as_calibrated
from dfq_jax.training.losses import block_outputs
from dfq_jax.training.method import FixedImages, Training, to_zero
from dfq_jax.training.student import StudentKind


def vertical_layered(
    *,
    steps: int = 2000,
    batch: int = 64,
    learning_rate: float = 2e-4,
    widths: tuple[int, ...] = (6, 4, 3, 2),
    temperature: float = 2.0,
    features: float = 1.0,
    classes: bool = True,
) -> Training:
    """All widths at once, from 8-bit kernels rounded to nearest.

    Args:
      steps: of Adam; each takes a pass of every width.
      batch: images of a step.
      learning_rate: of kernels, biases and gains of steps; it falls to 0 along a cosine.
      widths: beside 8 bits, from 7 down to 1, the widest first.
      temperature: of the KL.
      features: weight of what blocks put out; 0 for the outputs alone.
      classes: whether outputs are scores of classes; the squared gap of outputs where they are
        not.
    """
    return Training(
        name="vertical_layered",
        steps=steps,
        batch=batch,
        student=StudentKind(kernels=as_calibrated(), widths=tuple(widths)),
        images=FixedImages(flip(together=False)),
        terms=best_losses(temperature, features, classes=classes),
        optimizer=to_zero(optax.adam, learning_rate, steps),
        watch=block_outputs,
        recipe="best_unlabelled",
        n=IMAGES,
    )
