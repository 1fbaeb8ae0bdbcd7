"""Networks beyond classifiers are known by their tensors and compute what PyTorch computes."""

import jax
import numpy as np
import pytest
import task_networks
from safetensors.numpy import save_file

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.tasks import Classifier, Detector, ImageToImage, task_of
from dfq_jax.io.load import load
from dfq_jax.io.readers.checkpoint import read_checkpoint
from dfq_jax.io.zoo.known import network
from dfq_jax.io.zoo.recognise import closest

SIZES = {"imdn_x4": (12, 16), "fastestdet": (64, 64), "mobilefacenet": None}
TASKS = {"imdn_x4": ImageToImage, "fastestdet": Detector, "mobilefacenet": Classifier}
run = jax.jit(lambda model, x: evaluate(model, x)[0][0])


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", ["imdn_x4", *(pytest.param(n, marks=pytest.mark.slow) for n in list(SIZES)[1:])]
)
def test_same_values_as_pytorch(name, tmp_path):
    torch = pytest.importorskip("torch")
    import zoo_networks

    torch.manual_seed(0)
    net = task_networks.NETWORKS[name].build()
    zoo_networks.randomise(net, 0)
    save_file({k: v.numpy() for k, v in net.state_dict().items()}, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", size=SIZES[name])
    assert loaded.architecture == name
    assert set(task_networks.NETWORKS[name].remarks) <= set(loaded.notes)
    assert isinstance(task_of(loaded.model), TASKS[name])
    images = np.random.default_rng(0).normal(size=(2, *loaded.model.contract.shape))
    images = images.astype(np.float32)
    with torch.inference_mode():
        expected = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    expected = expected.transpose(0, 2, 3, 1) if expected.ndim == 4 else expected
    found = np.asarray(run(loaded.model, images))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("classes", [None, 3])
def test_a_detector_of_other_classes_is_told_by_its_tensors(classes):
    expected = network("fastestdet", classes=classes).expected
    tensors = {w.torch_name: np.zeros(w.torch_shape, np.float32) for w in expected}
    best = closest(tensors)
    assert (best.name, best.share) == ("fastestdet", 1.0)


def test_published_files_are_read_by_their_names(shared):
    for file, name in (("imdn_x4.pth", "imdn_x4"), ("mobilefacenet.ckpt", "mobilefacenet")):
        best = closest(read_checkpoint(shared / "models" / file).tensors)
        assert (best.name, best.share) == (name, 1.0)
