"""VGG with batch norm under its torchvision names.

Simonyan and Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
table 1, configurations A, D and E.
"""

from dfq_jax.errors import UsageError
from dfq_jax.io.zoo.builder import NetworkBuilder

WIDTHS = (64, 128, 256, 512, 512)
GRID = 7


def vgg_bn(b: NetworkBuilder, classes: int, *, repeats: tuple[int, int, int, int, int]) -> str:
    """A VGG with `repeats` convolutions before each pooling; returns its logits."""
    x, index = b.images, 0
    for width, repeat in zip(WIDTHS, repeats, strict=True):
        for _ in range(repeat):
            x = b.conv(f"features.{index}", x, width, 3, bias=True)
            x = b.relu(f"features.{index + 2}", b.bn(f"features.{index + 1}", x))
            index += 3
        x = b.max_pool(f"features.{index}", x, 2, 2)
        index += 1
    x = b.flatten("flatten", pool_to_grid(b, x))
    x = b.relu("classifier.1", b.linear("classifier.0", x, 4096))
    x = b.relu("classifier.4", b.linear("classifier.3", x, 4096))
    return b.linear("classifier.6", x, classes)


def pool_to_grid(b: NetworkBuilder, x: str) -> str:
    """Averages to the 7x7 pixels the classifier was trained on.

    Raises:
      UsageError: if the features do not divide into 7x7 equal windows.
    """
    h, w, _ = b.shapes[x]
    if h % GRID or w % GRID:
        raise UsageError(
            f"{b.name} cannot read images of {b.contract.height}x{b.contract.width}: its {h}x{w} "
            f"features do not divide into the {GRID}x{GRID} windows its classifier reads. "
            f"Choose a size that is a multiple of 224."
        )
    if (h, w) == (GRID, GRID):
        return x
    return b.avg_pool("avgpool", x, (h // GRID, w // GRID))
