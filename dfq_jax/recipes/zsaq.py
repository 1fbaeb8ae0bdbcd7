"""ZSAQ: a language model on few bits learns from a generator that looks for where it is wrong.

Zhu et al. 2023, "Zero-Shot Sharpness-Aware Quantization for Pre-trained Language Models". Neither
code nor its rates could be read: the numbers are ours, its distance is KL of the next token, and
the generator is the network itself, whose chances of tokens are shown as mixtures of what tokens
stand for. With a generator `phi`, a map `A` of its features, and a student `theta`:

    min_theta max_phi D,   D = KL(P(A(G_phi(z))), Q_theta(A(G_phi(z))))
    phi   <- phi + a grad D(theta),   theta <- theta - b grad D(theta + rho g / |g|),  g = grad D
"""

import optax

from dfq_jax.recipes.best_training import ROWS
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.level_rules import as_calibrated
from dfq_jax.training.losses import distillation
from dfq_jax.training.method import SoftRows, Training, milestones
from dfq_jax.training.student import StudentKind
from dfq_jax.training.wrappers import sharpness_aware


def zsaq(
    *,
    steps: int = 1000,
    batch: int = 16,
    learning_rate: float = 2e-4,
    generator_rate: float = 1e-5,
    reach: float = 0.05,
) -> Training:
    """ZSAQ, one step of the generator for each of the student.

    Args:
      steps: of both.
      batch: rows of a step.
      learning_rate: of the student's Adam. A Llama of 260,000 weights at W3A8, 100 steps of 8 rows:
        KL on rows it wrote itself went from 0.725 to 0.463 nats; 60 steps at 1e-3 made it worse.
      generator_rate: of the generator's and its map's.
      reach: rho; 0 for a student that descends where it is.
    """
    return Training(
        name="zsaq",
        steps=steps,
        batch=batch,
        student=StudentKind(kernels=as_calibrated()),
        images=SoftRows(milestones(optax.adam, generator_rate, ())),
        terms=(Term("D", 1.0, distillation(), True),),
        optimizer=milestones(optax.adam, learning_rate, ()),
        wrappers=(sharpness_aware(reach=reach),) if reach else (),
        start="post_training",
        n=ROWS,
    )
