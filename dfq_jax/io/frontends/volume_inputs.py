"""What a network with its graph reads, where that is volumes: clips, scans."""

import dataclasses
from collections.abc import Sequence

from dfq_jax.errors import UsageError
from dfq_jax.io.frontends.contracts import ImportedNetwork, ToldInput
from dfq_jax.io.frontends.program import Program
from dfq_jax.io.importing.engine import OperatorTable
from dfq_jax.io.importing.volumes import import_volumes
from dfq_jax.normalisation import unusable
from dfq_jax.types import Values, plain_contract

USUAL = (-1.0, 1.0)
"""Smallest and largest value where nothing tells."""


def imported_volumes(program: Program, table: OperatorTable, told: ToldInput) -> ImportedNetwork:
    """The graph of a program of volumes, which are read in the order of axes of the source.

    Raises:
      UnsupportedModelError: if it cannot be imported.
      UsageError: for a size or layout of images.
    """
    if told.layout is not None or told.size is not None:
        wrong = "layout" if told.layout is not None else "size"
        raise UsageError(f"the network reads volumes, no images: leave out `{wrong}=`.")
    graph, params, size = import_volumes(program, table)
    low, high = plain_contract((1, 1, 3)).value_range if size[0] == 3 else USUAL
    read = Values(size, round(low, 3), round(high, 3))
    note = (
        f"it reads volumes {size} (channels, depth, height, width), taken to have values from "
        f"{read.low:g} to {read.high:g}; say `mean=` and `std=` of pixels in [0, 1] if not"
    )
    return ImportedNetwork(graph, params, read, () if told.normalised else (note,))


def with_range(read: Values, mean: Sequence[float], std: Sequence[float]) -> Values:
    """Values of pixels in [0, 1] that are normalised so.

    Raises:
      UsageError: for numbers that no pixels are normalised with.
    """
    if len(mean) != len(std):
        raise UsageError(f"give as many numbers in mean as in std, got {len(mean)} and {len(std)}.")
    if wrong := unusable(tuple(mean), tuple(std)):
        raise UsageError(wrong)
    ends = [(pixel - m) / s for m, s in zip(mean, std, strict=True) for pixel in (0, 1)]
    return dataclasses.replace(read, low=min(ends), high=max(ends))
