"""A network by its name alone, before anybody trained it."""

import numpy as np

from dfq_jax.graph.graph import Model
from dfq_jax.io.zoo.bind import VARIANCE, bind
from dfq_jax.io.zoo.known import network
from dfq_jax.io.zoo.stored import Stored
from dfq_jax.io.zoo.stored_weights import bind_stored
from dfq_jax.types import InputContract


def untrained(name: str, contract: InputContract, classes: int) -> Model:
    """A known architecture that reads and tells apart what another network does.

    Args:
      name: one of `known.names()`.
      contract: of the images.
      classes: how many.

    Returns:
      The network; norms change nothing, kernels are ones: `training.transfer.initialised` draws
      them.

    Raises:
      UnsupportedModelError: for an unknown name, with the nearest ones.
      UsageError: for images of a size that it cannot read.
    """
    height, width, channels = contract.shape
    found = network(name, size=(height, width), classes=classes, channels=channels)
    shapes = {weight.torch_name: weight.torch_shape for weight in found.expected}
    tensors = {key: beginning(key, shape) for key, shape in shapes.items()}
    made = bind_stored(found, tensors) if isinstance(found, Stored) else bind(found, tensors)
    return made.model


def beginning(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a `state_dict` before the first step: weights and variances 1, all else 0."""
    one = key.endswith((".weight", VARIANCE))
    return np.full(shape, np.float32(one))
