"""EfficientNet-lite 0 to 4: ReLU6, no squeeze-and-excite, stem and head of fixed width.

Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
table 1, in its lite variant; padding follows TensorFlow, so it depends on the image size.
"""

import math

from dfq_jax.io.zoo.builder import NetworkBuilder, divisible

STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
"""(kernel, stride of the first block, expansion, output channels, repeats)."""

EPS = 1e-3


def efficientnet_lite(b: NetworkBuilder, classes: int, *, width: float, depth: float) -> str:
    """An EfficientNet-lite with scaled channels and repeats; returns its logits.

    The first and the last stage keep their number of repeats.
    """
    x = conv_bn(b, "_conv_stem", "_bn0", b.images, 32, 3, stride=2)
    x = b.relu("_relu0", x, ceiling=6.0)
    index = 0
    for stage, (kernel, stride, expansion, channels, repeats) in enumerate(STAGES):
        inner = 0 < stage < len(STAGES) - 1
        for i in range(math.ceil(depth * repeats) if inner else repeats):
            name, step = f"_blocks.{index}", stride if i == 0 else 1
            x = mobile_block(b, name, x, divisible(width * channels), kernel, step, expansion)
            index += 1
    x = b.relu("_relu1", conv_bn(b, "_conv_head", "_bn1", x, 1280, 1), ceiling=6.0)
    return b.linear("_fc", b.global_avg_pool("_avg_pooling", x), classes)


def mobile_block(
    b: NetworkBuilder, name: str, x: str, width: int, kernel: int, stride: int, expansion: int
) -> str:
    """Expand, convolve each channel, project; added to the input where shapes allow."""
    y, hidden = x, b.channels(x) * expansion
    if expansion != 1:
        y = conv_bn(b, f"{name}._expand_conv", f"{name}._bn0", x, hidden, 1)
        y = b.relu(f"{name}._relu0", y, ceiling=6.0)
    depthwise, norm = f"{name}._depthwise_conv", f"{name}._bn1"
    y = conv_bn(b, depthwise, norm, y, hidden, kernel, stride=stride, groups=hidden)
    y = b.relu(f"{name}._relu1", y, ceiling=6.0)
    y = conv_bn(b, f"{name}._project_conv", f"{name}._bn2", y, width, 1)
    return b.add(f"{name}.add", y, x) if stride == 1 and b.channels(x) == width else y


def conv_bn(
    b: NetworkBuilder,
    conv: str,
    norm: str,
    x: str,
    width: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
) -> str:
    """Convolution with "same" padding, and batch norm."""
    pads = b.same(x, kernel, stride)
    return b.bn(norm, b.conv(conv, x, width, kernel, stride, pads, groups), EPS)
