"""Training without data against plain PyTorch: what both reach after the same steps, and how fast.

Both begin at ResNet-20 on JPEG images, learn from the same images by the same method for the same
rounds, and take turns in one process: some steps of the library as it runs, then as many of a loop
written from the papers alone (`training_torch.py`). Times are medians over turns, without the
first, which compiles: by the clock, and on all cores together, which other work disturbs less
(`OMP_WAIT_POLICY=passive` keeps PyTorch's threads from spinning while they wait). Accuracy is of
the last step, on all test images: of ours the integer file in ONNX Runtime, of PyTorch's its
simulation, where batch norms are not folded and biases are float. Shortcuts and the last pooling
read rounded tensors too, as in released code (`zsq_all_rectified`), or floats (`zsq_all_low`).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import training
from common import Column, Row
from reconstruction_reference import network_of

IMAGE_SIZE, RANGED = 32, 192
RECTIFIED = "zsq_all_rectified"
MADE, MADE_IN = 1024, 100
"""Images that both learn from, where none are given, and the steps that make them."""
TABLES = {
    "training_reference": (
        Column("method", "method"),
        Column("scheme", "scheme"),
        Column("layers", "layers preset"),
        Column("rounds", "rounds", ",d"),
        Column("warmup", "generator alone", ",d"),
        Column("batch", "batch"),
        Column("seed", "seed"),
        Column("float_top1", "FP32 top-1 %", ".2fx100"),
        Column("torch_start", "PyTorch before", ".2fx100"),
        Column("top1", "top-1 %", ".2fx100"),
        Column("torch_top1", "PyTorch", ".2fx100"),
        Column("step_ms", "ms a step", ".0f"),
        Column("torch_ms", "PyTorch", ".0f"),
        Column("ratio", "PyTorch/this", ".2f"),
        Column("core_ms", "core ms a step", ".0f"),
        Column("torch_core_ms", "PyTorch", ".0f"),
        Column("core_ratio", "PyTorch/this", ".2f"),
    )
}


class Compared(NamedTuple):
    """A method on both sides.

    Attributes:
      ours: name of our factory among `dfq.methods`.
      loop: name of the loop of `training_torch`.
      batch: images of a step as published.
      epochs: of the paper, and those after which the student's rate falls; none for quarters.
    """

    ours: str
    loop: str
    batch: int
    epochs: tuple[int, ...] = (147, 16, 36, 56)

    def drops(self, steps: int, warmup: int) -> tuple[int, ...]:
        """Steps of the student after which its rate falls to a tenth."""
        if not self.epochs:
            rounds = steps + warmup
            return tuple(rounds * k // 4 - warmup for k in (1, 2, 3))
        last, *falls = self.epochs
        return tuple(max(round(steps * at / last), 1) for at in falls)


METHODS = {
    "plain": Compared("intraq_qat", "plain", 256),
    "hast": Compared("hast", "hast", 256),
    "gdfq": Compared("gdfq", "gdfq", 200, epochs=()),
}


def main() -> None:
    """A row for every method and seed."""
    parser = common.parser(__doc__)
    parser.add_argument("--methods", type=common.choices(METHODS), default=("plain",))
    parser.add_argument("--scheme", default="w3a3", help="bits of all layers")
    parser.add_argument("--layers", default="zsq_all_low", choices=("zsq_all_low", RECTIFIED))
    parser.add_argument("--steps", type=int, default=60, help="of the student")
    parser.add_argument("--warmup", type=int, default=20, help="rounds of the generator alone")
    parser.add_argument("--batch", type=int, help="images of a step, instead of the published")
    parser.add_argument("--images", type=Path, help="of `dfq synthesize`, instead of making them")
    parser.add_argument("--seeds", type=common.names, default=("0",), metavar="0,1")
    parser.add_argument("--no-accuracy", action="store_true", help="times alone")
    parser.set_defaults(choose=False, limit=None)
    args = parser.parse_args()
    reason = common.absent(args.shared, training.CHECKPOINT, training.TEST)
    rows = [] if reason else rows_of(args)
    common.finish(args, TABLES, rows, reason)


def rows_of(args: argparse.Namespace) -> list[Row]:
    """All rows."""
    import dfq_jax

    model = dfq_jax.load(args.shared / training.CHECKPOINT, arch=training.ARCH)
    how: Any = {"n": MADE, "steps": MADE_IN, "seed": 0}
    args.images = args.images or dfq_jax.synthesize(model, "best_unlabelled", **how)
    rows: list[Row] = []
    for name in args.methods:
        for seed in map(int, args.seeds):
            rows.append(row_of(model, name, seed, args))
            common.logged(rows[-1], TABLES["training_reference"])
    return rows


def row_of(model: Any, name: str, seed: int, args: argparse.Namespace) -> Row:
    """Both trainings side by side."""
    import torch

    how = METHODS[name]
    generates = not how.epochs
    row: Row = {"table": "training_reference", "method": name, "scheme": args.scheme, "seed": seed}
    row["layers"] = args.layers
    row |= {"batch": args.batch or how.batch, "warmup": args.warmup if generates else None}
    row["rounds"] = args.steps + (args.warmup if generates else 0)
    torch.manual_seed(seed)
    judge = lambda student: None if args.no_accuracy else accuracy(student, model, args)
    teacher, student, take = loop_of(model, row, args)
    row |= {"float_top1": judge(teacher), "torch_start": judge(student)}
    turns = Turns(take)
    result = trained_beside(model, row, args, turns)
    row |= turns.medians()
    row["torch_top1"] = judge(student)
    row["top1"] = None if args.no_accuracy else training.accuracy_of(result, args)
    return row


def loop_of(model: Any, row: Row, args: argparse.Namespace) -> tuple[Any, Any, Callable[[], None]]:
    """PyTorch's teacher and student, and a step of its loop."""
    import torch
    import training_torch

    from dfq_jax.api.given import image_set

    how, warmup = METHODS[row["method"]], row["warmup"] or 0
    seen, _ = halves(image_set(args.images, model.contract, common.log))
    images = torch.from_numpy(seen).permute(0, 3, 1, 2).contiguous()
    network = network_of(args.shared / training.CHECKPOINT)
    bits = int(args.scheme[1]), int(args.scheme[3])
    teacher = training_torch.Student(network)
    student = training_torch.Student(network, bits, whole=args.layers == RECTIFIED)
    student.calibrate(teacher, images[:RANGED])
    drops = how.drops(args.steps, warmup)
    setting = training_torch.Setting(row["batch"], row["rounds"], warmup, drops)
    return teacher, student, getattr(training_torch, how.loop)(teacher, student, images, setting)


