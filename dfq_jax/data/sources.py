"""The one way to name labelled images: a folder, a zip archive, or a prepared TFDS data set."""

import zipfile
from pathlib import Path

from dfq_jax.data.folders import LAYOUT, open_folder, open_zip
from dfq_jax.data.source import LabelledImages
from dfq_jax.data.tfds import open_tfds
from dfq_jax.errors import DataError

__all__ = ["LabelledImages", "open_source"]

TFDS = "tfds:"


def open_source(spec: str) -> LabelledImages:
    """Opens labelled images for evaluation.

    Args:
      spec: one of
        - a folder of class folders, `<class>/<image>`, optionally below one extra top folder;
        - a `.zip` archive of one, read without extracting;
        - `tfds:NAME` or `tfds:NAME:SPLIT`, a TFDS data set prepared on this machine (in
          `TFDS_DATA_DIR` if set); never downloaded.

        In folders and archives the sorted class folder names are the classes, and images follow
        each other in natural order within a class.

    Returns:
      A source with a fixed order. Images are decoded when indexed, so a damaged one is reported
      then.

    Raises:
      DataError: if nothing readable is there; the message says what was found and expected.
      ImportError: if a `tfds:` spec is given without `dfq-jax[data]` installed.
      UnsafeInputError: if an archive tries to escape or to exhaust memory.
    """
    if spec.startswith(TFDS):
        return open_tfds(spec.removeprefix(TFDS))
    path = Path(spec).expanduser()
    if path.is_dir():
        return open_folder(path)
    if not path.exists():
        raise DataError(
            f"no images at {spec}: the path does not exist. "
            f"Give a folder, a .zip archive, or tfds:NAME."
        )
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise DataError(
            f"cannot read images from {spec}: it is neither a folder nor a readable zip archive "
            f"({path.stat().st_size} bytes); {LAYOUT}."
        )
    return open_zip(path)
