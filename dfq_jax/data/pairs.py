"""Images with the images they should become, and how near a network comes to those."""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Array, Float, UInt8

from dfq_jax.errors import UsageError
from dfq_jax.graph.tasks import ImageToImage
from dfq_jax.numerics.measures import psnr
from dfq_jax.types import InputContract

Pixels = UInt8[np.ndarray, "h w c"]
Runner = Callable[[Float[np.ndarray, "1 h w c"]], Float[np.ndarray | Array, "1 oh ow c"]]


def psnr_of_pairs(
    run: Runner, pairs: Iterable[tuple[Pixels, Pixels]], contract: InputContract, task: ImageToImage
) -> float:
    """Mean PSNR of a network's outputs to the images that are wanted, in dB.

    Args:
      run: the network, one normalised image at a time, each of its own size.
      pairs: (what it reads, what should come out), pixels of 0..255; what is wanted may be larger
        by less than the network enlarges, at the right and at the bottom, and is cut there.
      contract: how images are normalised; its size does not matter here.
      task: what the output's values mean and how they are compared.

    Raises:
      UsageError: without pairs, or where an output is larger than what is wanted.
    """
    mean, std = (np.asarray(v, np.float32) for v in (contract.mean, contract.std))
    found = []
    for pixels, wanted in pairs:
        made = np.asarray(run((pixels[None] / np.float32(255) - mean) / std))
        _, height, width, channels = made.shape
        cut = wanted[None, :height, :width]
        if cut.shape != (1, height, width, channels):
            raise UsageError(
                f"the network makes {height}x{width}x{channels} of {pixels.shape}, and "
                f"{wanted.shape} is wanted: pairs are of the scale that it enlarges by."
            )
        aim = task.low + cut / 255 * (task.high - task.low)
        how = {"low": task.low, "high": task.high, "luma": task.luma}
        found += [*psnr(aim, made, border=task.border, rounded=task.rounded, **how)]
    if not found:
        raise UsageError("psnr_of_pairs() needs at least one pair of images.")
    return float(np.mean(found))
