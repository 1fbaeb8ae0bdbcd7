"""Finished pieces of a run on disk: what is not there whole is not there, and is made again."""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from dfq_jax.base.files import NOT_AN_NPZ, write_atomically


class Piece(NamedTuple):
    """Something a run has finished.

    Attributes:
      arrays: what it is.
      about: what there is to say of it, as plain JSON data.
    """

    arrays: PyTree
    about: Any


def save_piece(path: Path, piece: Piece) -> None:
    """Writes a piece, whole or not at all.

    Raises:
      ResourceError: if the disk is full.
    """
    leaves = {f"leaf_{i}": np.asarray(v) for i, v in enumerate(jax.tree.leaves(piece.arrays))}
    about = np.array(json.dumps(piece.about))
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, about=about, **leaves))


def load_piece(path: Path, like: PyTree) -> Piece | None:
    """What `save_piece` wrote, or None: if it did not, the file is damaged, or it is another piece.

    Args:
      path: the file.
      like: arrays, or their shapes and types, of the structure that was saved.
    """
    shapes, structure = jax.tree.flatten(like)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
            leaves = [saved[f"leaf_{i}"] for i in range(len(saved.files) - 1)]
            about = json.loads(str(saved["about"]))
    except (*NOT_AN_NPZ, RecursionError, OSError):
        return None
    kinds = lambda arrays: [(v.shape, v.dtype) for v in arrays]
    if kinds(leaves) != kinds(shapes):
        return None
    return Piece(jax.tree.unflatten(structure, [jax.device_put(v) for v in leaves]), about)
