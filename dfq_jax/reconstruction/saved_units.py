"""Units that are done, kept so that a reconstruction goes on where it was stopped."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dfq_jax.graph.graph import Model
from dfq_jax.numerics.affine import Affine
from dfq_jax.optim.pieces import Piece, load_piece, save_piece
from dfq_jax.optim.progress import UnitReport
from dfq_jax.quantization.plan import Site


class Finished(NamedTuple):
    """A unit after learning.

    Attributes:
      model: the unit, kernels on their grids.
      qparams: its scales, by canonical site.
      report: how it fared.
    """

    model: Model
    qparams: Mapping[Site, Affine]
    report: UnitReport


def save_unit(path: Path, found: Finished) -> None:
    """Writes parameters, scales and report of a unit; its graph is as it was before.

    Raises:
      ResourceError: if the disk is full.
    """
    save_piece(path, Piece((found.model.params, dict(found.qparams)), found.report))


def load_unit(path: Path, model: Model, qparams: Mapping[Site, Affine]) -> Finished | None:
    """What `save_unit` wrote, or None if it did not, or the file is damaged.

    Args:
      path: the file.
      model: the unit before learning.
      qparams: its scales before learning.

    Returns:
      The unit after learning.
    """
    found = load_piece(path, (model.params, dict(qparams)))
    if found is None:
        return None
    params, scales = found.arrays
    *told, notes = found.about
    report = UnitReport(*told, notes=tuple(notes))
    return Finished(dataclasses.replace(model, params=params), scales, report)
