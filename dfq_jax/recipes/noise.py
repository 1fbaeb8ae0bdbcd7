"""Images for networks that recorded no statistics: noise that looks a little like photographs.

VGG, ConvNeXt, vision transformers and networks of super-resolution have no batch norm to say what
they were trained on. Ranges from pink noise, and from discs of it that cover one another, are far
better than none: both have the spectrum of photographs, discs their surfaces and edges too. What
layers read of them on average is near enough to correct biases for rounded kernels by
(`quantization/kernel_shifts.py`). They are no evidence of what the network sees: rounding is not
learned from them, and reports say how little they prove.
"""

from dfq_jax.synthesis.recipe import Offer, Recipe, Source
from dfq_jax.synthesis.sources.collages import DISCS, scenes

NO_STATISTICS = (
    "this network has no usable batch-norm statistics to make images from: its ranges come from "
    "noise images (pink noise, and discs of it). Expect less accuracy than from statistics or real "
    "images, and try the result on data of your own"
)

NOISE_CHOSEN = (
    "the images are noise, as asked for: they tell little about how the network treats photographs"
)


def noise(*, batch: int = 32) -> Recipe:
    """Pink noise and discs of it that cover one another, in turn; nothing is optimised.

    Args:
      batch: images made at a time.

    Returns:
      The recipe.
    """
    return Recipe(
        name="noise",
        settings={"discs": DISCS},
        batch=batch,
        source=Source(scenes),
        bounded=True,
        evidence="noise",
    )


NOISE = Offer(noise, images=256, optimised=False)
