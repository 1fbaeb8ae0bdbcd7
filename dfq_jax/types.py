"""The small value types that cross every layer: inputs, moments, image sets."""

import dataclasses
import math
import numbers
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dfq_jax.normalisation import IMAGENET_MEAN, IMAGENET_STD, imagenet_like, unusable

MOST_COLOURS = 4
"""Channels of a picture: more are those of something else."""
NCHW, NHWC = "NCHW", "NHWC"
"""Orders of axes in which files read images: channels first, or last."""


class Moments(NamedTuple):
    """Mean and variance per channel of one tensor, as a batch norm recorded them; JAX or NumPy."""

    mean: Float[Any, " chan"]
    var: Float[Any, " chan"]


class SourceNames(NamedTuple):
    """What the file that a network was read from calls its ends; exported files call them so too.

    Attributes:
      input: its one input; empty where nothing says. Columns of tokens have names of their own.
      outputs: in the order of the graph's outputs; empty where nothing says.
    """

    input: str = ""
    outputs: tuple[str, ...] = ()


UNNAMED = SourceNames()
"""Of a network whose source says nothing, or has no file."""


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
      layout: of images in exported files, as the source reads them; the library itself always
        has channels last.
      names: of batch, height and width in exported files; empty where a size is fixed.
      natural: mean and deviation, per channel, of the photographs that the network sees, on pixels
        scaled to [0, 1]: what synthesis takes images to be like, in units where they have mean 0
        and deviation 1. None for those of ImageNet, and of its grey values for other channels:
        a prior, not a statistic of the network. It changes nothing of what the network computes.
      axes: of images in exported files, as the source reads them: 4, 3 of lines, which have no
        height, or 2 of plain values.
    """

    height: int
    width: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: int | None = None
    interpolation: str = "bilinear"
    assumed: bool = False
    layout: str = NCHW
    names: tuple[str, str, str] = ("N", "", "")
    natural: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    axes: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError on sizes, means or deviations no image could satisfy."""
        sizes = [s for s in (self.height, self.width, self.resize) if s is not None]
        if not all(isinstance(size, numbers.Integral) for size in sizes) or min(sizes) < 1:
            raise ValueError(
                f"InputContract needs a positive size, got {self.height}x{self.width}"
                f"{'' if self.resize is None else f' out of {self.resize}'}."
            )
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                f"InputContract needs one mean and one std per channel, "
                f"got mean={self.mean}, std={self.std}."
            )
        if wrong := unusable(self.mean, self.std):
            raise ValueError(wrong)
        if self.natural is not None:
            self.check_natural(*self.natural)
        sizes = (self.height, self.width)[: 4 - self.axes]
        if self.axes not in (2, 3, 4) or any(size != 1 for size in sizes):
            raise ValueError(f"{self.axes} axes are none of {self}.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation is bilinear or bicubic, got {self.interpolation!r}.")
        if self.layout not in (NCHW, NHWC):
            raise ValueError(f"layout is {NCHW} or {NHWC}, got {self.layout!r}.")
        if len(self.names) != 3 or not all(isinstance(name, str) for name in self.names):
            raise ValueError(f"names are those of batch, height and width, got {self.names!r}.")

    def check_natural(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Raises ValueError for a prior of other channels, or deviations of none."""
        if not len(mean) == len(std) == self.channels:
            raise ValueError(
                f"natural needs one mean and one std for each of {self.channels} channels, got "
                f"{mean} and {std}."
            )
        if wrong := unusable(mean, std):
            raise ValueError(f"natural: {wrong}")

    @property
    def photographs(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation per channel of what the network is taken to see."""
        if self.natural is not None:
            return self.natural
        return imagenet_like(self.channels)

    @property
    def channels(self) -> int:
        """Number of colour channels."""
        return len(self.mean)

    @property
    def colours(self) -> str:
        """The channels in words."""
        return "RGB" if self.channels == 3 else f"{self.channels} channels"

    @property
    def is_picture(self) -> bool:
        """Whether these are images as people have them, no lines, spectra or plain numbers."""
        return self.height > 1 and self.channels <= MOST_COLOURS

    @property
    def normalised(self) -> str:
        """How values are made, in words: from pixels, or between which they lie."""
        if not self.is_picture:
            low, high = self.value_range
            return f"values from {low:.4g} to {high:.4g}"
        rounded = lambda values: "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
        return f"(pixel/255 - {rounded(self.mean)}) / {rounded(self.std)}"

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest value a normalised pixel can have, over all channels."""
        ends = [((p - m) / s) for m, s in zip(self.mean, self.std, strict=True) for p in (0, 1)]
        return min(ends), max(ends)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        return self.height, self.width, self.channels

    @property
    def dtype(self) -> np.dtype:
        """Of normalised images."""
        return np.dtype(np.float32)

    def example(self, key: Key[Array, ""], n: int) -> Float[Array, "n h w c"]:
        """So many normalised images of 8-bit pixels, each drawn uniformly from all."""
        mean, std = (jnp.asarray(v, jnp.float32) for v in (self.mean, self.std))
        pixels = jax.random.randint(key, (n, *self.shape), 0, 256).astype(jnp.float32)
        return (pixels / jnp.float32(255) - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """Its fields as files keep them: without the usual prior of photographs and four axes."""
        told, usual = dataclasses.asdict(self), {"natural": None, "axes": 4}
        return {k: v for k, v in told.items() if k not in usual or v != usual[k]}

    def __str__(self) -> str:
        """What people call it."""
        return f"an image of {self.height}x{self.width} {self.colours}"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A row of token ids, or the mask beside one.

    Attributes:
      length: tokens of a row; of a free length the one that examples have.
      vocabulary: ids are 0 to `vocabulary - 1`.
      symbol: name of a free length in exported files; empty where it is fixed.
      mask: whether these are no ids but say of each token if it counts: 1 if so, else 0.
      begin: the id that every text begins with, None where it has none or nobody says.
    """

    length: int
    vocabulary: int = 2
    symbol: str = ""
    mask: bool = False
    begin: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for no tokens, or a mask of other than zeros and ones."""
        if not all(isinstance(n, numbers.Integral) for n in (self.length, self.vocabulary)):
            raise ValueError(f"Tokens needs whole numbers, got {self}.")
        if self.begin is not None and not 0 <= self.begin < self.vocabulary:
            raise ValueError(f"Tokens begins with one of its ids, got {self}.")
        if self.length < 1 or self.vocabulary < 2 or (self.mask and self.vocabulary != 2):
            raise ValueError(
                f"Tokens needs a length of 1 or more and 2 ids or more (2 for a mask), got {self}."
            )

    @property
    def shape(self) -> tuple[int]:
        """(length,) of one row."""
        return (self.length,)

    def of_length(self, length: int) -> "Tokens":
        """The same of so many tokens."""
        return dataclasses.replace(self, length=length)

    @property
    def layout(self) -> str:
        """Files have rows as the library has them."""
        return NHWC

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest id."""
        return 0.0, float(self.vocabulary - 1)

    @property
    def dtype(self) -> np.dtype:
        """Of ids and masks."""
        return np.dtype(np.int32)

    def example(self, key: Key[Array, ""], n: int) -> Int[Array, "n length"]:
        """So many rows of ids, each drawn uniformly from all; of a mask, all ones."""
        if self.mask:
            return jnp.ones((n, self.length), jnp.int32)
        return jax.random.randint(key, (n, self.length), 0, self.vocabulary)

    def __str__(self) -> str:
        """What people call it."""
        free = f", any number ({self.symbol})" if self.symbol else ""
        ids = f"{self.length} tokens of {self.vocabulary}"
        return f"{f'a mask of {self.length}' if self.mask else ids}{free}"


@dataclasses.dataclass(frozen=True)
class TokenColumns:
    """Several numbers of every token side by side; files have an input for each.

    Attributes:
      names: of the columns, as files call them.
      columns: what each holds; all of one length.
    """

    names: tuple[str, ...]
    columns: tuple[Tokens, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for columns that do not fit together, or names that are none."""
        lengths = {(c.length, c.symbol) for c in self.columns}
        if len(lengths) != 1 or not len(set(self.names)) == len(self.names) == len(self.columns):
            raise ValueError(f"TokenColumns needs columns of one length, a name each, got {self}.")

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.columns[0].length

    @property
    def symbol(self) -> str:
        """Name of a free length in exported files."""
        return self.columns[0].symbol

    @property
    def shape(self) -> tuple[int, int]:
        """(length, columns) of one row."""
        return self.length, len(self.columns)

    def of_length(self, length: int) -> "TokenColumns":
        """The same of so many tokens."""
        return TokenColumns(self.names, tuple(c.of_length(length) for c in self.columns))

    @property
    def layout(self) -> str:
        """Files have rows as the library has them."""
        return NHWC

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest number of any column."""
        return 0.0, max(c.value_range[1] for c in self.columns)

    @property
    def dtype(self) -> np.dtype:
        """Of ids and masks."""
        return np.dtype(np.int32)

    def example(self, key: Key[Array, ""], n: int) -> Int[Array, "n length columns"]:
        """So many rows of examples of each column; in half of them some of the last do not count.

        Those rows have a length of their own, at least half of the whole.
        """
        first, *keys = jax.random.split(key, 1 + len(self.columns))
        made = jnp.stack([c.example(k, n) for c, k in zip(self.columns, keys, strict=True)], -1)
        counts = jax.random.randint(first, (n, 1), -(-self.length // 2), self.length + 1)
        counts = jnp.where(jnp.arange(n)[:, None] % 2 == 0, self.length, counts)
        left_out = jnp.arange(self.length) >= counts
        masks = jnp.array([c.mask for c in self.columns])
        return jnp.where(left_out[..., None] & masks, 0, made)

    def __str__(self) -> str:
        """What people call it."""
        return ", ".join(f"{n} ({x})" for n, x in zip(self.names, self.columns, strict=True))


@dataclasses.dataclass(frozen=True)
class Values:
    """Plain numbers: features, sound, anything without a meaning known here.

    Attributes:
      size: of one example, without batch, in the library's order of axes (channels last).
      low: smallest value.
      high: largest value.
    """

    size: tuple[int, ...]
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for axes without values and for a range that is none."""
        if not all(isinstance(n, numbers.Integral) and n > 0 for n in self.size):
            raise ValueError(f"Values needs positive sizes, got {self.size}.")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"Values needs a range, got {self.low} to {self.high}.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.size

    @property
    def layout(self) -> str:
        """Files have numbers as the library has them."""
        return NHWC

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return self.low, self.high

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers."""
        return np.dtype(np.float32)

    def example(self, key: Key[Array, ""], n: int) -> Float[Array, "n ..."]:
        """So many examples, each value drawn uniformly from the range."""
        return jax.random.uniform(key, (n, *self.size), jnp.float32, self.low, self.high)

    def __str__(self) -> str:
        """What people call it."""
        size = "x".join(map(str, self.size)) or "1"
        return f"{size} values from {self.low:g} to {self.high:g}"


Input = InputContract | Tokens | TokenColumns | Values
"""What one input of a network reads. Each has the `shape`, `dtype` and `value_range` of one example
without batch, the `layout` of files, and can make an `example`."""


def in_words(inputs: Iterable[Input]) -> str:
    """What a network reads."""
    return ", ".join(map(str, inputs)) or "nothing"


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


def tree_bytes(tree: object) -> int:
    """Bytes held by all arrays of a pytree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
