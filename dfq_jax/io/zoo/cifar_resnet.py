"""ResNets for 32x32 images with parameter-free shortcuts.

He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2, option A.
Names are those of the `conv1, layer1.0.conv1, ..., linear` checkpoints in wide use.
"""

from dfq_jax.io.zoo.builder import NetworkBuilder


def cifar_resnet(b: NetworkBuilder, classes: int, *, depth: int) -> str:
    """A CIFAR ResNet of `depth` = 6n + 2 layers; returns its logits."""
    x = b.relu("relu1", b.bn("bn1", b.conv("conv1", b.images, 16, 3)))
    for stage, width in enumerate((16, 32, 64), start=1):
        for i in range((depth - 2) // 6):
            x = basic_block(b, f"layer{stage}.{i}", x, width)
    return b.linear("linear", b.global_avg_pool("avg_pool", x), classes)


def basic_block(b: NetworkBuilder, name: str, x: str, width: int) -> str:
    """Two 3x3 convolutions and a shortcut; halves the resolution where the width changes."""
    stride = 1 if b.channels(x) == width else 2
    y = b.bn(f"{name}.bn1", b.conv(f"{name}.conv1", x, width, 3, stride))
    y = b.relu(f"{name}.relu1", y)
    y = b.bn(f"{name}.bn2", b.conv(f"{name}.conv2", y, width, 3))
    skip = x if stride == 1 else shortcut(b, f"{name}.shortcut", x, width)
    return b.relu(f"{name}.relu2", b.add(f"{name}.add", y, skip))


def shortcut(b: NetworkBuilder, name: str, x: str, width: int) -> str:
    """Every other pixel, with a quarter of `width` zero channels on either side."""
    x = b.slice(f"{name}.slice", x, (0, None, 2), (0, None, 2), (0, None, 1))
    return b.pad(f"{name}.pad", x, (0, 0), (0, 0), (width // 4, width // 4))
