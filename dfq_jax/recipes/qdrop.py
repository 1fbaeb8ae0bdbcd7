"""QDrop: rounding and activations' steps together, half of the activations left in float.

Wei et al. 2022, "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training
Quantization".
"""

from dfq_jax.numerics.rounding import adaround
from dfq_jax.reconstruction.method import Penalty, Phase, Reconstruction


def qdrop(
    *, steps: int = 20_000, batch: int = 32, weight: float = 0.01, quantized: float = 0.5
) -> Reconstruction:
    """Block reconstruction with activations quantized at random.

    Args:
      steps: of a block.
      batch: images a step.
      weight: of the penalty on undecided bits; 0.1 for MobileNetV2, 0.2 for MnasNet.
      quantized: share of activations, and of the block's input, that are quantized.

    Returns:
      The method.
    """
    return Reconstruction(
        name="qdrop",
        rounding=adaround(),
        phases=(Phase(steps, quantized=quantized, rough=quantized, input_once=True),),
        penalty=Penalty(weight),
        batch=batch,
    )
