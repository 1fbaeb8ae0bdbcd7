"""GENIE-M: QDrop whose kernels' scales learn as well.

Jeon et al. 2023, "GENIE: Show Me the Data for Quantization", section 3.3, and its released code.
"""

from dfq_jax.numerics.rounding import adaround
from dfq_jax.reconstruction.method import Penalty, Phase, Reconstruction


def genie_m(
    *, steps: int = 20_000, batch: int = 32, weight: float = 1.0, quantized: float = 0.5
) -> Reconstruction:
    """Soft bits, scales of kernels and of activations, all at once.

    Args:
      steps: of a block.
      batch: images a step.
      weight: of the penalty on undecided bits, 100 times that of QDrop.
      quantized: share of activations, and of the block's input, that are quantized.

    Returns:
      The method.
    """
    return Reconstruction(
        name="genie_m",
        rounding=adaround(scale=True),
        phases=(Phase(steps, quantized=quantized, rough=quantized),),
        penalty=Penalty(weight),
        batch=batch,
    )
