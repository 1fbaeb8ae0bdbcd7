"""BRECQ: AdaRound by residual blocks, then the steps of activations.

Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction".

It walks through the network twice: weights of all units first, with activations in float
everywhere, then the steps of all activations. The first layer keeps 8 bits, rounded to nearest.
Errors are weighed by slopes of the prediction, as the paper tells; its released script leaves that
out (`fisher=False`). Ranges of activations are those of the float network, where the released code
finds them behind rounded weights.
"""

from dfq_jax.numerics.rounding import adaround
from dfq_jax.reconstruction.method import (
    Penalty,
    Phase,
    Rates,
    Reconstruction,
    fisher_gap,
    squared_gap,
)


def brecq(
    *,
    steps: int = 20_000,
    edge_steps: int | None = None,
    batch: int = 32,
    weight: float = 0.01,
    merge: int = 1,
    layers: bool = False,
    fisher: bool = True,
    skip_first: bool = True,
) -> Reconstruction:
    """Rounding with activations in float, then scales of activations with rounding done.

    Args:
      steps: of the first phase.
      edge_steps: of the second; None for a quarter of the first, as in the paper.
      batch: images a step.
      weight: of the penalty on undecided bits; 0.1 for MobileNetV2.
      merge: blocks that make a unit (the paper's stages).
      layers: learn layer by layer instead of by units.
      fisher: weigh errors by slopes of the prediction.
      skip_first: learn nothing of the first layer, as released.

    Returns:
      The method.
    """
    return Reconstruction(
        name="brecq",
        rounding=adaround(),
        phases=(
            Phase(steps, edges=False, quantized=0.0, rough=1.0, weights_alone=True),
            Phase(edge_steps or max(steps // 4, 1), kernels=False, quantized=1.0, rough=1.0),
        ),
        rates=Rates(edges=4e-4),
        penalty=Penalty(weight),
        batch=batch,
        merge=merge,
        layers=layers,
        skip_first=skip_first,
        loss=fisher_gap if fisher else squared_gap,
        fisher=fisher,
    )
