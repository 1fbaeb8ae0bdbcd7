"""Prepared TensorFlow Datasets, read without TensorFlow and without the network."""

import os
from typing import Any

import numpy as np
import PIL.Image

from dfq_jax.data.source import LabelledImages, decode
from dfq_jax.errors import DataError


def open_tfds(spec: str) -> LabelledImages:
    """A classification data set that TFDS prepared on this machine.

    Only prepared files are read, nothing is downloaded. Images are decoded by Pillow, whatever
    decoder TFDS would pick.

    Args:
      spec: `NAME` or `NAME:SPLIT`. NAME may carry a config (`name/config`) and means the newest
        version on disk; SPLIT may be sliced (`test[:1000]`) and defaults to `test`, else
        `validation`. Data lie in `TFDS_DATA_DIR`, else in TFDS's own default folder.

    Raises:
      DataError: if the data set is not prepared, has no such split, is stored in a format without
        random access, or is no image classification.
      ImportError: if tensorflow-datasets is not installed.
    """
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.read_only_builder import builder_from_files
    except ImportError as error:
        raise ImportError(
            f"reading tfds:{spec} needs tensorflow-datasets: pip install 'dfq-jax[data]'"
        ) from error
    name, _, split = spec.partition(":")
    data_dir = os.environ.get("TFDS_DATA_DIR") or None
    remedy = (
        f"Prepare it once: python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
        f"data_dir={data_dir!r}, file_format='array_record').download_and_prepare()\""
    )
    try:
        builder: Any = builder_from_files(name, data_dir=data_dir)
    except (ValueError, OSError) as error:
        raise DataError(
            f"cannot open tfds data set {name!r} in {data_dir or 'the default data_dir'}: "
            f"{str(error).splitlines()[0]}\n{remedy}"
        ) from error
    features = builder.info.features
    keys = find_keys(features, builder.info.supervised_keys, name)
    split = split or default_split(tuple(builder.info.splits), name)
    try:
        decoders: Any = {keys[0]: tfds.decode.SkipDecoding()}
        rows = builder.as_data_source(split=split, decoders=decoders)
        size = len(rows)
    except NotImplementedError as error:
        raise DataError(
            f"tfds data set {name!r} is prepared as {builder.info.file_format}, without random "
            f"access. Remove {builder.data_dir}. {remedy}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"tfds data set {name!r} has no split {split!r}, it has "
            f"{', '.join(builder.info.splits)}: {error}"
        ) from error
    classes = tuple(features[keys[1]].names)
    return LabelledImages(
        f"tfds:{name}:{split}", classes, size, reader(rows, keys, f"tfds:{name}:{split}")
    )


def reader(rows: Any, keys: tuple[str, str], name: str) -> Any:
    """`read(i)` over a TFDS data source whose images are still encoded."""

    def read(index: int) -> tuple[PIL.Image.Image, int]:
        row = rows[index]
        where, label = f"example {index} of {name}", int(row[keys[1]])
        if label < 0:
            raise DataError(f"{where} has no label; choose a split with labels.")
        return decode(row[keys[0]], where), label

    return read


def default_split(splits: tuple[str, ...], name: str) -> str:
    """`test` if the data set has it, else `validation`.

    Raises:
      DataError: if it has neither.
    """
    for split in ("test", "validation"):
        if split in splits:
            return split
    raise DataError(
        f"tfds data set {name!r} has neither a test nor a validation split; choose one of "
        f"{', '.join(splits)}, as in tfds:{name}:{(*splits, 'SPLIT')[0]}."
    )


def find_keys(features: Any, supervised: Any, name: str) -> tuple[str, str]:
    """Feature names of the 8- or 16-bit image and of the class label.

    `supervised_keys` decide when several features qualify (CIFAR-100 has two labels).

    Raises:
      DataError: if there is not exactly one such pair.
    """
    import tensorflow_datasets as tfds

    images = [
        key
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image) and feature.np_dtype in (np.uint8, np.uint16)
    ]
    labels = [k for k, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if supervised and len(supervised) == 2 and supervised[0] in images and supervised[1] in labels:
        return supervised[0], supervised[1]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"tfds data set {name!r} is no image classification: it has {len(images)} image and "
            f"{len(labels)} class label features among {', '.join(features)}, expected one each."
        )
    return images[0], labels[0]
