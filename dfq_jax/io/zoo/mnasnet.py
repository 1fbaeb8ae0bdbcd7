"""MnasNet-B1 of depth multiplier 1.0 under its torchvision names.

Tan et al. 2019, "MnasNet: Platform-Aware Neural Architecture Search for Mobile".
"""

from dfq_jax.io.zoo.builder import NetworkBuilder

STAGES = (
    (24, 3, 2, 3, 3),
    (40, 5, 2, 3, 3),
    (80, 5, 2, 6, 3),
    (96, 3, 1, 6, 2),
    (192, 5, 2, 6, 4),
    (320, 3, 1, 6, 1),
)
"""(output channels, kernel, stride of the first block, expansion, repeats)."""


def mnasnet1_0(b: NetworkBuilder, classes: int) -> str:
    """MnasNet 1.0; returns its logits."""
    x = conv_bn_relu(b, "layers", 0, b.images, 32, 3, stride=2)
    x = conv_bn_relu(b, "layers", 3, x, 32, 3, groups=32)
    x = b.bn("layers.7", b.conv("layers.6", x, 16, 1))
    for stage, (width, kernel, stride, expansion, repeats) in enumerate(STAGES, start=8):
        for i in range(repeats):
            name, step = f"layers.{stage}.{i}", stride if i == 0 else 1
            y = inverted_residual(b, name, x, width, kernel, step, expansion)
            x = y if i == 0 else b.add(f"{name}.add", y, x)
    x = conv_bn_relu(b, "layers", 14, x, 1280, 1)
    return b.linear("classifier.1", b.global_avg_pool("avg_pool", x), classes)


def inverted_residual(
    b: NetworkBuilder, name: str, x: str, width: int, kernel: int, stride: int, expansion: int
) -> str:
    """Expand, convolve each channel, project; without the shortcut."""
    prefix, hidden = f"{name}.layers", b.channels(x) * expansion
    x = conv_bn_relu(b, prefix, 0, x, hidden, 1)
    x = conv_bn_relu(b, prefix, 3, x, hidden, kernel, stride=stride, groups=hidden)
    return b.bn(f"{prefix}.7", b.conv(f"{prefix}.6", x, width, 1))


def conv_bn_relu(
    b: NetworkBuilder,
    prefix: str,
    index: int,
    x: str,
    width: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
) -> str:
    """Convolution, batch norm and ReLU: three consecutive entries of the list `prefix`."""
    x = b.conv(f"{prefix}.{index}", x, width, kernel, stride, groups=groups)
    return b.relu(f"{prefix}.{index + 2}", b.bn(f"{prefix}.{index + 1}", x))
