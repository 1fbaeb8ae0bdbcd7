"""Accuracy of imported float networks in JAX, next to an independent PyTorch reference.

Counts of right answers among all images, and on how many images the top class differs.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import common
from common import Column, Row


class Case(NamedTuple):
    """A checkpoint, and what is known of it.

    Attributes:
      model: a checkpoint below the data folder, or the name of a built-in network.
      arch: of a checkpoint.
      data: labelled images, below the data folder.
      crop: pixels along each side of the centre crop.
      mean: of pixels 0..255, as its authors normalise.
      std: of pixels 0..255, as its authors normalise.
      stated: published top-1, and top-5 where published, in percent.
    """

    model: str
    arch: str | None
    data: str
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stated: str


IMAGENET = (255 * 0.485, 255 * 0.456, 255 * 0.406), (255 * 0.229, 255 * 0.224, 255 * 0.225)
CIFAR = ("data/cifar10-jpeg-test.zip", 32, *IMAGENET)
CASES = {
    "efficientnet_lite0": Case(
        "efficientnet_lite0",
        None,
        "data/imagenet-sample",
        224,
        (127.0,) * 3,
        (128.0,) * 3,
        "87.7 / 97.2",
    ),
    "mobilenet_v2": Case(
        "mobilenet_v2", None, "data/imagenet-sample", 224, *IMAGENET, "83.1 / 95.6"
    ),
    "resnet20-cifar10-jpeg": Case(
        "checkpoints/resnet20-cifar10-jpeg.pth", "resnet20_cifar", *CIFAR, "88.36"
    ),
    "resnet20-12fca82f": Case(
        "checkpoints/resnet20-12fca82f.th", "resnet20_cifar", *CIFAR, "81.03"
    ),
    "resnet56-4bfd9763": Case(
        "checkpoints/resnet56-4bfd9763.th", "resnet56_cifar", *CIFAR, "83.20"
    ),
}
TABLES = {
    "import_accuracy": (
        Column("network", "network"),
        Column("n", "images", ","),
        Column("stated", "stated %"),
        Column("torch_top1", "PyTorch top-1", ","),
        Column("torch_top5", "top-5", ","),
        Column("top1", "dfq_jax top-1", ","),
        Column("top5", "top-5", ","),
        Column("differ", "top-1 differs on"),
        Column("seconds", "s in JAX", ".0f"),
    )
}


def main() -> None:
    """Judges the chosen networks."""
    parser = common.parser(__doc__)
    known = common.choices(CASES)
    parser.add_argument("--networks", type=known, default=tuple(CASES), help=", ".join(CASES))
    parser.add_argument("--no-torch", action="store_true", help="leave the reference out")
    args = parser.parse_args()
    rows, reasons = [], set()
    for name in args.networks:
        case = CASES[name]
        needed = (case.data, *([case.model] if case.arch else []))
        if reason := common.absent(args.shared, *needed):
            reasons.add(reason)
            continue
        rows.append(row(name, case, args))
        common.logged(rows[-1], TABLES["import_accuracy"])
    if args.no_torch or common.versions()["torch"] == "absent":
        reasons.add("without the PyTorch reference")
    common.finish(args, TABLES, rows, "; ".join(sorted(reasons)) or None)


def row(name: str, case: Case, args: argparse.Namespace) -> Row:
    """Counts of one network."""
    import numpy as np

    from dfq_jax.api import functions as api
    from dfq_jax.data.accuracy import measured_accuracy
    from dfq_jax.data.sources import open_source

    path = args.shared / case.model if case.arch else case.model
    model = api.load(path, arch=case.arch)
    tops: list[np.ndarray] = []

    def predict(images: np.ndarray) -> np.ndarray:
        scores = np.asarray(api.predict(model, images))
        tops.append(scores.argmax(-1))
        return scores

    start = time.perf_counter()
    found = measured_accuracy(
        predict, open_source(str(args.shared / case.data)), model.contract, batch=50
    )
    seconds = time.perf_counter() - start
    made: Row = {
        "table": "import_accuracy",
        "network": name,
        "n": found.n,
        "stated": case.stated,
        "top1": round(found.top1 * found.n),
        "top5": round(found.top5 * found.n),
        "seconds": seconds,
    }
    if not args.no_torch and common.versions()["torch"] != "absent":
        made |= reference(case, args.shared, np.concatenate(tops)[: found.n])
    return made


def reference(case: Case, shared: Path, tops: object) -> Row:
    """Counts of the same network in PyTorch, and on how many images its top class is another."""
    import numpy as np
    import torch_reference as reference

    from dfq_jax.io.load import CARRIED

    if case.arch is None:
        network = getattr(reference, case.model)
        file = reference.packaged_weights(CARRIED[case.model].package)
    else:
        network, file = reference.cifar_resnet, shared / case.model
    state = reference.read_state(file)
    best, labels = reference.judge(
        network, state, shared / case.data, case.crop, case.mean, case.std
    )
    return {
        "torch_top1": int((best[:, 0] == labels).sum()),
        "torch_top5": int((best == labels[:, None]).any(axis=1).sum()),
        "differ": int((best[:, 0] != np.asarray(tops)).sum()),
    }


if __name__ == "__main__":
    main()
