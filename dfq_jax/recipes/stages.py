"""Our rounding for few bits at large images: stage after stage, each guided by its float blocks.

MobileNetV2 loses most of its signal at 4 bits in the first blocks already. Layers solved one after
the other fit the ruins of what they should read, and blocks learned one after the other do not know
which of their errors those behind them can mend. A stage, all blocks of one resolution, learns at
once: it is drawn to what each of its blocks puts out in the float network
(`reconstruction.guided`), and reads what the stages before it made of the images. Early stages have
thousands of positions an image and need few of them at a time, and their layers are solved in
closed form before they learn; late ones are cheap, have few positions, and learn small sets by
heart: they read many images, most of them parts and collages of others, and the last one starts
from rounding to nearest.
"""

from dfq_jax.numerics.rounding import straight_through
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.method import Penalty, Phase, Rates, Reconstruction, relative_gap

RATES = Rates(bits=1e-3, scale=1e-3, edges=3e-3, biases=2e-3, relative=True, settling=True)
POSITIONS = 2**16
"""Of a stage's output, that its layers are solved for: about a hundred for each of their inputs."""
LINES = 448
"""Lines of positions a step: 4 images where they are 112 on a side, 32 where they are 14."""


def stages(*, steps: int = 300, batch: int = 32) -> Reconstruction:
    """Adam on codes, scales of kernels and activations, and biases of a stage.

    Args:
      steps: of a stage.
      batch: images a step at most.

    Returns:
      The method.
    """
    return Reconstruction(
        name="stages",
        rounding=straight_through(),
        phases=(Phase(steps, biases=True, quantized=1.0, rough=1.0),),
        rates=RATES,
        penalty=Penalty(0.0),
        loss=relative_gap,
        batch=batch,
        lines=LINES,
        merge="stage",
        start=ClosedForm(positions=POSITIONS),
        start_positions=2,
        guided=True,
    )
