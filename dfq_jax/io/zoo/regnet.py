"""RegNetX under its torchvision names.

Radosavovic et al. 2020, "Designing Network Design Spaces", section 3.3 and table 2 (top).
"""

import itertools
import math

from dfq_jax.io.zoo.builder import NetworkBuilder, divisible


def regnet_x(
    b: NetworkBuilder,
    classes: int,
    *,
    depth: int,
    start: int,
    slope: float,
    step: float,
    group: int,
) -> str:
    """A RegNetX; returns its logits.

    Args:
      b: collects the nodes.
      classes: number of logits.
      depth: number of blocks, d.
      start: initial width, w_0.
      slope: growth of the width per block, w_a.
      step: ratio of the widths of neighbouring stages, w_m.
      group: channels in one group of a 3x3 convolution, g.
    """
    x = b.relu("stem.2", b.bn("stem.1", b.conv("stem.0", b.images, 32, 3, 2)))
    stages = stage_widths(depth, start, slope, step, group)
    for stage, (width, repeats) in enumerate(stages, start=1):
        groups = width // min(group, width)
        for i in range(repeats):
            name = f"trunk_output.block{stage}.block{stage}-{i}"
            x = bottleneck(b, name, x, width, 2 if i == 0 else 1, groups)
    return b.linear("fc", b.global_avg_pool("avgpool", x), classes)


def stage_widths(
    depth: int, start: int, slope: float, step: float, group: int
) -> tuple[tuple[int, int], ...]:
    """(width, number of blocks) of every stage, as the paper draws them, in whole groups."""
    widths = []
    for index in range(depth):
        linear = start + slope * index
        exponent = round(math.log(linear / start) / math.log(step))
        width = 8 * round(start * step**exponent / 8)
        widths.append(divisible(float(width), min(group, width)))
    return tuple((width, len(list(blocks))) for width, blocks in itertools.groupby(widths))


def bottleneck(b: NetworkBuilder, name: str, x: str, width: int, stride: int, groups: int) -> str:
    """1x1, grouped 3x3 and 1x1 convolutions of one width, and a shortcut."""
    skip = x
    if stride != 1 or b.channels(x) != width:
        skip = b.bn(f"{name}.proj.1", b.conv(f"{name}.proj.0", x, width, 1, stride))
    y = b.bn(f"{name}.f.a.1", b.conv(f"{name}.f.a.0", x, width, 1))
    y = b.relu(f"{name}.f.a.2", y)
    y = b.bn(f"{name}.f.b.1", b.conv(f"{name}.f.b.0", y, width, 3, stride, groups=groups))
    y = b.relu(f"{name}.f.b.2", y)
    y = b.bn(f"{name}.f.c.1", b.conv(f"{name}.f.c.0", y, width, 1))
    return b.relu(f"{name}.activation", b.add(f"{name}.add", skip, y))
