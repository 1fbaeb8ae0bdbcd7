"""A synthesis method as a value: what is optimised, what it should match, and how."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.graph.graph import Model
from dfq_jax.synthesis.targets import Targets
from dfq_jax.synthesis.terms import Term


class Recipe(NamedTuple):
    """Everything a paper on image synthesis decides.

    Attributes:
      name: of the method.
      settings: hyper-parameters as plain JSON data; recorded in the images' provenance.
      steps: optimisation steps per batch, 0 without an objective.
      batch: images optimised together.
      init: (key, shape) -> variables, in natural units for free pixels.
      terms: the objective; none: the initial variables are the images.
      optimizer: learning-rate factor -> optax transform; the factor is halved after divergence.
      prepare: (model, targets, key) -> what all batches share, e.g. tolerances; run once.
      condition: (key, batch, classes) -> what one batch is conditioned on, e.g. labels.
      render: variables -> images in natural units.
      per_layer: round the batch to a multiple of the number of batch norms.
      bounded: show the network only pixels in 0..255; the clip passes gradients unchanged.
    """

    name: str
    settings: Mapping[str, Any]
    steps: int
    batch: int
    init: Callable[[Key[Array, ""], tuple[int, ...]], PyTree]
    terms: tuple[Term, ...]
    optimizer: Callable[[float], optax.GradientTransformation]
    prepare: Callable[[Model, Targets, Key[Array, ""]], PyTree] = lambda *_: ()
    condition: Callable[[Key[Array, ""], int, int], PyTree] = lambda *_: ()
    render: Callable[[PyTree], Float[Array, "b h w c"]] = lambda x: x
    per_layer: bool = False
    bounded: bool = False


def random_labels(key: Key[Array, ""], size: int, classes: int) -> Float[Array, "b classes"]:
    """One-hot labels, uniform over classes: a `condition` for class-conditional recipes."""
    return jax.nn.one_hot(jax.random.randint(key, (size,), 0, classes), classes)
