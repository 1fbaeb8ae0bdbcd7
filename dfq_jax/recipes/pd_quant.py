"""PD-Quant: QDrop that also looks at the prediction of the whole network.

Liu et al. 2023, "PD-Quant: Post-Training Quantization based on Prediction Difference Metric", and
its released code.
"""

from dfq_jax.numerics.rounding import adaround
from dfq_jax.reconstruction.method import (
    Correction,
    Penalty,
    Phase,
    Prediction,
    Rates,
    Reconstruction,
)


def pd_quant(
    *,
    steps: int = 20_000,
    batch: int = 32,
    weight: float = 0.01,
    prediction: float = 10.0,
    temperature: float = 4.0,
    closeness: float | None = 0.02,
) -> Reconstruction:
    """Block reconstruction with the divergence of predictions, from corrected inputs.

    Args:
      steps: of a block.
      batch: images a step.
      weight: of the penalty on undecided bits; 0.1 for MobileNetV2, 0.2 for MnasNet.
      prediction: weight of the divergence.
      temperature: of the predictions; 1 for MobileNetV2 and MnasNet.
      closeness: weight of recorded statistics when inputs are corrected; None leaves them as they
        are; 0.005 for MobileNetV2.

    Returns:
      The method.
    """
    return Reconstruction(
        name="pd_quant",
        rounding=adaround(),
        phases=(Phase(steps, input_once=True),),
        rates=Rates(bits=3e-3),
        penalty=Penalty(weight),
        batch=batch,
        prediction=Prediction(prediction, temperature),
        correction=None if closeness is None else Correction(closeness),
    )
