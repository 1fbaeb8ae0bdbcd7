"""Networks that people bring, from `.pt2` to a verified file of 8-bit integers."""

import io
import warnings
from typing import Any

import jax
import numpy as np
import pytest

import dfq_jax as dfq
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.io.load import load

torch = pytest.importorskip("torch")
modules = pytest.importorskip("small_modules")
pytestmark = [pytest.mark.torch, pytest.mark.onnx]

SLOW = ("yolo", "mixed", "crnn")
"""Those that take longest to quantize; others are as they are in every run."""
FLOATS = {"crnn": 12 * 2 * 4 * 8 * (24 + 8)}
"""Multiply-accumulates that stay in float: 12 steps in 2 directions of 4 gates of 8 units."""


def read(folder, name: str) -> tuple[Any, Model]:
    net, shape = modules.module(name), modules.MODULES[name][1]
    path = folder / f"{name}.pt2"
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net, (torch.zeros(1, *shape),)), buffer)
    path.write_bytes(buffer.getvalue())
    return net, load(path, mean=(0.5,), std=(0.25,)).model


@pytest.mark.parametrize("name", sorted(modules.MODULES))
def test_imports_compute_what_pytorch_does(tmp_path, name):
    net, model = read(tmp_path, name)
    x = torch.randn(2, *modules.MODULES[name][1], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = net(x)
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    given = x.numpy() if x.ndim == 5 else np.moveaxis(x.numpy(), 1, -1)
    ours = evaluate(model, jax.numpy.asarray(given.reshape(2, *model.input.shape)))[0]
    for mine, wanted in zip(ours, theirs, strict=True):
        wanted = np.moveaxis(wanted.numpy(), 1, -1) if wanted.ndim > 3 else wanted.numpy()
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in modules.MODULES],
)
def test_they_are_quantized_and_verified(tmp_path, name):
    _, model = read(tmp_path, name)
    made = dfq.quantize(model, n=8, steps=5)
    found = made.verify()
    assert found.passed, found.failures
    assert found.most_steps <= 1
    macs = sum(layer.macs for layer in made.report.layers)
    assert made.report.coverage == pytest.approx(macs / (macs + FLOATS.get(name, 0)))
