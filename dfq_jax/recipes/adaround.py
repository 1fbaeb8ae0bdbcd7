"""AdaRound: each weight learns whether to round up or down, layer by layer.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"; numbers as in
the AIMET library, to which its authors contribute.

The weights of the whole network are rounded before any activation is: what a layer reads comes from
the network with weights on their grids so far, and activations in float.
"""

from dfq_jax.numerics.rounding import adaround as learned_bits
from dfq_jax.reconstruction.method import Penalty, Phase, Reconstruction


def adaround(*, steps: int = 10_000, batch: int = 32, weight: float = 0.01) -> Reconstruction:
    """Soft bits per layer, activations in float everywhere.

    Args:
      steps: of a layer; AIMET takes 15,000 below 4 bits.
      batch: images a step.
      weight: of the penalty on undecided bits.

    Returns:
      The method.
    """
    return Reconstruction(
        name="adaround",
        rounding=learned_bits(),
        phases=(Phase(steps, edges=False, quantized=0.0, rough=1.0, weights_alone=True),),
        penalty=Penalty(weight, curve="cosine"),
        batch=batch,
        layers=True,
    )
