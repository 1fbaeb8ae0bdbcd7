"""Our rounding for networks that no block can mend alone: all kernels, scales and biases at once.

MobileNetV2 loses most of its signal at 4 bits in the first blocks already, and what follows has to
learn to live with that: layers solved one after the other fit the ruins of what they should read.
Here the whole network learns, each block guided by its float counterpart (`quantize.guided`).
"""

from dfq_jax.numerics.rounding import straight_through
from dfq_jax.quantize.learning import Penalty, Phase, Rates, Reconstruction, relative_gap

RATES = Rates(bits=1e-2, scale=1e-3, edges=3e-3, biases=2e-3, relative=True, settling=True)


def together(*, steps: int = 400, batch: int = 16) -> Reconstruction:
    """Adam on codes, scales of kernels and activations, and biases of the whole network.

    Args:
      steps: of the whole network.
      batch: images a step.

    Returns:
      The method.
    """
    return Reconstruction(
        name="together",
        rounding=straight_through(),
        phases=(Phase(steps, biases=True, quantized=1.0, rough=1.0),),
        rates=RATES,
        penalty=Penalty(0.0),
        loss=relative_gap,
        batch=batch,
        merge=0,
        guided=True,
    )
