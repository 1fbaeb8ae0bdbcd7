"""Detection: FastestDet on 128 images of COCO, judged by mean average precision."""

import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import Column, Row
from task_runs import Asked, Task, quantized

WEIGHTS, FOLDED = "models/fastestdet_coco.pth", "models/fastestdet.onnx"
IMAGES = "models/coco128_val_480.zip"
SIDE = 352
LEAST, OVERLAP, MOST = 0.005, 0.45, 100
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
FILES = {
    "fastestdet .pth": (WEIGHTS, ()),
    "fastestdet .onnx": (FOLDED, ("--no-bn-fallback", "--mean", "0", "--std", "1")),
}
"""{name: (file, further options)}: with its batch norms, and after an exporter folded them."""


class Boxes(NamedTuple):
    """Boxes of one image as shares of its sides: (left, top, right, bottom)."""

    corners: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


def rows(asked: Asked) -> Iterable[Row]:
    """The float networks, then one row a file, scheme and preset."""
    images = list(labelled(asked.shared / IMAGES))[: asked.limit]
    exact = judged(asked.shared / FOLDED, images)
    yield {"network": "fastestdet", "scheme": "float", **exact}
    for preset in asked.presets:
        for scheme in asked.schemes or TASK.schemes:
            for name, (file, options) in FILES.items():
                made = quantized(name, asked.shared / file, scheme, preset, asked, *options)
                found = judged(made.file, images) if made.there else {}
                yield made.row | found


def labelled(archive: Path) -> Iterator[tuple[np.ndarray, Boxes]]:
    """Images as the network reads them, blue first, with what is on them."""
    import PIL.Image

    with zipfile.ZipFile(archive) as found:
        for name in sorted(n for n in found.namelist() if n.endswith(".jpg")):
            pixels = np.asarray(PIL.Image.open(io.BytesIO(found.read(name))).convert("RGB"))
            text = found.read(name.replace("images", "labels").replace(".jpg", ".txt")).decode()
            values = np.array([line.split() for line in text.splitlines() if line], np.float64)
            classes, boxes = values[:, 0].astype(int), corners(values[:, 1:])
            image = resized(pixels[:, :, ::-1], SIDE) / np.float32(255)
            yield image.transpose(2, 0, 1), Boxes(boxes, classes, np.ones(len(boxes)))


def corners(boxes: np.ndarray) -> np.ndarray:
    """(middle, size) as (first corner, last corner)."""
    middle, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([middle - half, middle + half], axis=1)


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """A square by bilinear interpolation between the four nearest pixels, rounded to 8 bits."""
    x = image.astype(np.float32)
    for axis in (0, 1):
        size = x.shape[axis]
        at = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
        first = np.minimum(at.astype(int), size - 2)
        share = (at - first).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1)).astype(np.float32)
        low, high = np.take(x, first, axis), np.take(x, first + 1, axis)
        x = low + share * (high - low)
    return np.rint(x).astype(np.float32)


def judged(file: Path, images: list[tuple[np.ndarray, Boxes]]) -> dict[str, float]:
    """Mean average precision of a file in ONNX Runtime."""
    from dfq_jax.io.runtime.session import open_session

    session = open_session(file, optimize=True)
    name = session.get_inputs()[0].name
    found = [decoded(session.run(None, {name: image[None]})[0][0]) for image, _ in images]
    precisions = average_precisions(found, [boxes for _, boxes in images])
    return {"map50": float(precisions[0]), "map": float(precisions.mean())}


def decoded(output: np.ndarray) -> Boxes:
    """Boxes of an output [1 + 4 + classes, height, width], overlapping ones of a class removed."""
    _, height, width = output.shape
    rows, columns = np.mgrid[:height, :width]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    middle = [(np.tanh(output[1]) + columns) / width, (np.tanh(output[2]) + rows) / height]
    boxes = np.stack([*middle, sigmoid(output[3]), sigmoid(output[4])], axis=-1).reshape(-1, 4)
    classes = output[5:].argmax(0).reshape(-1)
    scores = (output[0] ** 0.6 * output[5:].max(0) ** 0.4).reshape(-1)
    likely = scores > LEAST
    return kept(Boxes(corners(boxes[likely]), classes[likely], scores[likely]))


def kept(boxes: Boxes) -> Boxes:
    """Of boxes of one class that overlap, the surest."""
    order, left = np.argsort(-boxes.scores, kind="stable"), []
    overlap = overlaps(boxes.corners, boxes.corners) > OVERLAP
    overlap &= boxes.classes[:, None] == boxes.classes
    gone = np.zeros(len(order), bool)
    for index in order:
        if not gone[index]:
            left.append(index)
            gone |= overlap[index]
    return Boxes(*(values[left[:MOST]] for values in boxes))


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every two boxes."""
    first = np.maximum(a[:, None, :2], b[None, :, :2])
    last = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.prod(np.clip(last - first, 0, None), axis=-1)
    area = lambda x: np.prod(x[:, 2:] - x[:, :2], axis=-1)
    return both / np.maximum(area(a)[:, None] + area(b) - both, 1e-12)


def average_precisions(found: list[Boxes], wanted: list[Boxes]) -> np.ndarray:
    """At every threshold, the mean over classes that are on some image, by COCO's rule.

    Surest first, a box takes the free one it overlaps most if it does so by the threshold;
    precision is made to fall with recall and read at 101 points.
    """
    classes = sorted({int(c) for boxes in wanted for c in boxes.classes})
    return np.mean([precision_of(c, found, wanted) for c in classes], axis=0)


def precision_of(label: int, found: list[Boxes], wanted: list[Boxes]) -> np.ndarray:
    """Average precision of a class at every threshold."""
    scores, hits, there = [], [], 0
    for some, true in zip(found, wanted, strict=True):
        mine, aims = some.classes == label, true.classes == label
        there += int(aims.sum())
        order = np.argsort(-some.scores[mine], kind="stable")
        scores.append(some.scores[mine][order])
        overlap = overlaps(some.corners[mine][order], true.corners[aims])
        hits.append([matched(overlap, threshold) for threshold in THRESHOLDS])
    order = np.argsort(-np.concatenate(scores), kind="stable")
    rows = np.concatenate([np.array(h).reshape(len(THRESHOLDS), -1) for h in hits], axis=1)
    return np.array([area_under(row[order], there) for row in rows])


def matched(overlap: np.ndarray, threshold: float) -> list[bool]:
    """Which boxes find one of their own, surest first."""
    free, result = np.ones(overlap.shape[1], bool), []
    for row in overlap:
        open_ones = np.where(free, row, -1.0)
        best = int(open_ones.argmax()) if len(row) else -1
        hit = best >= 0 and open_ones[best] >= threshold
        if hit:
            free[best] = False
        result.append(bool(hit))
    return result


def area_under(hits: np.ndarray, there: int) -> float:
    """Mean precision at 101 values of recall."""
    right = np.cumsum(hits)
    precision = right / np.arange(1, len(hits) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(right / there, RECALLS, side="left")
    return float(np.mean(np.where(at < len(hits), np.append(falling, 0.0)[at], 0.0)))


TASK = Task(
    columns=(
        Column("map50", "mAP50 %", ".1fx100"),
        Column("map", "mAP50:95 %", ".1fx100"),
    ),
    needs=(WEIGHTS, FOLDED, IMAGES),
    schemes=("w8a8", "w4a8"),
    rows=rows,
)
