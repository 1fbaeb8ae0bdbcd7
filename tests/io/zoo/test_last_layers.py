"""Checkpoints whose last layer is not as it was published."""

import checkpoints
import numpy as np
import pytest

import dfq_jax as dfq
from dfq_jax.errors import CheckpointError, UsageError
from dfq_jax.io.zoo.known import network
from dfq_jax.io.zoo.last_layers import own_layers_of
from dfq_jax.io.zoo.recognise import fitted_network

ARCH = "resnet20_cifar"
HEAD = "linear"
RNG = np.random.default_rng(0)


def published(arch=ARCH):
    """{name: tensor} of a network, its variances positive."""
    return {
        p.torch_name: np.abs(RNG.normal(size=p.torch_shape)).astype(np.float32)
        for p in network(arch).expected
    }


def with_head(layers, arch=ARCH, usual=HEAD):
    """The same with other layers in place of the last."""
    body = {n: x for n, x in published(arch).items() if not n.startswith(f"{usual}.")}
    made = {n: RNG.normal(size=shape).astype(np.float32) for n, shape in layers.items()}
    return {**body, **made}


ONE = {f"{HEAD}.1.weight": (7, 64), f"{HEAD}.1.bias": (7,)}
TWO = {
    f"{HEAD}.1.weight": (32, 64),
    f"{HEAD}.1.bias": (32,),
    f"{HEAD}.4.weight": (7, 32),
    f"{HEAD}.4.bias": (7,),
}


@pytest.fixture
def load(tmp_path):
    def loaded(tensors, **how):
        return dfq.load(checkpoints.write(tmp_path / "own.safetensors", tensors), **how)

    return loaded


@pytest.mark.parametrize("arch", [None, ARCH])
def test_one_layer_inside_of_something_is_the_last_layer(load, arch):
    tensors = with_head(ONE)
    found = load(tensors, arch=arch, mean=(0.5,) * 3, std=(0.25,) * 3)
    kernel = np.asarray(found.params[HEAD]["kernel"])
    np.testing.assert_array_equal(kernel.T, tensors[f"{HEAD}.1.weight"])
    np.testing.assert_array_equal(found.params[HEAD]["bias"], tensors[f"{HEAD}.1.bias"])


def test_a_layer_without_bias_has_one_of_zeros(load):
    tensors = with_head({f"{HEAD}.0.weight": (3, 64)})
    found = load(tensors, arch=ARCH)
    assert not np.asarray(found.params[HEAD]["bias"]).any()


def test_between_two_layers_there_may_be_anything(load):
    told = r"those of resnet20_cifar, but in place of linear it has linear\.1, linear\.4; what lies"
    with pytest.raises(UsageError, match=told):
        load(with_head(TWO), mean=(0.5,) * 3, std=(0.25,) * 3)
    with pytest.raises(CheckpointError, match="does not fit resnet20_cifar"):
        load(with_head(TWO), arch=ARCH)


def test_a_network_without_its_last_layer(load):
    with pytest.raises(UsageError, match="those of resnet20_cifar, but linear is missing"):
        load(with_head({}), mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize(
    "tensors",
    [
        published(),
        with_head({"other.weight": (7, 64)}),
        {n: x for n, x in with_head(ONE).items() if not n.startswith("layer1.0.conv1")},
    ],
)
def test_others_have_no_head_of_their_own(tensors):
    assert own_layers_of(fitted_network(ARCH, tensors), tensors) is None


def test_a_layer_that_reads_other_features_stays_where_it_is():
    tensors = with_head({f"{HEAD}.1.weight": (7, 32)})
    found = own_layers_of(fitted_network(ARCH, tensors), tensors)
    assert found is not None
    assert found.renamed is None


@pytest.mark.parametrize(
    ("arch", "usual", "own"),
    [
        ("mobilenet_v3_small", "classifier.3", "classifier.3.1"),
        ("vgg11_bn", "classifier.6", "classifier.6.0"),
        ("resnet18", "fc", "fc.0"),
        ("squeezenet1_1", "classifier.1", "classifier.1.0"),
    ],
)
def test_whatever_the_last_layer_is_called(arch, usual, own):
    """Shapes alone: nothing is allocated."""
    shapes = {p.torch_name: p.torch_shape for p in network(arch).expected}
    empty = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
    mine = {n.replace(f"{usual}.", f"{own}."): x for n, x in empty.items()}
    found = own_layers_of(fitted_network(arch, mine), mine)
    assert found is not None
    assert found.layers == (own,)
    assert found.renamed is not None
    assert found.renamed.keys() == empty.keys()
