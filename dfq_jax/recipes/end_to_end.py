"""Scales and biases of the whole network at once, all codes as they are.

What block reconstruction leaves is the error that blocks add up to; a few hundred numbers, which
do not overfit as codes would, could take some of it back. It never showed in accuracy
(`docs/RESULTS.md`), so that no preset does it. The target are the float network's logits: its
class probabilities say little on images that it is sure of.

Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
section 3.3: block-wise training of everything, then end-to-end training of scales.
"""

from dfq_jax.numerics.rounding import rescaled
from dfq_jax.reconstruction.method import Penalty, Phase, Rates, Reconstruction, relative_gap

STEPS = 300
"""Few: what learns here follows the images, and those are synthetic."""


def end_to_end(*, steps: int = STEPS, batch: int = 32) -> Reconstruction:
    """Adam on scales of kernels and activations, and on biases.

    Args:
      steps: of the whole network.
      batch: images a step.

    Returns:
      The method, to follow one that chooses codes.
    """
    return Reconstruction(
        name="end_to_end",
        rounding=rescaled(),
        phases=(Phase(steps, biases=True, quantized=1.0, rough=1.0),),
        rates=Rates(scale=1e-3, edges=1e-3, relative=True),
        penalty=Penalty(0.0),
        loss=relative_gap,
        batch=batch,
        merge=0,
        spare=True,
    )
