"""Puts the tensors of a `state_dict` into the program of a stored network, and imports that."""

import re
from collections.abc import Sequence

import numpy as np

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.io.frontends.graph_files import check_shapes, on_device
from dfq_jax.io.importing.aten_table import ATEN
from dfq_jax.io.importing.engine import import_program
from dfq_jax.io.zoo.bind import (
    VARIANCE,
    BoundNetwork,
    Tensors,
    as_float32,
    check_finite,
    check_fit,
    statistics,
    statistics_notes,
)
from dfq_jax.io.zoo.stored import Stored

OLDER_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)
"""How torchvision called weights of DenseNets and vision transformers, and calls them now."""


def bind_stored(network: Stored, tensors: Tensors) -> BoundNetwork:
    """The network with the weights of a checkpoint; see `bind.bind`.

    Raises:
      CheckpointError: listing what is missing, unexpected, of the wrong shape or not finite.
      UsageError: for images that are too small for it.
    """
    unread = [name for name in tensors if name.startswith(network.unread)]
    read = {name: array for name, array in tensors.items() if name not in unread}
    check_fit(network, read)
    arrays = {name: as_float32(read[name]) for name, _ in network.expected}
    check_finite(arrays)
    notes = statistics_notes(*statistics(arrays))
    raised = {n: np.maximum(a, 0.0) if n.endswith(VARIANCE) else a for n, a in arrays.items()}
    return BoundNetwork(imported(network, raised), (*left_out(unread), *network.remarks, *notes))


def left_out(unread: Sequence[str]) -> tuple[str, ...]:
    """A note on weights that only training reads, if there are any."""
    if not unread:
        return ()
    return (f"left out {len(unread)} tensors that only training reads, such as {unread[0]}",)


def imported(network: Stored, arrays: Tensors) -> Model:
    """The network with these weights, in this library's layouts."""
    contract = network.contract
    program, size = network.program(arrays), (contract.height, contract.width)
    try:
        found = import_program(program, ATEN, size=size)
        model = Model(found.graph, on_device(found.params), (contract,))
        check_shapes(model, network.name)
    except UnsupportedModelError as error:
        raise UsageError(
            f"{network.name} cannot read images of {size[0]}x{size[1]}: {error} Choose a larger "
            "size."
        ) from None
    return model


def modern_names(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Weights under the names torchvision gives them today, and a note if some had others."""
    result = {}
    for name, array in tensors.items():
        for pattern, today in OLDER_NAMES:
            name = pattern.sub(today, name)
        result[name] = array
    changed = len(result.keys() - tensors.keys())
    if len(result) < len(tensors) or not changed:
        return tensors, ()
    return result, (f"renamed {changed} tensors as torchvision calls them today",)
