"""FlexRound: kernels are divided by learned numbers before they are rounded to nearest.

Lee et al. 2023, "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training
Quantization".
"""

from dfq_jax.numerics.rounding import flexround as division
from dfq_jax.reconstruction.method import Phase, Rates, Reconstruction


def flexround(
    *, steps: int = 5_000, batch: int = 32, learning_rate: float = 4e-4, quantized: float = 0.5
) -> Reconstruction:
    """Divisors, scales of kernels and of activations, with QDrop's activations.

    Args:
      steps: of a block.
      batch: images a step.
      learning_rate: of divisors and scales of kernels.
      quantized: share of activations, and of the block's input, that are quantized.

    Returns:
      The method.
    """
    return Reconstruction(
        name="flexround",
        rounding=division(),
        phases=(Phase(steps, quantized=quantized, rough=quantized, input_once=True),),
        rates=Rates(bits=learning_rate, scale=learning_rate),
        batch=batch,
    )
