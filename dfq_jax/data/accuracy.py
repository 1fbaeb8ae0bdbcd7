"""Top-1 and top-5 accuracy of anything that maps a batch of images to class scores."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Num

from dfq_jax.data.preprocess import preprocess
from dfq_jax.data.source import LabelledImages
from dfq_jax.errors import DataError, DfqError, UsageError
from dfq_jax.types import InputContract

Decoded = tuple[Float32[np.ndarray, "height width chan"], int]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How often the right class came first, or among the first five.

    Attributes:
      top1: fraction in [0, 1].
      top5: fraction in [0, 1]; among all classes when there are fewer than five.
      n: number of images judged.
    """

    top1: float
    top5: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """Plain data: `{"top1": ..., "top5": ..., "n": ...}`."""
        return dataclasses.asdict(self)


def measured_accuracy(
    predict: Callable[..., Any],
    source: LabelledImages,
    contract: InputContract,
    *,
    batch: int = 64,
    limit: int | None = None,
    on_batch: Callable[[int, int, float], object] | None = None,
) -> Accuracy:
    """Runs a network over labelled images and counts.

    Threads read, decode and preprocess the next batch while `predict` works on the current one.
    Every batch has exactly `batch` rows, so a jitted `predict` compiles once: the last is filled
    up with zeros whose scores are ignored.

    Args:
      predict: maps float32 (batch, height, width, channels), normalised by `contract`, to scores
        (batch, classes) of any real dtype.
      source: what `open_source` returns.
      contract: the network's input contract.
      batch: rows per call of `predict`.
      limit: judge only so many examples, spaced evenly over the source's order. Sources sorted by
        class thus lose the same share of every class, and with `limit` >= classes of equal size
        every class stays represented.
      on_batch: called after each batch with examples done, examples in total, and top-1 so far.

    Returns:
      Accuracy under NumPy's argmax convention: among equal scores the lowest class comes first.
      An image with a NaN score counts as wrong.

    Raises:
      UsageError: if `batch` or `limit` is below 1, or the scores are not (batch, classes).
      DataError: if an image cannot be read, or the source's classes are not the network's.
    """
    if batch < 1 or (limit is not None and limit < 1):
        raise UsageError(f"evaluate() needs batch and limit >= 1, got {batch} and {limit}.")
    if not len(source):
        raise DataError(f"evaluate() got no images: {source.kind} {source.name} is empty.")
    indices = pick(len(source), limit)
    chunks = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    hits = np.zeros(2, np.int64)
    done = 0
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")
    try:
        pending = [pool.submit(load_example, source, i, contract) for i in chunks[0]]
        for following in (*chunks[1:], []):
            images, labels = stack(pending, batch, contract)
            pending = [pool.submit(load_example, source, i, contract) for i in following]
            scores = checked_scores(predict(images), batch)
            targets = class_indices(source, scores.shape[1])[labels]
            hits += count_hits(scores[: len(labels)], targets)
            done += len(labels)
            if on_batch is not None:
                on_batch(done, len(indices), float(hits[0] / done))
    finally:
        pool.shutdown(cancel_futures=True)
    return Accuracy(float(hits[0] / done), float(hits[1] / done), done)


def load_example(source: LabelledImages, index: int, contract: InputContract) -> Decoded:
    """One preprocessed example; errors name its file, or its number where there is no file."""
    image, label = source[index]
    try:
        return preprocess(image, contract), label
    except DfqError as error:
        where = getattr(image, "filename", "") or f"example {index} of {source.name}"
        raise type(error)(f"{where}: {error}") from error


def pick(size: int, limit: int | None) -> list[int]:
    """At most `limit` indices below `size`, evenly spaced and increasing."""
    count = size if limit is None else min(limit, size)
    return [i * size // count for i in range(count)]


def stack(
    pending: Sequence[Future[Decoded]], batch: int, contract: InputContract
) -> tuple[Float32[np.ndarray, "batch height width chan"], Int[np.ndarray, " rows"]]:
    """Waits for decoded rows; images are padded with zeros to `batch` rows, labels are not."""
    images = np.zeros((batch, *contract.shape), np.float32)
    labels = np.zeros(len(pending), np.int64)
    for row, future in enumerate(pending):
        images[row], labels[row] = future.result()
    return images, labels


def checked_scores(scores: Any, batch: int) -> Num[np.ndarray, "batch classes"]:
    """The network's output as a NumPy array, float64 so that every dtype compares exactly.

    Raises:
      UsageError: if the shape is not (batch, classes).
    """
    array = np.asarray(scores)
    if array.ndim != 2 or array.shape[0] != batch or not array.shape[1]:
        raise UsageError(
            f"evaluate() needs scores of shape ({batch}, classes), predict returned {array.shape}."
        )
    return array.astype(np.float64)


def class_indices(source: LabelledImages, outputs: int) -> Int[np.ndarray, " classes"]:
    """Which network output each class of the source belongs to.

    Class names that are different integers in [0, outputs) are the outputs themselves, so a folder
    may hold some classes only. Otherwise the counts must agree, and the order is the source's.

    Raises:
      DataError: if the counts differ.
    """
    names = source.classes
    if all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names):
        numbers = [int(name) for name in names]
        if len(set(numbers)) == len(numbers) and max(numbers) < outputs:
            return np.array(numbers)
    if len(names) != outputs:
        raise DataError(
            f"network has {outputs} outputs, {source.kind} has {len(names)} classes: {source.name}."
            f" Every class needs a folder with at least one image, or name the class folders by "
            f"output index, 0 to {outputs - 1}."
        )
    return np.arange(outputs)


def count_hits(
    scores: Num[np.ndarray, "rows classes"], labels: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, "2"]:
    """Rows whose label ranks first, and among the first five.

    Rank counts the classes in front: higher scores, and equal scores of lower index. A row with a
    NaN is no hit.

    Args:
      scores: one row per image, any real values.
      labels: output index per image.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    valid = ~np.isnan(scores).any(axis=1)
    return np.array([(valid & (rank < k)).sum() for k in (1, 5)])
