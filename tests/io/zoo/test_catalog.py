import math

import pytest

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.io.zoo.catalog import architecture, names
from dfq_jax.io.zoo.regnet import stage_widths
from dfq_jax.normalisation import IMAGENET_MEAN, IMAGENET_STD


def trainable(name):
    statistics = ("running_mean", "running_var")
    expected = architecture(name).expected
    return sum(math.prod(p.torch_shape) for p in expected if not p.torch_name.endswith(statistics))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet20_cifar", 269_722),
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("mobilenet_v2", 3_504_872),
        ("efficientnet_lite0", 4_652_008),
        ("vgg16_bn", 138_365_992),
        ("regnet_x_400mf", 5_495_976),
        ("regnet_x_600mf", 6_196_040),
        ("mnasnet1_0", 4_383_312),
    ],
)
def test_published_parameter_counts(name, count):
    assert trainable(name) == count


@pytest.mark.parametrize("name", names())
def test_published_contract(name):
    contract = architecture(name).contract
    sizes = {"efficientnet_lite1": 240, "efficientnet_lite2": 260, "efficientnet_lite3": 280}
    sizes |= {"efficientnet_lite4": 300}
    size = 32 if name.endswith("_cifar") else sizes.get(name, 224)
    assert contract.shape == (size, size, 3)
    assert contract.resize == (None if size == 32 else round(size * 8 / 7))
    assert (contract.interpolation, contract.assumed) == ("bilinear", False)
    if name.startswith("efficientnet_lite"):
        assert contract.mean == pytest.approx((127 / 255,) * 3)
        assert contract.std == pytest.approx((128 / 255,) * 3)
    else:
        assert (contract.mean, contract.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_other_sizes_classes_and_channels():
    small = architecture("resnet18", size=(96, 128), classes=7, channels=1)
    assert small.contract.shape == (96, 128, 1)
    assert small.contract.resize is None
    assert (small.contract.mean, small.contract.std) == ((0.5,), (0.5,))
    assert small.contract.assumed
    assert small.expected[0].torch_shape == (64, 1, 7, 7)
    assert small.expected[-1].torch_shape == (7,)
    assert architecture("resnet18", size=112).contract.resize == 128
    assert architecture("resnet20_cifar", size=11).contract.resize is None


def test_architectures_are_equal_values():
    assert architecture("resnet18") == architecture("resnet18")
    assert hash(architecture("resnet18").graph) == hash(architecture("resnet18").graph)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet56", "Did you mean resnet56_cifar?"),
        ("mobilenetv2", "Did you mean mobilenet_v2?"),
        ("efficientnet-lite0", "Did you mean efficientnet_lite0 or"),
        ("", "Known: resnet20_cifar, "),
        ("bert", "Known: resnet20_cifar, "),
    ],
)
def test_unknown_name(name, nearest):
    with pytest.raises(UnsupportedModelError, match=rf"is called '{name}'\. {nearest}"):
        architecture(name)


def test_impossible_numbers():
    with pytest.raises(UsageError, match="at least 1 pixel, got 0x0"):
        architecture("resnet18", size=0)
    with pytest.raises(UsageError, match="at least one class and one channel, got 0 and 3"):
        architecture("resnet18", classes=0)
    with pytest.raises(UsageError, match="at least one class and one channel, got 1000 and -1"):
        architecture("resnet18", channels=-1)


@pytest.mark.parametrize(
    ("parameters", "widths", "repeats"),
    [
        ((22, 24, 24.48, 2.54, 16), (32, 64, 160, 400), (1, 2, 7, 12)),
        ((16, 48, 36.97, 2.24, 24), (48, 96, 240, 528), (1, 3, 5, 7)),
        ((25, 88, 26.31, 2.25, 48), (96, 192, 432, 1008), (2, 6, 15, 2)),
    ],
)
def test_regnet_widths(parameters, widths, repeats):
    """Radosavovic et al. 2020, table 2 (top), and torchvision for the 400MF and 3.2GF networks."""
    assert stage_widths(*parameters) == tuple(zip(widths, repeats, strict=True))
