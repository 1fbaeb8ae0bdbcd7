"""Image sets on disk: `.npz` without pickle, with provenance and contract; and folders of them."""

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dfq_jax.base.files import NOT_AN_NPZ, npz_fault, write_atomically
from dfq_jax.base.npz import npz_names, read_npz
from dfq_jax.errors import DataError, UnsafeInputError
from dfq_jax.examples import Examples, evidence_in
from dfq_jax.io.artifacts.graph_json import contract_from_json, contract_to_json
from dfq_jax.io.readers.pickle_policy import listing
from dfq_jax.synthesis.run.shards import MANIFEST, load_shards

MEMBERS = ("images", "contract", "provenance")


def save_images(path: str | Path, images: Examples) -> None:
    """Writes images under `images`, contract and provenance as JSON text beside them.

    Args:
      path: the `.npz` file; replaced atomically.
      images: what to write.

    Raises:
      ResourceError: if the disk is full.
      UsageError: if the folder cannot be written to.
    """
    arrays = {
        "images": np.asarray(images.images, np.float32),
        "contract": np.array(json.dumps(contract_to_json(images.contract))),
        "provenance": np.array(json.dumps(dict(images.provenance), sort_keys=True)),
    }
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def load_images(path: str | Path) -> Examples:
    """Reads what `save_images` wrote, or a finished folder of image shards.

    Raises:
      DataError: if the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    found = load_shards(path) if path.is_dir() else load_npz(path)
    if not np.isfinite(found.images).all():
        raise DataError(f"{path} holds NaN or infinite pixels; synthesize the images anew.")
    return found


class Bare(NamedTuple):
    """An array of images about which nothing is said.

    Attributes:
      values: as stored.
      name: what messages call it.
    """

    values: np.ndarray
    name: str


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds shards of images, finished or not."""
    return (folder / MANIFEST).is_file() or any(folder.glob("shard-*.npz"))


def load_bare(path: Path, key: str = "images") -> Bare | None:
    """The array of an `.npy` file, or of an `.npz` that says nothing else about its images.

    Args:
      path: the file.
      key: of the array in an `.npz`.

    Returns:
      None for an `.npz` with an input contract, which `load_images` reads.

    Raises:
      DataError: if it is damaged, or holds no `images`.
    """
    try:
        if path.suffix.lower() == ".npy":
            return Bare(np.load(path, allow_pickle=False), str(path))
        names = npz_names(path)
        if "contract" in names:
            return None
        if key in names:
            return Bare(read_npz(path, (key,))[key], str(path))
    except UnsafeInputError as error:
        raise UnsafeInputError(f"{path}: {error}") from None
    except (*NOT_AN_NPZ, OSError) as error:
        raise DataError(
            f"{path} is not an image set of dfq_jax, nor other arrays ({npz_fault(error)}); make "
            "one with `dfq synthesize`."
        ) from None
    held = listing(names) if names else "nothing"
    raise DataError(f"{path} holds {held}; {key} lie under the key `{key}`.")


def is_image_set(path: Path) -> bool:
    """Whether a file holds what `save_images` writes, by the names in it."""
    try:
        if not path.is_file():
            return False
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist()) == {f"{name}.npy" for name in MEMBERS}
    except (*NOT_AN_NPZ, OSError):
        return False


def load_npz(path: Path) -> Examples:
    """Images of one file.

    Raises:
      DataError: if it is missing, damaged, or holds something else.
    """
    try:
        saved = read_npz(path, MEMBERS)
        images = saved["images"]
        about, provenance = (json.loads(str(saved[k])) for k in ("contract", "provenance"))
        contract = contract_from_json(about)
    except FileNotFoundError:
        raise DataError(f"no image set at {path}; make one with `dfq synthesize`.") from None
    except UnsafeInputError as error:
        raise UnsafeInputError(f"{path}: {error}") from None
    except (*NOT_AN_NPZ, OSError, DataError) as error:
        raise DataError(
            f"{path} is not an image set of dfq_jax ({npz_fault(error)}); make one with `dfq "
            "synthesize`."
        ) from None
    if not isinstance(provenance, dict):
        raise DataError(f"{path} says {provenance!r} about its making; synthesize the images anew.")
    if (
        images.ndim != 4
        or len(images) == 0
        or images.dtype != np.float32
        or images.shape[1:] != contract.shape
    ):
        raise DataError(
            f"{path} holds {images.dtype} {images.shape}, its contract says float32 "
            f"(n, {', '.join(map(str, contract.shape))}), n >= 1."
        )
    return Examples((jax.device_put(images),), (contract,), provenance, evidence_in(provenance))
