"""Our rounding: layers in closed form, then blocks by gradient from there.

The closed form (`reconstruction.closed_form`) makes up for the error of earlier layers and for
means, and may move codes anywhere; what remains to a gradient is how the layers of a block go
together, scales and biases. Soft bits go from what the closed form would have, between the codes on
either side of it, at twenty times the rate of the papers, whose steps are twenty times as many
(`docs/RESULTS.md`).
"""

from dfq_jax.numerics.rounding import adaround
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.method import Penalty, Phase, Rates, Reconstruction


def best_rounding(*, steps: int = 1000, batch: int = 32) -> Reconstruction:
    """Bits, scales and biases of a block, from where its layers were solved.

    Args:
      steps: of a block.
      batch: images a step.

    Returns:
      The method.
    """
    return Reconstruction(
        name="best",
        rounding=adaround(scale=True),
        phases=(Phase(steps, biases=True),),
        rates=Rates(bits=2e-2, scale=1e-3, edges=1e-4, relative=True),
        penalty=Penalty(1.0),
        batch=batch,
        start=ClosedForm(),
        spare=True,
    )
