"""Networks from image to image on pairs of images."""

import numpy as np
import pytest

from dfq_jax.data.pairs import psnr_of_pairs
from dfq_jax.errors import UsageError
from dfq_jax.graph.tasks import ImageToImage
from dfq_jax.types import InputContract

CONTRACT = InputContract(9, 9, (0.5,) * 3, (0.25,) * 3)
TASK = ImageToImage(-2.0, 2.0)
RNG = np.random.default_rng(0)


def doubled(x):
    """A network that enlarges by repeating."""
    return x.repeat(2, 1).repeat(2, 2)


def test_sizes_may_differ_and_edges_are_cut():
    small = [RNG.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((3, 4), (5, 2))]
    large = [np.pad(doubled(x[None])[0], ((0, 1), (0, 1), (0, 0))) for x in small]
    assert psnr_of_pairs(doubled, zip(small, large, strict=True), CONTRACT, TASK) > 120
    worse = [np.where(x > 127, x - 1, x + 1).astype(np.uint8) for x in large]
    found = psnr_of_pairs(doubled, zip(small, worse, strict=True), CONTRACT, TASK)
    assert found == pytest.approx(20 * np.log10(255), abs=1e-3)


def test_pairs_of_another_scale_are_refused():
    small = np.zeros((3, 4, 3), np.uint8)
    with pytest.raises(UsageError, match=r"makes 6x8x3 of \(3, 4, 3\), and \(3, 4, 3\) is wanted"):
        psnr_of_pairs(doubled, [(small, small)], CONTRACT, TASK)
    with pytest.raises(UsageError, match="at least one pair"):
        psnr_of_pairs(doubled, [], CONTRACT, TASK)
