"""What GDFQ and those who followed it share: the student, its optimizer, its images.

Kernels end at their extremes at every step, ranges of activations are the extremes that images
show, slopes pass through rounding and clipping alike, batch norms keep their statistics and learn
scales and biases, and SGD has Nesterov's momentum and a weight decay of 1e-4. Which tensors are of
few bits is the plan's: `layers="zsq_all_rectified"` is as in released code, which rounds what
follows a ReLU for all that read it; with `zsq_all_low` shortcuts and pooling read it in float.
"""

import optax

from dfq_jax.synthesis.sources.augment import compose, flip, resized_crop
from dfq_jax.training.method import FixedImages, nesterov
from dfq_jax.training.student import StudentKind
from dfq_jax.values import Bound

EPOCH = 200
"""Steps that the papers call an epoch."""
CALIBRATING = 4
"""Epochs in which released code finds ranges on images of a throw-away generator."""
STUDENT = StudentKind(live=True)
"""Ranges stay as the images at hand show them: those of another generator take 800 steps more."""
CROPPED = FixedImages(compose(resized_crop(smallest=0.5), flip(together=False)))
"""Half of an image at least, and mirrored every other time (IntraQ, HAST, SynQ)."""


def falling_sgd(
    rate: float, steps: int, epochs: int, drops: tuple[int, ...]
) -> Bound[optax.GradientTransformation]:
    """SGD whose rate falls to a tenth at the same shares of any number of steps.

    Args:
      rate: the first.
      steps: of the student.
      epochs: of the paper, those in which the student stands still included.
      drops: epochs at which it falls.
    """
    shares = ((drop - CALIBRATING) / (epochs - CALIBRATING) for drop in drops)
    at = tuple(max(round(steps * share), 1) for share in shares)
    return nesterov(rate, decay=1e-4, drops=at)
