"""The small value types that cross every layer: input contract, moments, image sets."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Moments(NamedTuple):
    """Mean and variance per channel of one tensor, as a batch norm layer recorded them."""

    mean: Float[Array, " chan"]
    var: Float[Array, " chan"]


@dataclasses.dataclass(frozen=True)
class InputContract:
    """What a network expects of an image, and what every artifact repeats to its users.

    A network input is `(pixel / 255 - mean) / std` per channel, for RGB pixels in 0..255.

    Attributes:
      height: rows the network reads.
      width: columns the network reads.
      mean: per channel, on pixels scaled to [0, 1].
      std: per channel, on pixels scaled to [0, 1].
      resize: short side to resize to before the centre crop; None resizes to exactly
        (height, width) when the image has another size.
      interpolation: `bilinear` or `bicubic`, used when resizing.
      assumed: True when the normalisation is a default nobody stated; printed to the user.
    """

    height: int
    width: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: int | None = None
    interpolation: str = "bilinear"
    assumed: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError on sizes, means or deviations no image could satisfy."""
        if self.height < 1 or self.width < 1:
            raise ValueError(
                f"InputContract needs a positive size, got {self.height}x{self.width}."
            )
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(
                f"InputContract needs one mean and one positive std per channel, "
                f"got mean={self.mean}, std={self.std}."
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation is bilinear or bicubic, got {self.interpolation!r}.")

    @property
    def channels(self) -> int:
        """Number of colour channels."""
        return len(self.mean)

    @property
    def colours(self) -> str:
        """The channels in words."""
        return "RGB" if self.channels == 3 else f"{self.channels} channels"

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest value a normalised pixel can have, over all channels."""
        ends = [((p - m) / s) for m, s in zip(self.mean, self.std, strict=True) for p in (0, 1)]
        return min(ends), max(ends)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        return self.height, self.width, self.channels


def plain_contract(shape: tuple[int, int, int]) -> InputContract:
    """The contract of a network that does not say how its images are normalised, marked assumed.

    Args:
      shape: (height, width, channels).

    Returns:
      ImageNet's mean and deviation for 3 channels, else 0.5 and 0.5.
    """
    height, width, channels = shape
    if channels == 3:
        return InputContract(height, width, assumed=True)
    half = (0.5,) * channels
    return InputContract(height, width, half, half, assumed=True)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images in a network's normalised input space, with where they came from.

    Attributes:
      images: NHWC float32, already normalised by `contract`; no fixed range.
      contract: the input contract they satisfy.
      provenance: plain JSON data: method, seed, steps, hash of the weights, versions.
    """

    images: Float[Array, "n h w c"]
    contract: InputContract
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """Number of images."""
        return self.images.shape[0]

    def split(self, held_out: int) -> tuple["ImageSet", "ImageSet"]:
        """The first `n - held_out` images to calibrate with, the last `held_out` to judge by."""
        if not 0 < held_out < len(self):
            raise ValueError(f"cannot hold out {held_out} of {len(self)} images.")
        cut = len(self) - held_out
        return (
            dataclasses.replace(self, images=self.images[:cut]),
            dataclasses.replace(self, images=self.images[cut:]),
        )


def tree_bytes(tree: object) -> int:
    """Bytes held by all arrays of a pytree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def finite_or_none(x: float) -> float | None:
    """For JSON, which has neither NaN nor infinity."""
    return x if math.isfinite(x) else None


def finite_data(data: Any) -> Any:
    """Plain JSON data with None in place of every number that is not finite."""
    match data:
        case float():
            return finite_or_none(data)
        case dict():
            return {key: finite_data(value) for key, value in data.items()}
        case list() | tuple():
            return [finite_data(value) for value in data]
        case _:
            return data
