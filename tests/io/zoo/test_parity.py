"""Every architecture computes what its PyTorch definition computes."""

import jax
import numpy as np
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.query import output_shapes
from dfq_jax.io.zoo.bind import bind
from dfq_jax.io.zoo.catalog import architecture, names

pytestmark = pytest.mark.torch

run = jax.jit(lambda model, x: evaluate(model, x)[0][0])

QUICK = {
    "resnet20_cifar",
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "efficientnet_lite0",
    "vgg11_bn",
    "regnet_x_600mf",
    "mnasnet1_0",
}
"""The smallest of each family, and of each kind of block; the others wait for `-m slow`."""

SIZES = {
    **{name: 96 for name in names() if name.startswith(("resnet", "regnet"))},
    **{name: 32 for name in names() if name.endswith("_cifar")},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names()]
)
def test_same_logits_as_pytorch(name, reference):
    net = reference(name)
    arch = architecture(name, size=SIZES.get(name))
    model, notes = bind(arch, net.tensors)
    images = np.random.default_rng(0).normal(size=(1, *arch.contract.shape)).astype(np.float32)
    expected, found = net(images), np.asarray(run(model, images))
    assert notes == ()
    assert found.shape == expected.shape == output_shapes(model)[arch.graph.outputs[0]]
    gap = np.abs(found - expected).max() / np.abs(expected).max()
    assert gap <= 1e-5
