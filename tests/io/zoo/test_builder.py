import pytest

from dfq_jax.errors import GraphError, UsageError
from dfq_jax.graph.query import describe, output_shapes
from dfq_jax.io.zoo.bind import bind
from dfq_jax.io.zoo.builder import NetworkBuilder, divisible, same_pads
from dfq_jax.io.zoo.catalog import architecture, names
from dfq_jax.types import InputContract


def builder(height=8, width=10):
    return NetworkBuilder("tiny", InputContract(height, width))


def zeros(arch):
    import numpy as np

    return {p.torch_name: np.zeros(p.torch_shape, np.float32) for p in arch.expected}


def test_tracked_shapes_are_the_evaluated_ones():
    b = builder(height=9, width=14)
    x = b.conv("conv", b.images, 8, 3, 2, bias=True)
    x = b.relu("relu", b.bn("bn", x))
    x = b.conv("same", x, 8, 5, 2, b.same(x, 5, 2), groups=4)
    x = b.pad("pad", x, (1, 0), (2, 2), (0, 4))
    x = b.slice("slice", x, (0, None, 1), (1, 7, 2), (0, None, 3))
    x = b.max_pool("max", b.add("add", x, x), 3, 1, padding=1)
    x = b.avg_pool("avg", x, (2, 1))
    arch = b.finish(b.linear("fc", b.flatten("flatten", x), 5))
    evaluated = output_shapes(bind(arch, zeros(arch)).model)
    assert {k: v[1:] for k, v in evaluated.items()} == b.shapes


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "regnet_x_400mf", "vgg11_bn"])
def test_expected_parameters_belong_to_nodes(name):
    arch = architecture(name)
    nodes = {node.name for node in arch.graph.nodes}
    assert {p.node for p in arch.expected} <= nodes
    assert len({p.torch_name for p in arch.expected}) == len(arch.expected)
    assert len({(p.node, p.slot) for p in arch.expected}) == len(arch.expected)


def test_add_of_different_shapes():
    b = builder()
    x = b.conv("conv", b.images, 4, 1)
    with pytest.raises(GraphError, match=r"tiny: 'sum' adds 'images' of shape \(8, 10, 3\) to 'co"):
        b.add("sum", b.images, x)


def test_image_too_small():
    with pytest.raises(UsageError, match=r"vgg11_bn cannot read images of 16x16: at 'features.28'"):
        architecture("vgg11_bn", size=16)


def test_vgg_needs_a_grid_of_7x7():
    with pytest.raises(UsageError, match=r"its 8x8 features do not divide .* multiple of 224"):
        architecture("vgg16_bn", size=256)
    larger = architecture("vgg16_bn", size=448)
    assert "avgpool" in {node.name for node in larger.graph.nodes}


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"),
    [
        (224, 3, 2, (0, 1)),
        (225, 3, 2, (1, 1)),
        (7, 3, 1, (1, 1)),
        (14, 5, 2, (1, 2)),
        (1, 1, 2, (0, 0)),
    ],
)
def test_same_pads(size, kernel, stride, pads):
    assert same_pads(size, kernel, stride) == pads


@pytest.mark.parametrize(("width", "result"), [(3.0, 8), (83.0, 80), (84.0, 88), (22.4, 24)])
def test_divisible(width, result):
    assert divisible(width) == result


def test_every_network_describes_itself():
    arch = architecture("resnet20_cifar")
    text = describe(bind(arch, zeros(arch)).model)
    assert "layer2.0.shortcut.pad" in text
    assert text.endswith("returns linear")
    assert len(set(names())) == 23
