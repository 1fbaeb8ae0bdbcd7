"""MobileNetV2 under its torchvision names.

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2.
"""

from dfq_jax.io.zoo.builder import NetworkBuilder

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""(expansion, output channels, repeats, stride of the first block)."""


def mobilenet_v2(b: NetworkBuilder, classes: int) -> str:
    """MobileNetV2 of width 1.0; returns its logits."""
    x = conv_bn_relu6(b, "features.0", b.images, 32, 3, stride=2)
    index = 1
    for expansion, width, repeats, stride in STAGES:
        for i in range(repeats):
            name = f"features.{index}"
            x = inverted_residual(b, name, x, width, expansion, stride if i == 0 else 1)
            index += 1
    x = conv_bn_relu6(b, f"features.{index}", x, 1280, 1)
    return b.linear("classifier.1", b.global_avg_pool("avg_pool", x), classes)


def inverted_residual(
    b: NetworkBuilder, name: str, x: str, width: int, expansion: int, stride: int
) -> str:
    """Expand, convolve each channel, project; added to the input where shapes allow."""
    hidden = b.channels(x) * expansion
    y, part = x, 0
    if expansion != 1:
        y, part = conv_bn_relu6(b, f"{name}.conv.0", x, hidden, 1), 1
    y = conv_bn_relu6(b, f"{name}.conv.{part}", y, hidden, 3, stride=stride, groups=hidden)
    y = b.conv(f"{name}.conv.{part + 1}", y, width, 1)
    y = b.bn(f"{name}.conv.{part + 2}", y)
    return b.add(f"{name}.add", x, y) if stride == 1 and b.channels(x) == width else y


def conv_bn_relu6(
    b: NetworkBuilder,
    name: str,
    x: str,
    width: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
) -> str:
    """Convolution, batch norm and ReLU6."""
    x = b.bn(f"{name}.1", b.conv(f"{name}.0", x, width, kernel, stride, groups=groups))
    return b.relu(f"{name}.2", x, ceiling=6.0)
