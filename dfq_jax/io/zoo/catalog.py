"""Architectures that are written down by hand, by name; `known.py` has all that have one."""

import dataclasses
import difflib
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.io.zoo.architecture import Architecture
from dfq_jax.io.zoo.builder import NetworkBuilder
from dfq_jax.io.zoo.cifar_resnet import cifar_resnet
from dfq_jax.io.zoo.efficientnet_lite import efficientnet_lite
from dfq_jax.io.zoo.mnasnet import mnasnet1_0
from dfq_jax.io.zoo.mobilenet_v2 import mobilenet_v2
from dfq_jax.io.zoo.regnet import regnet_x
from dfq_jax.io.zoo.resnet import basic, bottleneck, resnet
from dfq_jax.io.zoo.vgg import vgg_bn
from dfq_jax.types import InputContract

Size = int | tuple[int, int]
"""Height and width, or both at once."""


class Entry(NamedTuple):
    """How to build an architecture.

    Attributes:
      build: adds the nodes for that many classes and returns the name of the logits.
      contract: the input it was published with.
      classes: the number of classes it was published with.
    """

    build: Callable[[NetworkBuilder, int], str]
    contract: InputContract
    classes: int = 1000


def square(size: int) -> InputContract:
    """`size` pixels from an image whose short side was resized to 8/7 of that."""
    return InputContract(size, size, resize=round(size * 8 / 7))


def lite(size: int) -> InputContract:
    """As `square`, with pixels mapped to (pixel - 127) / 128."""
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    return dataclasses.replace(square(size), mean=mean, std=std)


IMAGENET = square(224)
CIFAR = InputContract(32, 32)

ENTRIES = {
    "resnet20_cifar": Entry(partial(cifar_resnet, depth=20), CIFAR, 10),
    "resnet32_cifar": Entry(partial(cifar_resnet, depth=32), CIFAR, 10),
    "resnet44_cifar": Entry(partial(cifar_resnet, depth=44), CIFAR, 10),
    "resnet56_cifar": Entry(partial(cifar_resnet, depth=56), CIFAR, 10),
    "resnet110_cifar": Entry(partial(cifar_resnet, depth=110), CIFAR, 10),
    "resnet18": Entry(partial(resnet, block=basic, repeats=(2, 2, 2, 2)), IMAGENET),
    "resnet34": Entry(partial(resnet, block=basic, repeats=(3, 4, 6, 3)), IMAGENET),
    "resnet50": Entry(partial(resnet, block=bottleneck, repeats=(3, 4, 6, 3)), IMAGENET),
    "resnet101": Entry(partial(resnet, block=bottleneck, repeats=(3, 4, 23, 3)), IMAGENET),
    "resnet152": Entry(partial(resnet, block=bottleneck, repeats=(3, 8, 36, 3)), IMAGENET),
    "mobilenet_v2": Entry(mobilenet_v2, IMAGENET),
    "efficientnet_lite0": Entry(partial(efficientnet_lite, width=1.0, depth=1.0), lite(224)),
    "efficientnet_lite1": Entry(partial(efficientnet_lite, width=1.0, depth=1.1), lite(240)),
    "efficientnet_lite2": Entry(partial(efficientnet_lite, width=1.1, depth=1.2), lite(260)),
    "efficientnet_lite3": Entry(partial(efficientnet_lite, width=1.2, depth=1.4), lite(280)),
    "efficientnet_lite4": Entry(partial(efficientnet_lite, width=1.4, depth=1.8), lite(300)),
    "vgg11_bn": Entry(partial(vgg_bn, repeats=(1, 1, 2, 2, 2)), IMAGENET),
    "vgg16_bn": Entry(partial(vgg_bn, repeats=(2, 2, 3, 3, 3)), IMAGENET),
    "vgg19_bn": Entry(partial(vgg_bn, repeats=(2, 2, 4, 4, 4)), IMAGENET),
    "regnet_x_400mf": Entry(
        partial(regnet_x, depth=22, start=24, slope=24.48, step=2.54, group=16), IMAGENET
    ),
    "regnet_x_600mf": Entry(
        partial(regnet_x, depth=16, start=48, slope=36.97, step=2.24, group=24), IMAGENET
    ),
    "regnet_x_3200mf": Entry(
        partial(regnet_x, depth=25, start=88, slope=26.31, step=2.25, group=48), IMAGENET
    ),
    "mnasnet1_0": Entry(mnasnet1_0, IMAGENET),
}


def names() -> tuple[str, ...]:
    """The architectures written down by hand, family by family."""
    return tuple(ENTRIES)


def architecture(
    name: str, *, size: Size | None = None, classes: int | None = None, channels: int = 3
) -> Architecture:
    """A built-in architecture without weights.

    Args:
      name: one of `names()`.
      size: pixels the network reads, (height, width) or both at once; None for the published ones.
      classes: number of logits; None for the published number.
      channels: colour channels of an image.

    Returns:
      The architecture. Its contract is the published one; with another number of channels
      the normalisation is assumed to be 0.5 / 0.5, and marked so.

    Raises:
      UnsupportedModelError: for an unknown name, with the nearest ones.
      UsageError: for a size the network cannot read, or fewer than one class or channel.
    """
    if name not in ENTRIES:
        raise UnsupportedModelError(unknown(name))
    entry = ENTRIES[name]
    wanted = entry.classes if classes is None else classes
    if wanted < 1 or channels < 1:
        raise UsageError(
            f"{name} needs at least one class and one channel, got {wanted} and {channels}."
        )
    builder = NetworkBuilder(name, with_channels(with_size(entry.contract, size), channels))
    return builder.finish(entry.build(builder, wanted))


def unknown(name: str, known: Collection[str] = tuple(ENTRIES)) -> str:
    """What to say about a name that is not among those known."""
    extended = [each for each in known if name and each.startswith(name)]
    near = extended[:3] or difflib.get_close_matches(name, known, n=3)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"no built-in architecture is called {name[:80]!r}. {hint}Known: {', '.join(known)}."


def with_size(contract: InputContract, size: Size | None) -> InputContract:
    """The contract for images of another size, resized in proportion.

    Raises:
      UsageError: unless the size is positive.
    """
    if size is None:
        return contract
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise UsageError(f"an image size is at least 1 pixel, got {height}x{width}.")
    resize = None
    if contract.resize is not None and height == width:
        resize = round(height * contract.resize / contract.height)
    return dataclasses.replace(contract, height=height, width=width, resize=resize)


def with_channels(contract: InputContract, channels: int) -> InputContract:
    """The contract for images of that many channels; other than published means assumed."""
    if channels == contract.channels:
        return contract
    half = (0.5,) * channels
    return dataclasses.replace(contract, mean=half, std=half, assumed=True)
