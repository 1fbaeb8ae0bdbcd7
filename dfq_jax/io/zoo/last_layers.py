"""The last layer of a network that somebody fitted to classes of their own.

Transfer learning leaves all tensors as they were published but those of the last layer, which
often lies inside of something: `model.fc = Sequential(Dropout(), Linear(512, 7))` keeps its weight
as `fc.1.weight`. Of one such layer nothing is unknown. Of several, what lies between them has no
tensors and cannot be told.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dfq_jax.io.zoo.bind import COUNTER
from dfq_jax.io.zoo.known import Network, ends
from dfq_jax.io.zoo.stored import Stored

Tensors = Mapping[str, np.ndarray]
WEIGHT, BIAS = ".weight", ".bias"
MOST_LAYERS = 4
"""That a sentence names."""


class OwnLayers(NamedTuple):
    """What a checkpoint has in place of a network's last layer, everything else being there.

    Attributes:
      usual: the layer of the network as published.
      layers: what there is instead, by name, in the order of the file.
      renamed: the tensors under the names of the published layer; None if they cannot stand there.
    """

    usual: str
    layers: tuple[str, ...]
    renamed: Tensors | None

    @property
    def told(self) -> str:
        """In a sentence what is there, for those whom no name helps."""
        if not self.layers:
            return f"but {self.usual} is missing"
        shown = ", ".join(self.layers[:MOST_LAYERS])
        more = len(self.layers) - MOST_LAYERS
        shown += f" and {more} more" if more > 0 else ""
        return (
            f"but in place of {self.usual} it has {shown}; what lies between them no tensor tells"
        )


def own_layers_of(published: Network, tensors: Tensors) -> OwnLayers | None:
    """The head of a checkpoint whose other tensors are all a network's; None of any other.

    Args:
      published: the network, as it fits the tensors best.
      tensors: {PyTorch name: array}.
    """
    _, weight = ends(published)
    usual = (weight or "").removesuffix(WEIGHT)
    shapes = {p.torch_name: p.torch_shape for p in published.expected}
    unread = published.unread if isinstance(published, Stored) else ()
    found = {n: x for n, x in tensors.items() if not n.endswith(COUNTER)}
    own = {n for n in found if n not in shapes and not n.startswith(unread)}
    others = {n: s for n, s in shapes.items() if n not in (usual + WEIGHT, usual + BIAS)}
    fits = all(n in found and found[n].shape == s for n, s in others.items())
    root = f"{usual.split('.')[0]}."
    if not usual or not fits or weight in found or not all(n.startswith(root) for n in own):
        return None
    layers = tuple(dict.fromkeys(n.rpartition(".")[0] for n in tensors if n in own))
    return OwnLayers(usual, layers, renamed(usual, layers, shapes, tensors))


def renamed(
    usual: str, layers: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], tensors: Tensors
) -> Tensors | None:
    """The tensors with the one layer of a head under its usual name, if it can stand there."""
    if len(layers) != 1:
        return None
    (own,) = layers
    weight, wanted = tensors.get(own + WEIGHT), shapes[usual + WEIGHT]
    if weight is None or weight.shape[1:] != wanted[1:]:
        return None
    names = {own + WEIGHT: usual + WEIGHT, own + BIAS: usual + BIAS}
    found = {names.get(name, name): array for name, array in tensors.items()}
    if usual + BIAS in shapes:
        found.setdefault(usual + BIAS, np.zeros(len(weight), np.float32))
    return found
