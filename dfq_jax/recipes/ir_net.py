"""IR-Net: balanced binary weights, and an estimator of signs that grows steeper.

Qin et al. 2020, "Forward and Backward Information Retention for Accurate Binary Neural Networks",
with its steps for CIFAR-10, but without its data: images are synthetic, the student begins at the
float network and learns what that says. Norms begin with statistics of the binary network and keep
them; their scales and biases learn. From there the paper's rate of 0.1 diverges, which trains from
scratch. The shortcuts around every convolution are those of the network.

    w = standardised W,   sign(w) 2^round(log2 mean |w|),   d sign(x) / dx = k t (1 - tanh^2(t x))
    student:    KL(t, s)

Kernels of 1 bit are the plan's (`scheme="w1"`, 1/32). Binary activations (1/1) have no file, so
they are Python's:

    signed = with_hard_tanh(model)
    student = on_binary_activations(dfq(signed, images, Scheme(1, 2), layers).quantized, images)
    setup = TrainingSetup(images, held_out, key)
    trained(student, teacher, ir_net(activations=True), setup, unfolded=signed)
"""

from dfq_jax.recipes.qat import CROPPED
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.binary import balanced_signs, error_decay, signed_activations
from dfq_jax.training.level_rules import as_calibrated
from dfq_jax.training.losses import distillation
from dfq_jax.training.method import Training, cosine_sgd
from dfq_jax.training.student import StudentKind


def ir_net(
    *,
    steps: int = 156_000,
    batch: int = 128,
    learning_rate: float = 3e-3,
    low: float = 1e-3,
    high: float = 10.0,
    temperature: float = 1.0,
    activations: bool = False,
) -> Training:
    """IR-Net with its steps for CIFAR-10: 400 epochs of 390 steps.

    Args:
      steps: of SGD with a momentum of 0.9 and a weight decay of 1e-4.
      batch: images of a step.
      learning_rate: the first, ours; it falls to 0 along a cosine.
      low: t_min of the estimator.
      high: t_max.
      temperature: of the KL (ours: the paper learns labels).
      activations: they are on signs too.
    """
    decay = error_decay(low=low, high=high)
    edges = signed_activations(decay) if activations else as_calibrated()
    return Training(
        name="ir_net",
        steps=steps,
        batch=batch,
        student=StudentKind(edges=edges, live=True, own_norms=True, signs=balanced_signs(decay)),
        images=CROPPED,
        terms=(Term("KL", 1.0, distillation(temperature=temperature), True),),
        optimizer=cosine_sgd(learning_rate, steps, decay=1e-4, nesterov=False),
        recipe="best_unlabelled",
    )
