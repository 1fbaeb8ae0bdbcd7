"""A real network from image to image: imported, quantized and judged by the PSNR of its task."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imdn import imdn, set5

import dfq_jax as dfq
from dfq_jax.data.pairs import psnr_of_pairs
from dfq_jax.graph.tasks import ImageToImage

TILE, SCALE = 48, 4
JUDGED = ImageToImage(luma=True, border=4, rounded=True)
"""As super-resolution is judged: luma of 8-bit pixels, without borders."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network(shared: Path) -> Any:
    """IMDN of PyTorch."""
    pytest.importorskip("torch")
    return imdn(shared / "models" / "imdn_x4.pth")


@pytest.fixture(scope="module")
def model(network) -> dfq.Model:
    """The same, imported for tiles."""
    return dfq.load(network, example=(3, TILE, TILE), mean=(0.0,) * 3, std=(1.0,) * 3)


def tiles(pairs) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All whole tiles of pairs of images."""
    for low, high in pairs.values():
        for y in range(0, low.shape[0] - TILE + 1, TILE):
            for x in range(0, low.shape[1] - TILE + 1, TILE):
                larger = high[SCALE * y :, SCALE * x :][: SCALE * TILE, : SCALE * TILE]
                yield low[y : y + TILE, x : x + TILE], larger


def run_by_torch(network):
    import torch

    def run(x):
        with torch.no_grad():
            return network(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)

    return run


def test_the_published_accuracy_is_measured_and_the_import_keeps_it(network, model, shared):
    pairs = set5(shared / "models" / "set5.zip")
    published = psnr_of_pairs(run_by_torch(network), pairs.values(), model.contract, JUDGED)
    assert round(published, 2) == 32.21
    low, _ = next(tiles(pairs))
    x = low[None] / np.float32(255)
    np.testing.assert_allclose(dfq.predict(model, x), run_by_torch(network)(x), atol=1e-5)


def test_eight_bits_are_judged_by_their_task(model, shared):
    result = dfq.quantize(model, n=16)
    assert result.report.task == ImageToImage(0.0, 1.0)
    (output,) = result.report.outputs
    assert (output.kind, output.measure, output.agreement) == ("values", "psnr_db", None)
    assert result.report.passed
    assert "PSNR" in result.summary()
    assert all(layer.integer for layer in result.report.layers)
    pairs = list(tiles(set5(shared / "models" / "set5.zip")))[::3]
    of = lambda run: psnr_of_pairs(run, pairs, model.contract, JUDGED)
    exact = of(lambda x: dfq.predict(model, x))
    rough = of(lambda x: dfq.simulate(result.quantized, x))
    assert exact > rough > exact - 5
    small = dataclasses.replace(result, probes=result.probes.split(2)[1])
    assert small.verify().passed
