"""Every network that has a name here, written down by hand or stored, under one roof."""

import dataclasses

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.io.zoo import catalog, stored
from dfq_jax.io.zoo.architecture import Architecture
from dfq_jax.io.zoo.catalog import Size, with_channels, with_size
from dfq_jax.io.zoo.stored import Stored, Weight

Network = Architecture | Stored


def names() -> tuple[str, ...]:
    """All of them; those written down by hand come first."""
    return (*catalog.names(), *(n for n in stored.names() if n not in catalog.ENTRIES))


def network(
    name: str, *, size: Size | None = None, classes: int | None = None, channels: int = 3
) -> Network:
    """A network without its weights; see `catalog.architecture`.

    Args:
      name: one of `names()`.
      size: pixels it reads, None for those it was published with.
      classes: to tell apart, None for the published number.
      channels: of an image.

    Returns:
      The network, its contract for these images.

    Raises:
      UnsupportedModelError: for an unknown name, with the nearest ones.
      UsageError: for a size it cannot read, or fewer than one class or channel.
    """
    if name in catalog.ENTRIES:
        return catalog.architecture(name, size=size, classes=classes, channels=channels)
    if name not in stored.names():
        raise UnsupportedModelError(catalog.unknown(name, names()))
    return stored_at_size(stored.read(name), size, classes, channels)


def stored_at_size(found: Stored, size: Size | None, classes: int | None, channels: int) -> Stored:
    """A stored network for other images or classes.

    Raises:
      UsageError: if it reads one size only, and not this one.
    """
    contract = with_channels(with_size(found.contract, size), channels)
    wanted, fixed = (contract.height, contract.width), found.image.shape[2:]
    if None not in fixed and wanted != fixed:
        raise UsageError(
            f"{found.name} reads images of {fixed[0]}x{fixed[1]} only: its table of positions has "
            f"that size, got {wanted[0]}x{wanted[1]}. Leave out the size."
        )
    expected = []
    for key, shape in found.expected:
        if key in found.heads and classes is not None:
            shape = (classes, *shape[1:])
        if key == found.stem:
            shape = (shape[0], channels, *shape[2:])
        expected.append(Weight(key, shape))
    image = dataclasses.replace(found.image, shape=(1, channels, *fixed))
    return dataclasses.replace(found, contract=contract, image=image, expected=tuple(expected))


def ends(found: Network) -> tuple[str, str | None]:
    """Keys of the kernel that reads the images, and of the weight that makes the class scores.

    The latter is None where there are no classes.
    """
    if isinstance(found, Stored):
        return found.stem, found.heads[0] if found.heads else None
    stem = next(p for p in found.expected if p.layout == "conv")
    head = next(p for p in reversed(found.expected) if p.layout == "linear")
    return stem.torch_name, head.torch_name
