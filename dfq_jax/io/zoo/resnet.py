"""ResNets for ImageNet under their torchvision names.

He et al. 2016, "Deep Residual Learning for Image Recognition", table 1; the stride of a bottleneck
sits on its 3x3 convolution, as in torchvision.
"""

from collections.abc import Callable

from dfq_jax.io.zoo.builder import NetworkBuilder

MakeBlock = Callable[[NetworkBuilder, str, str, int, int], str]


def resnet(
    b: NetworkBuilder, classes: int, *, block: MakeBlock, repeats: tuple[int, int, int, int]
) -> str:
    """A ResNet with `repeats` blocks in its four stages; returns its logits."""
    x = b.relu("relu", b.bn("bn1", b.conv("conv1", b.images, 64, 7, 2)))
    x = b.max_pool("maxpool", x, 3, 2, padding=1)
    for stage, repeat in enumerate(repeats):
        for i in range(repeat):
            stride = 2 if stage > 0 and i == 0 else 1
            x = block(b, f"layer{stage + 1}.{i}", x, 64 * 2**stage, stride)
    return b.linear("fc", b.global_avg_pool("avgpool", x), classes)


def basic(b: NetworkBuilder, name: str, x: str, width: int, stride: int) -> str:
    """Two 3x3 convolutions and a shortcut."""
    y = b.bn(f"{name}.bn1", b.conv(f"{name}.conv1", x, width, 3, stride))
    y = b.relu(f"{name}.relu1", y)
    y = b.bn(f"{name}.bn2", b.conv(f"{name}.conv2", y, width, 3))
    y = b.add(f"{name}.add", y, shortcut(b, name, x, width, stride))
    return b.relu(f"{name}.relu2", y)


def bottleneck(b: NetworkBuilder, name: str, x: str, width: int, stride: int) -> str:
    """1x1, 3x3 and 1x1 convolutions, four times wider at the end, and a shortcut."""
    y = b.bn(f"{name}.bn1", b.conv(f"{name}.conv1", x, width, 1))
    y = b.relu(f"{name}.relu1", y)
    y = b.bn(f"{name}.bn2", b.conv(f"{name}.conv2", y, width, 3, stride))
    y = b.relu(f"{name}.relu2", y)
    y = b.bn(f"{name}.bn3", b.conv(f"{name}.conv3", y, 4 * width, 1))
    y = b.add(f"{name}.add", y, shortcut(b, name, x, 4 * width, stride))
    return b.relu(f"{name}.relu3", y)


def shortcut(b: NetworkBuilder, name: str, x: str, width: int, stride: int) -> str:
    """`x` itself, or its projection where the block changes the shape."""
    if stride == 1 and b.channels(x) == width:
        return x
    x = b.conv(f"{name}.downsample.0", x, width, 1, stride)
    return b.bn(f"{name}.downsample.1", x)