def halves(images: Any) -> tuple[Any, Any]:
    """Images to learn from and images that judge, as `dfq.train` takes them apart."""
    import numpy as np

    from dfq_jax.api.training_job import apart

    seen, held_out = apart(images)
    return np.array(seen.images), np.array(held_out.images)


class Clock(NamedTuple):
    """Seconds that have passed, and seconds that this process has spent on all cores."""

    wall: float
    cores: float


def now_at() -> Clock:
    """What the clocks say."""
    return Clock(time.perf_counter(), time.process_time())


class Turns:
    """Steps of PyTorch between chunks of the library's, and how long both take.

    Args:
      take: a step of PyTorch.
    """

    def __init__(self, take: Callable[[], None]) -> None:
        self.take, self.done, self.ended = take, 0, now_at()
        self.spent: list[dict[str, float]] = []

    def __call__(self, now: Any) -> None:
        """As many steps of PyTorch as the library has taken since the last turn."""
        if now.what != "training":
            return
        began, steps = now_at(), now.step - self.done
        for _ in range(steps):
            self.take()
        after = now_at()
        if self.done:
            ours, torch = per_step(self.ended, began, steps), per_step(began, after, steps)
            told = {"step_ms": ours.wall, "core_ms": ours.cores}
            self.spent.append(told | {"torch_ms": torch.wall, "torch_core_ms": torch.cores})
        told = ", ".join(f"{k} {v:.0f}" for k, v in (self.spent or [{}])[-1].items())
        common.log(f"step {now.step} of {now.steps} {told}")
        self.done, self.ended = now.step, after

    def medians(self) -> Row:
        """Milliseconds a step of both, by the clock and on all cores, and PyTorch's share."""
        if not self.spent:
            return {}
        found: Row = {k: statistics.median(turn[k] for turn in self.spent) for k in self.spent[0]}
        found["ratio"] = found["torch_ms"] / found["step_ms"]
        return found | {"core_ratio": found["torch_core_ms"] / found["core_ms"]}


def per_step(began: Clock, ended: Clock, steps: int) -> Clock:
    """Milliseconds of each of some steps."""
    return Clock(*(1000 * (b - a) / steps for a, b in zip(began, ended, strict=True)))


def trained_beside(model: Any, row: Row, args: argparse.Namespace, turns: Turns) -> Any:
    """Our training, which lets PyTorch have a turn after each chunk."""
    import dfq_jax
    from dfq_jax import methods
    from dfq_jax.optim.progress import Watcher

    told = {"steps": args.steps, "batch": row["batch"]}
    told |= {"warmup": row["warmup"]} if row["warmup"] is not None else {}
    method = getattr(methods, METHODS[row["method"]].ours)(**told)
    names: Any = {"scheme": args.scheme, "layers": args.layers, "seed": row["seed"]}
    watch = Watcher(stage=common.log, progress=turns)
    return dfq_jax.train(model, args.images, method, watch=watch, **names)


def accuracy(student: Any, model: Any, args: argparse.Namespace) -> float:
    """Share of the test images that PyTorch's network gets right."""
    import numpy as np
    import torch
    from torch_reference import pictures

    found = list(pictures(args.shared / training.TEST, IMAGE_SIZE))
    mean, std = (np.asarray(v, np.float32) for v in (model.contract.mean, model.contract.std))
    right = 0
    for first in range(0, len(found), 250):
        pixels, labels = zip(*found[first : first + 250], strict=True)
        natural = (np.stack(pixels).astype(np.float32) / 255 - mean) / std
        with torch.no_grad():
            said = student(torch.from_numpy(natural).permute(0, 3, 1, 2)).logits.argmax(1)
        right += int((said.numpy() == np.asarray(labels)).sum())
    return right / len(found)


if __name__ == "__main__":
    main()
