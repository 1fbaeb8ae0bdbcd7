"""AQuant: activations are rounded at learned borders, together with the kernels.

Li et al. 2022, "Efficient Adaptive Activation Rounding for Post-Training Quantization". Borders
are in the form that integer kernels can have: a border affine in the code is, but for its ends, a
gain and a shift of the channel before rounding, and those of the layer that made the channel. So
what is learned is each output channel's scale and bias, through the rounding of the activations
that follow.
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
    """QDrop whose layers' gains and shifts learn as well.

    Args:
      steps: of a block.
      batch: images a step.
      learning_rate: of gains, in units of each, and of shifts.
      weight: of the penalty on undecided bits.
      quantized: share of activations, and of the block's input, that are quantized.

    Returns:
      The method.
    """
    return Reconstruction(
        name="aquant",
        rounding=adaround(scale=True),
        phases=(Phase(steps, biases=True, quantized=quantized, rough=quantized, input_once=True),),
        rates=Rates(scale=learning_rate, biases=learning_rate, relative=True),
        penalty=Penalty(weight),
        batch=batch,
    )
