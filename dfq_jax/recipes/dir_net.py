"""DIR-Net: IR-Net with an estimator in two stages, and features like the teacher's.

Qin et al. 2023, "Distribution-sensitive Information Retention for Accurate Binary Neural Network".
Its formulas are not public; this is how its abstract can be read. Information maximized
binarization is IR-Net's. The distribution-sensitive two-stage estimator stays gentle for half of
the steps, then grows steeper, and reads activations in units of their own deviation. Representation
binarization-aware distillation draws what blocks attend to towards the teacher's.

    student:    KL(t, s) + lambda sum_l mean (a_T / |a_T| - a_S / |a_S|)^2,   a = mean_c x^2
"""

from dfq_jax.recipes.ir_net import ir_net
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.binary import balanced_signs, error_decay, signed_activations
from dfq_jax.training.level_rules import as_calibrated
from dfq_jax.training.losses import block_outputs, spatial_attention
from dfq_jax.training.method import Training
from dfq_jax.training.student import StudentKind


def dir_net(
    *,
    steps: int = 156_000,
    batch: int = 128,
    learning_rate: float = 3e-3,
    rest: float = 0.5,
    attention: float = 1000.0,
    temperature: float = 1.0,
    activations: bool = False,
) -> Training:
    """DIR-Net on IR-Net's schedule.

    Args:
      steps: of SGD.
      batch: images of a step.
      learning_rate: the first.
      rest: share of the steps in which the estimator stays as gentle as it begins.
      attention: lambda, the weight of what blocks attend to, which is a mean over places.
      temperature: of the KL.
      activations: they are on signs too.
    """
    made = ir_net(steps=steps, batch=batch, learning_rate=learning_rate, temperature=temperature)
    decay = error_decay(rest=rest)
    rule = signed_activations(decay, in_deviations=True) if activations else as_calibrated()
    return made._replace(
        name="dir_net",
        student=StudentKind(edges=rule, live=True, own_norms=True, signs=balanced_signs(decay)),
        terms=(*made.terms, Term("RBD", attention, spatial_attention())),
        watch=block_outputs,
    )
