"""Our rounding: layers in closed form, then blocks by gradient from there.

The closed form (`quantize.closed_form`) makes up for the error of earlier layers and for means, and
may move codes anywhere; what remains to a gradient is how the layers of a block go together
(GENIE-M). What each of these is worth is measured in `docs/RESULTS.md`.
"""

from dfq_jax.numerics.rounding import adaround
from dfq_jax.quantize.closed_form import ClosedForm
from dfq_jax.quantize.learning import Penalty, Phase, Rates, Reconstruction


def best_rounding(*, steps: int = 2_000, batch: int = 32) -> Reconstruction:
    """Soft bits and all scales of a block, from where its layers were solved.

    Args:
      steps: of a block.
      batch: images a step.

    Returns:
      The method.
    """
    return Reconstruction(
        name="best",
        rounding=adaround(scale=True),
        phases=(Phase(steps),),
        rates=Rates(),
        penalty=Penalty(1.0),
        batch=batch,
        start=ClosedForm(),
        spare=True,
    )
