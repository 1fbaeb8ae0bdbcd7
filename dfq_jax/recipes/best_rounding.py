"""Our rounding: layers in closed form, then blocks by gradient from there.

The closed form (`quantize.closed_form`) makes up for the error of earlier layers and for means, and
may move codes anywhere; what remains to a gradient is how the layers of a block go together, and
the scales of activations. Codes learn straight through: on ResNet-20 at 2 bits 300 such steps
reach what 2,000 steps of soft bits do (`docs/RESULTS.md`).
"""

from dfq_jax.numerics.rounding import straight_through
from dfq_jax.quantize.closed_form import ClosedForm
from dfq_jax.quantize.learning import Phase, Rates, Reconstruction


def best_rounding(*, steps: int = 500, batch: int = 32) -> Reconstruction:
    """Codes and all scales of a block, from where its layers were solved.

    Args:
      steps: of a block.
      batch: images a step.

    Returns:
      The method.
    """
    return Reconstruction(
        name="best",
        rounding=straight_through(),
        phases=(Phase(steps),),
        rates=Rates(scale=1e-3, edges=1e-3, codes=1e-2),
        batch=batch,
        start=ClosedForm(),
        spare=True,
    )
