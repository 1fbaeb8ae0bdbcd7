"""What makes up for channels that are gone, without training: methods of papers, by name.

Each works on the network with zeros where channels go (`passes.select.masked`), whose programs are
those of the original; `select` then cuts what is zero.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dfq_jax.base.words import RestorationName
from dfq_jax.graph.channels import groups_of
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.graph.query import consumers, weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.substitution import Coefficients, FilterGram, Places, lbyl, merged, udfc
from dfq_jax.passes.moments import mean_output
from dfq_jax.passes.select import Kept, masked, standing
from dfq_jax.pruning.filters import filter_grams
from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.refit import fitted, refit

Substitution = Callable[[FilterGram, Places, Places], Coefficients]
"""(filters, which are gone, which are left) -> what the latter take over."""


class Restoration(NamedTuple):
    """What is done about channels that are gone, in this order.

    Attributes:
      by: how others stand in for them, by weights alone; None for not at all.
      means: whether biases make up for the mean of what is missing, by the statistics of batch
        norms (ReLU mean correction).
      damping: of layers fitted anew to what they should put out on images, in units of the mean
        power of what they read; None for no fit.
      norms: whether batch norms are re-estimated on images, and biases with them.
    """

    by: Substitution | None = None
    means: bool = False
    damping: float | None = None
    norms: bool = False

    @property
    def looks(self) -> bool:
        """Whether it looks at images."""
        return self.norms or self.damping is not None


RESTORATIONS: Mapping[RestorationName, Restoration] = {
    "ridge": Restoration(damping=1.0, norms=True),
    "norms": Restoration(norms=True),
    "udfc": Restoration(by=udfc, means=True),
    "lbyl": Restoration(by=lbyl),
    "merging": Restoration(by=merged),
    "means": Restoration(means=True),
    "none": Restoration(),
}


def restored(subject: Subject, kept: Kept, how: Restoration) -> Model:
    """The network with zeros where channels go, and what is left making up for them.

    Args:
      subject: the network as it was; with images, if `how` looks at some.
      kept: which sets stay.
      how: what is done.

    Returns:
      A network of the shapes it had, for `select`.
    """
    zeros = masked(subject.model, subject.coupled, kept)
    if how.by is not None or how.means:
        zeros = by_weights(subject, kept, zeros, how)
    if not how.looks:
        return zeros
    mend = None if how.damping is None else partial(fitted, damping=how.damping)
    return refit(subject, kept, zeros, mend, norms=how.norms)


def by_weights(subject: Subject, kept: Kept, zeros: Model, how: Restoration) -> Model:
    """The network in which columns of kernels and biases make up for what their layers miss."""
    stays, filters = standing(subject.coupled, kept), filter_grams(subject)
    for node in weighted_nodes(subject.folded.graph):
        read, written = (stays[v] for v in subject.coupled.slots[node.name]["kernel"][-2:])
        if read.all() or groups_of(node.op) > 1:
            continue
        whole = np.asarray(subject.model.params[node.name]["kernel"], np.float64) * written
        kernel = whole * read[:, None]
        if how.by is not None and node.inputs[0] in filters:
            behind = filters[node.inputs[0]]
            kernel = taken_over(whole, read, len(behind.bias), partial(how.by, behind))
        kernels = {node.name: {"kernel": jax.device_put(kernel.astype(np.float32))}}
        zeros = with_params(zeros, kernels)
        known = subject.expected.get(node.inputs[0])
        if how.means and known is not None:
            mean = np.resize(np.asarray(known.mean), len(read))
            missing = mean_output(node, jnp.asarray(whole - kernel), jnp.asarray(mean))
            zeros = shifted(zeros, node.name, np.asarray(missing, np.float64))
    return zeros


def taken_over(
    kernel: Float[np.ndarray, "... c o"],
    left: Kept,
    channels: int,
    by: Callable[[Places, Places], Coefficients],
) -> Float[np.ndarray, "... c o"]:
    """A kernel without some of its columns, which others have taken over.

    Args:
      kernel: of a layer; behind a flattened image each channel has several columns.
      left: which columns are left.
      channels: of the tensor before it was flattened, if it was.
      by: which are gone, which are left -> what the latter take over.
    """
    if kernel.shape[-2] % channels or not np.array_equal(
        left, np.resize(left[:channels], left.size)
    ):
        return kernel * left[:, None]
    stay = left[:channels]
    gone, others = np.flatnonzero(~stay), np.flatnonzero(stay)
    columns = kernel.reshape(-1, channels, kernel.shape[-1])
    found = columns * stay[:, None]
    found[:, others] += np.einsum("jk,wjo->wko", by(gone, others), columns[:, gone])
    return found.reshape(kernel.shape)


def shifted(model: Model, layer: str, shift: Float[np.ndarray, " chan"]) -> Model:
    """The network in which a layer's output is moved: by its bias, or the norm that reads it."""
    slots = model.params[layer]
    if "bias" in slots:
        bias = np.asarray(slots["bias"], np.float64) + shift
        return with_params(model, {layer: {"bias": jax.device_put(bias.astype(np.float32))}})
    readers = consumers(model.graph)[layer]
    if len(readers) != 1 or not isinstance(readers[0][0].op, BatchNorm):
        return model
    norm = readers[0][0].name
    mean = np.asarray(model.params[norm]["mean"], np.float64) - shift
    return with_params(model, {norm: {"mean": jax.device_put(mean.astype(np.float32))}})
