"""Generators that are trained for as long as the student is: a label and noise become an image.

Xu et al. 2020, "Generative Low-bitwidth Data Free Quantization": with codes `h` for labels `y`,

    h -> linear -> norm -> (x2 -> conv -> norm -> leaky) ... -> conv -> tanh -> norm

Norms are by the statistics of the batch; the last has neither scale nor bias, so images have mean 0
and deviation 1 in every colour, which are natural units. What a code is differs from paper to
paper, and is a function here.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.graph.lowering import convolve_tiled
from dfq_jax.graph.ops import Conv2d
from dfq_jax.synthesis.recipe import random_labels
from dfq_jax.values import bound

SAME = Conv2d(padding=((1, 1), (1, 1)))
DAMPED = 0.8
"""Epsilon of the hidden norms: features that vary little stay small. As released."""
PLAIN_EPSILON = 1e-5
LabelDraw = Callable[[Key[Array, ""], int, int], Float[Array, "b classes"]]
"""(key, images, classes) -> one-hot labels of a batch."""


class Drawn(NamedTuple):
    """Codes of a batch, and what they stand for.

    Attributes:
      codes: what the generator reads.
      labels: one-hot, or shares of classes.
    """

    codes: Float[Array, "b n"]
    labels: Float[Array, "b classes"]


class GeneratorKind(NamedTuple):
    """What a generator is.

    Attributes:
      begin: (key, classes, rows of the teacher's classifier or None) -> what codes are made of.
      draw: (that, key, images, classes) -> codes.
      length: of a code.
      channels: of the first feature map, and of those after each doubling.
      leak: slope of negative values.
      epsilon: of hidden norms but the first.
      by_class: hidden norms have scales and biases of their own for each class, as GDFQ's for
        ImageNet.
    """

    begin: Callable[[Key[Array, ""], int, Array | None], PyTree]
    draw: Callable[[PyTree, Key[Array, ""], int, int], Drawn]
    length: int = 100
    channels: tuple[int, ...] = (128, 128, 64)
    leak: float = 0.2
    epsilon: float = DAMPED
    by_class: bool = False

    @property
    def scale(self) -> int:
        """How many times larger than the first feature map images are."""
        return 2 ** (len(self.channels) - 1)


def labelled_noise(
    *, length: int = 100, labels: LabelDraw = random_labels
) -> tuple[Callable[..., PyTree], Callable[..., Drawn]]:
    """Codes `E_y * z`: normal noise times a learned vector of the label (GDFQ for CIFAR).

    Args:
      length: of a code.
      labels: how those of a batch are drawn.
    """
    return bound(class_vectors, length), bound(noise_by_class, labels)


def class_vectors(length: int, key: Key[Array, ""], classes: int, rows: Array | None) -> Array:
    """A normal vector for each class."""
    del rows
    return jax.random.normal(key, (classes, length))


def noise_by_class(
    labels: LabelDraw, vectors: Array, key: Key[Array, ""], size: int, classes: int
) -> Drawn:
    """What `labelled_noise` draws."""
    noise_key, label_key = jax.random.split(key)
    named = labels(label_key, size, classes)
    return Drawn((named @ vectors) * jax.random.normal(noise_key, (size, vectors.shape[1])), named)


def plain_noise(
    *, length: int = 100, labels: LabelDraw = random_labels
) -> tuple[Callable[..., PyTree], Callable[..., Drawn]]:
    """Codes of noise alone; the label is told by norms (GDFQ for ImageNet)."""
    return nothing_learned, bound(noise_alone, length, labels)


def nothing_learned(key: Key[Array, ""], classes: int, rows: Array | None) -> tuple[()]:
    """Codes that nothing is learned of."""
    del key, classes, rows
    return ()


def noise_alone(
    length: int, labels: LabelDraw, made_of: Any, key: Key[Array, ""], size: int, classes: int
) -> Drawn:
    """What `plain_noise` draws."""
    del made_of
    noise_key, label_key = jax.random.split(key)
    codes = jax.random.normal(noise_key, (size, length))
    return Drawn(codes, labels(label_key, size, classes))


def begun_generator(
    kind: GeneratorKind,
    key: Key[Array, ""],
    shape: tuple[int, int, int],
    classes: int,
    rows: Array | None = None,
) -> dict[str, PyTree]:
    """A generator before its first step.

    Args:
      kind: of generator.
      key: of its random start, that of PyTorch: uniform within `1 / sqrt(fan_in)`.
      shape: height, width and colours of its images; both sides divisible by the kind's scale.
      classes: of the teacher.
      rows: of the teacher's classifier, one a class, for codes that begin there.
    """
    height, width, colours = shape
    first, *hidden = kind.channels
    keys = iter(jax.random.split(key, len(hidden) + 3))
    by_class = classes if kind.by_class else None
    grid = height // kind.scale, width // kind.scale, first
    x = {"made_of": kind.begin(next(keys), classes, rows)}
    x["project"] = uniform_layer(next(keys), (kind.length,), grid)
    x["norm0"] = norm_at_first(first, by_class)
    for number, (read, made) in enumerate(pairwise(kind.channels), 1):
        x[f"conv{number}"] = uniform_layer(next(keys), (3, 3, read), (made,))
        x[f"norm{number}"] = norm_at_first(made, by_class)
    x["last"] = uniform_layer(next(keys), (3, 3, kind.channels[-1]), (colours,))
    return x


def uniform_layer(
    key: Key[Array, ""], read: tuple[int, ...], made: tuple[int, ...]
) -> dict[str, Array]:
    """Kernel and bias, uniform within `1 / sqrt(fan_in)`."""
    fan_in = 1
    for size in read:
        fan_in *= size
    limit, (kernel_key, bias_key) = fan_in**-0.5, jax.random.split(key)
    draw = lambda k, shape: jax.random.uniform(k, shape, jnp.float32, -limit, limit)
    return {"kernel": draw(kernel_key, (*read, *made)), "bias": draw(bias_key, made)}


def norm_at_first(channels: int, classes: int | None) -> dict[str, Array]:
    """Scales of 1 and biases of 0, for each class if there are some."""
    shape = (channels,) if classes is None else (classes, channels)
    return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def generated_images(
    kind: GeneratorKind, x: Mapping[str, Any], key: Key[Array, ""], size: int, classes: int
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """Images in natural units, and their labels."""
    drawn = kind.draw(x["made_of"], key, size, classes)
    labels = drawn.labels
    h = jnp.tensordot(drawn.codes, x["project"]["kernel"], 1) + x["project"]["bias"]
    h = normed(h, x["norm0"], labels, PLAIN_EPSILON)
    for number in range(1, len(kind.channels)):
        h = convolved(doubled(h), x[f"conv{number}"])
        h = normed(h, x[f"norm{number}"], labels, kind.epsilon)
        h = jax.nn.leaky_relu(h, kind.leak)
    return centred(jnp.tanh(convolved(h, x["last"])), PLAIN_EPSILON), labels


def convolved(x: Float[Array, "b h w c"], layer: Mapping[str, Array]) -> Float[Array, "b h w o"]:
    """A 3x3 convolution that keeps the size."""
    return convolve_tiled(x, layer["kernel"], SAME) + layer["bias"]


def doubled(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Every pixel four times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def centred(x: Float[Array, "b h w c"], epsilon: float) -> Float[Array, "b h w c"]:
    """Mean 0 and deviation 1 of every channel over the batch."""
    mean = jnp.mean(x, (0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(jnp.mean((x - mean) ** 2, (0, 1, 2)) + epsilon)


def normed(
    x: Float[Array, "b h w c"],
    norm: Mapping[str, Array],
    labels: Float[Array, "b classes"],
    epsilon: float,
) -> Float[Array, "b h w c"]:
    """A batch norm, its scales and biases by class where it has some for each.

    Of images between classes they are weighted by the shares; Qimera's released code divides that
    by the number of classes that were mixed, so such images come out weaker than others.
    """
    per_image = lambda v: (labels @ v)[:, None, None] if v.ndim == 2 else v
    return centred(x, epsilon) * per_image(norm["scale"]) + per_image(norm["bias"])
