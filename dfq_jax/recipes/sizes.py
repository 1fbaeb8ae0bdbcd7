"""How large the images of a network are: methods have other values for small and for large ones."""

from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import refusal_of_half
from dfq_jax.types import Input, InputContract

SMALL_IMAGE = 64 * 64


def is_small(read: Input) -> bool:
    """Whether images are of the size of CIFAR's rather than of ImageNet's; all else is small."""
    return not isinstance(read, InputContract) or read.height * read.width <= SMALL_IMAGE


def gains_from_halves(model: Model) -> bool:
    """Whether a network reads large images, and can read them at half their size."""
    return not is_small(model.contract) and refusal_of_half(model) is None
