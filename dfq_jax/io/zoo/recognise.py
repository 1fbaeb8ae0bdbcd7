"""Which network the tensors of a file belong to, told by their names and shapes alone."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dfq_jax.errors import UsageError
from dfq_jax.io.zoo import catalog
from dfq_jax.io.zoo.bind import COUNTER
from dfq_jax.io.zoo.catalog import Size
from dfq_jax.io.zoo.known import Network, ends, names, network, stored_at_size
from dfq_jax.io.zoo.last_layers import own_layers_of
from dfq_jax.io.zoo.stored import Stored
from dfq_jax.types import MOST_COLOURS

Tensors = Mapping[str, np.ndarray]
GOOD_MATCH = 0.9
PERFECT = 1.0


class Likeness(NamedTuple):
    """How well tensors fit the network they fit best: 1 means that all names and shapes do."""

    name: str
    share: float


def fitted_network(name: str, tensors: Tensors, size: Size | None = None) -> Network:
    """The network with the classes and input channels the checkpoint's own layers have."""
    published = network(name, size=size)
    stem, head = ends(published)
    shapes = {p.torch_name: p.torch_shape for p in published.expected}
    usual = channels, classes = shapes[stem][1], shapes[head][0] if head else None
    first, last = tensors.get(stem), tensors.get(head) if head else None
    if first is not None and first.ndim == 4 and first.shape[1] > 0:
        channels = first.shape[1]
    if last is not None and head and last.ndim == len(shapes[head]) and last.shape[0] > 0:
        classes = last.shape[0]
    if (channels, classes) == usual:
        return published
    if isinstance(published, Stored):
        return stored_at_size(published, size, classes, channels)
    return network(name, size=size, classes=classes, channels=channels)


def closest(tensors: Tensors) -> Likeness:
    """The known network whose names and shapes these tensors share most; the first of equals."""
    scores = (Likeness(name, likeness(fitted_network(name, tensors), tensors)) for name in names())
    return max(scores, key=lambda each: each.share)


class Recognised(NamedTuple):
    """A network that tensors are the weights of.

    Attributes:
      name: of the network.
      tensors: under the names that it has.
      notes: what was called otherwise, in sentences.
    """

    name: str
    tensors: Tensors
    notes: tuple[str, ...] = ()


def with_usual_head(name: str, tensors: Tensors) -> Recognised:
    """A network by name, its last layer under the name it was published with, if that can be told.

    Args:
      name: one of `known.names()`.
      tensors: {PyTorch name: array}.
    """
    head = own_layers_of(fitted_network(name, tensors), tensors)
    if head is None or head.renamed is None:
        return Recognised(name, tensors)
    note = f"took {head.layers[0]} as its last layer {head.usual}"
    return Recognised(name, head.renamed, (note,))


def likeness(candidate: Network, tensors: Tensors) -> float:
    """Shared (name, shape) pairs over all pairs of either: 1 means a perfect fit."""
    unread = candidate.unread if isinstance(candidate, Stored) else ()
    wanted = {(p.torch_name, p.torch_shape) for p in candidate.expected}
    found = {
        (name, array.shape)
        for name, array in tensors.items()
        if not name.endswith(COUNTER) and not name.startswith(unread)
    }
    return len(wanted & found) / max(len(wanted | found), 1)


def named_network(tensors: Tensors, where: str, *, normalised: bool) -> Recognised:
    """The network that these tensors are the weights of, but for a last layer of somebody's own.

    Args:
      tensors: {PyTorch name: array}.
      where: what messages call their file.
      normalised: whether the user says how its images are normalised.

    Raises:
      UsageError: if they fit none, with the line that exports the network; or if they fit one of
        those for small images, which are normalised as everyone likes, and the user does not say.
    """
    best = closest(tensors)
    found = with_usual_head(best.name, tensors)
    if found.tensors is not tensors:
        best = Likeness(
            best.name, likeness(fitted_network(best.name, found.tensors), found.tensors)
        )
    if best.share == PERFECT and (normalised or has_usual_images(best.name)):
        return found
    holds = f"{where} holds weights but not the network. "
    if best.share == PERFECT:
        raise UsageError(
            f"{holds}Its tensors fit {best.name} (100%): try `arch={best.name!r}`, with "
            "the `mean=` and `std=` of its training; small images have no usual ones."
        )
    raise UsageError(
        f"{holds}Known by the names of their tensors, or by `arch=`, are {families()} networks "
        f'(`arch="list"` names all).{own_head(best, tensors) or hint(best)}{export_lines(tensors)}'
    )


def has_usual_images(name: str) -> bool:
    """Whether everybody prepares images alike for this network, as they do for ImageNet's."""
    return name not in catalog.ENTRIES or catalog.ENTRIES[name].contract.resize is not None


def families() -> str:
    """The first words of all names."""
    words = (re.match(r"(wide_)?[a-z]+", name) for name in names())
    return ", ".join(dict.fromkeys(word[0] for word in words if word is not None))


def suggestion(tensors: Tensors, tried: str) -> str:
    """What to try instead of a network these tensors do not fit.

    Args:
      tensors: {PyTorch name: array}.
      tried: the network.

    Returns:
      The name they fit better; the line that exports any network if none fits well, or this one
      but for a few; nothing if they fit this one.
    """
    best = closest(tensors)
    if best.name == tried and best.share == PERFECT:
        return ""
    return export_lines(tensors) if best.name == tried else hint(best) or export_lines(tensors)


def hint(best: Likeness) -> str:
    """A sentence that names a network, empty if it hardly fits."""
    if best.share <= GOOD_MATCH:
        return ""
    return f" Its tensors fit {best.name} best ({best.share:.0%}): try `arch={best.name!r}`."


def own_head(best: Likeness, tensors: Tensors) -> str:
    """A sentence on a checkpoint that is a known network but for its last layers."""
    head = own_layers_of(fitted_network(best.name, tensors), tensors)
    return "" if head is None else f" Its tensors are those of {best.name}, {head.told}."


def export_lines(tensors: Tensors) -> str:
    """How to save any network together with its graph.

    Args:
      tensors: its weights; the first kernel tells how many channels an image has. Without a
        convolution of images, or with more channels than those have, it reads something else.
    """
    channels = next((tensor.shape[1] for tensor in tensors.values() if tensor.ndim == 4), 0)
    pictures = 0 < channels <= MOST_COLOURS
    read = "the size of its images for 224" if pictures else "what it reads for `example`"
    zeros = f"(torch.zeros(1, {channels}, 224, 224),)" if pictures else "(example,)"
    return (
        "\nOf any other network save the graph too, where its code is at hand and `model` holds "
        f"these weights, with {read}, and give dfq that file:\n"
        f'  import torch; torch.export.save(torch.export.export(model.eval(), {zeros}), "net.pt2")'
        "\nor, before PyTorch 2.9,\n"
        f'  import torch; torch.onnx.export(model.eval(), {zeros}, "net.onnx", '
        "training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)"
    )
