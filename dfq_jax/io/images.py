"""Image sets on disk: `.npz` without pickle, with provenance and contract; and folders of them."""

import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dfq_jax.errors import DataError
from dfq_jax.files import NOT_AN_NPZ, npz_fault, write_atomically
from dfq_jax.io.graph_json import contract_from_json, contract_to_json
from dfq_jax.io.pickle_policy import listing
from dfq_jax.synthesis.shards import MANIFEST, load_shards
from dfq_jax.types import ImageSet


def save_images(path: str | Path, images: ImageSet) -> None:
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


def load_images(path: str | Path) -> ImageSet:
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


def is_image_set(folder: Path) -> bool:
    """Whether a folder holds shards of images, finished or not."""
    return (folder / MANIFEST).is_file() or any(folder.glob("shard-*.npz"))


def load_bare(path: Path) -> Bare | None:
    """The images of an `.npy` file, or of an `.npz` that says nothing else about them.

    Returns:
      None for an `.npz` with an input contract, which `load_images` reads.

    Raises:
      DataError: if it is damaged, or holds no `images`.
    """
    try:
        with open(path, "rb") as file:
            saved = np.load(file, allow_pickle=False)
            if isinstance(saved, np.ndarray):
                return Bare(saved, str(path))
            with saved:
                if "contract" in saved:
                    return None
                if "images" in saved:
                    return Bare(saved["images"], str(path))
                names = list(saved)
    except (*NOT_AN_NPZ, OSError) as error:
        raise DataError(
            f"{path} is not an image set of dfq_jax, nor other arrays ({npz_fault(error)}); make "
            "one with `dfq synthesize`."
        ) from None
    held = listing(names) if names else "nothing"
    raise DataError(f"{path} holds {held}; images lie under the key `images`.")


def load_npz(path: Path) -> ImageSet:
    """Images of one file.

    Raises:
      DataError: if it is missing, damaged, or holds something else.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
            images = saved["images"]
            about, provenance = (json.loads(str(saved[k])) for k in ("contract", "provenance"))
        contract = contract_from_json(about)
    except FileNotFoundError:
        raise DataError(f"no image set at {path}; make one with `dfq synthesize`.") from None
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
    return ImageSet(jnp.asarray(images), contract, provenance)
