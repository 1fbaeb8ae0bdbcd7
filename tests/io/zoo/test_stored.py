"""Networks kept as graphs compute what torchvision computes, and are told by their tensors."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dfq_jax.errors import CheckpointError, UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.io.load import load
from dfq_jax.io.zoo.known import names, network
from dfq_jax.io.zoo.recognise import closest
from dfq_jax.io.zoo.stored import FOLDER, SUFFIX, packed, read, unpacked
from dfq_jax.io.zoo.stored_weights import modern_names
from dfq_jax.normalisation import IMAGENET_MEAN, IMAGENET_STD

run = jax.jit(lambda model, x: evaluate(model, x)[0][0])

SMALL = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "mnasnet0_5": 64,
    "mobilenet_v3_large": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_800mf": 64,
    "regnet_y_400mf": 64,
    "resnext101_32x8d": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_0": 64,
    "squeezenet1_1": 64,
    "vgg11": 64,
    "vgg13_bn": 64,
    "vit_b_16": None,
    "vit_b_32": None,
    "wide_resnet50_2": 64,
}
"""The smallest of each family, and some larger, with pixels enough; most wait for `-m slow`."""
QUICK = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf")
"""Those of which the test takes the least time."""


def zeros(name, classes=None, channels=3):
    expected = network(name, classes=classes, channels=channels).expected
    return {p.torch_name: np.zeros(p.torch_shape, np.float32) for p in expected}


def saved(path, tensors):
    save_file(tensors, path)
    return path


def filled(name, classes, seed=0):
    """The network of torchvision with random weights and statistics."""
    import torch
    import zoo_networks

    torch.manual_seed(seed)
    options = {"weights": None, "num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    net = zoo_networks.torchvision_models().get_model(name, **options).eval()
    zoo_networks.randomise(net, seed)
    return net


def slow_unless(quick):
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in SMALL]


@pytest.mark.torch
@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", slow_unless(QUICK))
def test_same_logits_as_torchvision(name, tmp_path):
    """With other classes, counters and heads that only training reads, and no name given."""
    import torch

    net, size = filled(name, classes=7), SMALL[name]
    path = saved(tmp_path / "net.safetensors", {k: v.numpy() for k, v in net.state_dict().items()})
    loaded = load(path, size=size)
    assert loaded.architecture == name
    images = np.random.default_rng(0).normal(size=(2, *loaded.model.contract.shape))
    images = images.astype(np.float32)
    with torch.inference_mode():
        expected = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    found = np.asarray(run(loaded.model, images))
    assert found.shape == expected.shape == (2, 7)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_tensors_tell_the_network():
    best = closest(zeros("resnext50_32x4d", classes=3))
    assert (best.name, best.share) == ("resnext50_32x4d", 1.0)


def test_no_two_networks_have_the_same_tensors():
    """Names and shapes tell them apart; two are one network under two names."""
    found = {}
    for name in names():
        tensors = frozenset((p.torch_name, p.torch_shape) for p in network(name).expected)
        found.setdefault(tensors, []).append(name)
    assert [n for n in found.values() if len(n) > 1] == [["regnet_x_3200mf", "regnet_x_3_2gf"]]


def test_stored_networks_are_small():
    sizes = [path.stat().st_size for path in FOLDER.glob(f"*{SUFFIX}")]
    assert max(sizes) < 20_000
    assert sum(sizes) < 1_000_000


@pytest.mark.parametrize("name", ["vit_b_16", "googlenet"])
def test_round_trip(name):
    network = read(name)
    assert unpacked(name, packed(network)) == network


def test_weights_of_training_are_left_out_with_a_note(tmp_path):
    tensors = zeros("googlenet")
    tensors |= {"aux1.fc1.weight": np.zeros((4, 4), np.float32)}
    tensors |= {"conv1.bn.num_batches_tracked": np.zeros((), np.int64)}
    loaded = load(saved(tmp_path / "net.safetensors", tensors), arch="googlenet", size=64)
    assert "left out 1 tensors that only training reads, such as aux1.fc1.weight" in loaded.notes[0]
    assert "transform_input=True, which is mean 0.5" in loaded.notes[1]
    assert loaded.model.contract.mean == (0.5, 0.5, 0.5)


@pytest.mark.torch
@pytest.mark.usefixtures("torchvision")
def test_published_weights_of_googlenet_read_halves(tmp_path):
    """What its option `transform_input` does to images is our mean and deviation."""
    import torch

    net = filled("googlenet", classes=3)
    path = saved(tmp_path / "net.safetensors", {k: v.numpy() for k, v in net.state_dict().items()})
    net.transform_input = True
    pixels = np.random.default_rng(0).uniform(size=(1, 64, 64, 3)).astype(np.float32)
    mean, std = (np.array(v, np.float32) for v in (IMAGENET_MEAN, IMAGENET_STD))
    normal = (pixels - mean) / std
    with torch.inference_mode():
        expected = net(torch.from_numpy(normal.transpose(0, 3, 1, 2).copy())).numpy()
    found = np.asarray(
        run(load(path, arch="googlenet", size=64).model, (pixels - np.float32(0.5)) * 2)
    )
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_normalisation_of_weights_is_an_assumption(tmp_path):
    path = saved(tmp_path / "net.safetensors", zeros("squeezenet1_1", classes=2))
    loaded = load(path, arch="squeezenet1_1", size=64)
    assert loaded.model.contract.assumed
    assert loaded.model.contract.mean == IMAGENET_MEAN
    assert "nothing says how images are normalised" in loaded.notes[-1]
    told = load(path, arch="squeezenet1_1", size=64, mean=(0.5,), std=(0.25,))
    assert not told.model.contract.assumed
    assert not any("nothing says" in note for note in told.notes)


def test_images_with_one_channel(tmp_path):
    path = saved(tmp_path / "net.safetensors", zeros("squeezenet1_1", channels=1))
    loaded = load(path, arch="squeezenet1_1", size=64)
    assert loaded.model.contract.shape == (64, 64, 1)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("densenet121", r"denselayer1.norm.1.", "denselayer1.norm1."),
        ("vit_b_16", "encoder_layer_3.mlp.linear_2.", "encoder_layer_3.mlp.3."),
    ],
)
def test_names_of_older_files(name, old, new):
    today = zeros(name)
    found, notes = modern_names({k.replace(new, old): v for k, v in today.items()})
    assert set(found) == set(today)
    assert notes == (
        f"renamed {sum(new in k for k in today)} tensors as torchvision calls them today",
    )
    assert modern_names(today) == (today, ())


def test_a_size_the_positions_do_not_have():
    with pytest.raises(UsageError, match="vit_b_16 reads images of 224x224 only"):
        network("vit_b_16", size=256)


def test_images_too_small_for_the_network(tmp_path):
    path = saved(tmp_path / "net.safetensors", zeros("squeezenet1_0", classes=2))
    with pytest.raises(UsageError, match="squeezenet1_0 cannot read images of 8x8"):
        load(path, arch="squeezenet1_0", size=8)


def test_a_wrong_name_is_told():
    with pytest.raises(UnsupportedModelError, match="Did you mean mobilenet_v3_small"):
        network("mobilenetv3_small")
    assert len(set(names())) == len(names()) > 60


def test_a_file_of_nothing_known_ends_in_the_line_that_exports(tmp_path):
    tensors = {"stem.weight": np.zeros((2, 1, 3, 3), np.float32)}
    path = saved(tmp_path / "net.safetensors", tensors)
    line = r'(?s)torch\.export\.save\(.*torch\.zeros\(1, 1, 224, 224\).*"net\.pt2"\)'
    with pytest.raises(UsageError, match=line):
        load(path)
    with pytest.raises(CheckpointError, match=line):
        load(path, arch="mobilenet_v3_small")
