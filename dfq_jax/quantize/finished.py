"""Units that are done, kept so that a reconstruction goes on where it was stopped."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dfq_jax.files import NOT_AN_NPZ, write_atomically
from dfq_jax.graph.graph import Model
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import Affine
from dfq_jax.quantize.plan import Site
from dfq_jax.quantize.unit_report import UnitReport


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
    arrays: dict[str, np.ndarray] = {
        "report": np.array(found.report[2:], np.float64),
        "titles": np.array(found.report[:2]),
    }
    for site, affine in found.qparams.items():
        for part, value in affine._asdict().items():
            arrays[f"{part}/{site.node}/{site.slot}"] = np.asarray(value)
    for name, slots in found.model.params.items():
        for slot, value in slots.items():
            arrays[f"{slot}/{name}"] = np.asarray(value)
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def load_unit(path: Path, model: Model, qparams: Mapping[Site, Affine]) -> Finished | None:
    """What `save_unit` wrote, or None if it did not, or the file is damaged.

    Args:
      path: the file.
      model: the unit before learning.
      qparams: its scales before learning.

    Returns:
      The unit after learning.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
            before, after, kept, seconds = arrays["report"].tolist()
            name, method = arrays["titles"].tolist()
            report = UnitReport(name, method, before, after, bool(kept), seconds)
            scales = {site: like(arrays, site, affine) for site, affine in qparams.items()}
            slots = {name: slots_like(arrays, name, old) for name, old in model.params.items()}
    except (*NOT_AN_NPZ, OSError):
        return None
    return Finished(with_params(model, slots), scales, report)


def like(arrays: Mapping[str, np.ndarray], site: Site, old: Affine) -> Affine:
    """Saved scales, of the shapes and types they had."""
    part = lambda name, v: shaped(arrays[f"{name}/{site.node}/{site.slot}"], v)
    return Affine(part("scale", old.scale), part("zero_point", old.zero_point))


def slots_like(
    arrays: Mapping[str, np.ndarray], layer: str, old: Mapping[str, Array]
) -> dict[str, Array]:
    """Saved parameters of a layer, of the shapes and types they had."""
    return {slot: shaped(arrays[f"{slot}/{layer}"], value) for slot, value in old.items()}


def shaped(found: np.ndarray, old: Array) -> Array:
    """A saved array.

    Raises:
      ValueError: if it is of another shape or type.
    """
    if found.shape != old.shape or found.dtype != old.dtype:
        raise ValueError(f"found {found.dtype} {found.shape}, not {old.dtype} {old.shape}")
    return jnp.asarray(found)
