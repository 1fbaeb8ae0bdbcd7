"""AQuant: activations are rounded at learned borders, together with the kernels.

Li et al. 2022, "Efficient Adaptive Activation Rounding for Post-Training Quantization". A border of
each activation and input channel, affine in the code, takes the place of 1/2; the layer that makes
the channel takes it over when it is learned (`reconstruction.borders`), so integer kernels compute
with it. Borders of what sums and pooling make, and of what a block reads, no layer can take: these
stay at 1/2, where the paper computes borders at inference. Only the abstract of the paper and no
code could be read: form, steps and rates are ours.
"""

from dfq_jax.numerics.rounding import adaround
from dfq_jax.reconstruction.method import Penalty, Phase, Rates, Reconstruction


def aquant(
    *,
    steps: int = 20_000,
    batch: int = 32,
    learning_rate: float = 1e-3,
    weight: float = 0.01,
    quantized: float = 0.5,
) -> Reconstruction:
    """QDrop whose activations' borders learn as well.

    Args:
      steps: of a block.
      batch: images a step.
      learning_rate: of borders, in steps of the grid.
      weight: of the penalty on undecided bits.
      quantized: share of activations, and of the block's input, that are quantized.

    Returns:
      The method.
    """
    learned = Phase(steps, borders=True, quantized=quantized, rough=quantized, input_once=True)
    return Reconstruction(
        name="aquant",
        rounding=adaround(),
        phases=(learned,),
        rates=Rates(borders=learning_rate),
        penalty=Penalty(weight),
        batch=batch,
    )
