"""What layers lose of their weights, put back by the layers that read them: UDFC, in closed form.

A layer whose weights were rounded or made zero puts out `z~_m` in place of `z_m`. What is missing
is said by the filters that there are, and whatever read `m` reads these too. Filters before and
after are carried through sums, as filters of more inputs, and through activations and pooling as
they are. Layers go from front to back: each is changed once it makes up for those before it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dfq_jax.graph.channels import groups_of
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import WEIGHTED, Add, Concat, Conv2d, Linear
from dfq_jax.numerics.substitution import put_back
from dfq_jax.pruning.filters import SAME, within_groups

LayerArrays = Mapping[str, Float[np.ndarray, "..."]]
Damage = Callable[[str, Float[np.ndarray, "..."]], Float[np.ndarray, "..."]]
"""(layer, its kernel) -> the kernel on its grid, or with zeros."""


class Residuals(NamedTuple):
    """What is known of the filters behind a tensor's channels.

    Attributes:
      filters: products of those that there are now, `<w~_i, w~_j>`.
      missing: products of what each lacks with them, `<w_i - w~_i, w~_j>`.
    """

    filters: Float[np.ndarray, "c c"]
    missing: Float[np.ndarray, "c c"]


def restored_in_order(graph: Graph, kernels: LayerArrays, change: Damage) -> LayerArrays:
    """Kernels that are changed, each after it makes up for what those before it lack.

    Args:
      graph: of the network, its batch norms folded.
      kernels: of its layers.
      change: how a kernel is changed.

    Returns:
      All kernels, changed.
    """
    known, found = dict[str, Residuals](), {}
    for node in graph.nodes:
        read = [known.get(name) for name in node.inputs]
        if not isinstance(node.op, WEIGHTED):
            behind = passed_on(node, read)
            known |= {} if behind is None else {node.name: behind}
            continue
        kernel = np.asarray(kernels[node.name], np.float64)
        if read[0] is not None and groups_of(node.op) == 1:
            kernel = made_up(kernel, read[0])
        found[node.name] = np.asarray(change(node.name, kernel), np.float64)
        if isinstance(node.op, Conv2d | Linear):
            lacks = kernel - found[node.name]
            known[node.name] = of_filters(found[node.name], lacks, groups_of(node.op))
    return found


def made_up(kernel: Float[np.ndarray, "... c o"], read: Residuals) -> Float[np.ndarray, "... c o"]:
    """A kernel that reads the channels there are for what others lack."""
    channels = len(read.filters)
    if kernel.shape[-2] % channels:
        return kernel
    columns = kernel.reshape(-1, channels, kernel.shape[-1])
    return (columns + put_back(*read).T @ columns).reshape(kernel.shape)


def of_filters(
    now: Float[np.ndarray, "... c"], lacks: Float[np.ndarray, "... c"], groups: int
) -> Residuals:
    """The filters of a layer and what each lacks; of one in groups within these alone."""
    rows, gone = (v.reshape(-1, v.shape[-1]).T for v in (now, lacks))
    mask = within_groups(groups, len(rows), None) if groups > 1 else 1.0
    return Residuals((rows @ rows.T) * mask, (gone @ rows.T) * mask)


def passed_on(node: Node, read: list[Residuals | None]) -> Residuals | None:
    """The filters behind what an operator without weights makes; None where they are not known."""
    there = [x for x in read if x is not None]
    if not there or len(there) < len(read):
        return None
    match node.op:
        case Add() if len(there) == 2 and len(there[0].filters) == len(there[1].filters):
            return Residuals(*(a + b for a, b in zip(*there, strict=True)))
        case Concat(axis) if axis in (-1, 3):
            return Residuals(*(diagonal(parts) for parts in zip(*there, strict=True)))
        case op if isinstance(op, SAME):
            return there[0]
        case _:
            return None


def diagonal(parts: tuple[Float[np.ndarray, "_ _"], ...]) -> Float[np.ndarray, "c c"]:
    """Matrices along the diagonal of a larger one."""
    sizes = [len(part) for part in parts]
    ends = np.cumsum([0, *sizes])
    found = np.zeros((ends[-1], ends[-1]))
    for part, start, end in zip(parts, ends, ends[1:], strict=False):
        found[start:end, start:end] = part
    return found
