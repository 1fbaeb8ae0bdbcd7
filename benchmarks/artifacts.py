"""Networks the benchmarks quantize, and `dfq` run as a user runs it: each time a new process."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import common

FOLDER = common.BUILD / "artifacts"
COLLAPSED = 4
SCHEMES = ("w8a8", "w4a8", "w4a4")
PRESETS = ("fast", "balanced", "best")
LAYERS = ("qdrop_8bit_ends", "brecq_8bit_ends_second", "zsq_all_low")


class Network(NamedTuple):
    """A trained network and its images; paths are relative to the data folder.

    Attributes:
      model: a checkpoint, or the name of a built-in network with installed weights.
      arch: of a checkpoint.
      data: labelled images to judge by.
      real: images to calibrate other quantizers with.
    """

    model: str
    arch: str | None
    data: str
    real: str

    def arguments(self, shared: Path) -> list[str]:
        """How `dfq` is told about it."""
        if self.arch is None:
            return [self.model]
        return [str(shared / self.model), "--arch", self.arch]

    def absent(self, shared: Path) -> str | None:
        """What the data folder lacks of it."""
        return common.absent(shared, self.data, *([self.model] if self.arch else []))


IMAGENET = "data/imagenet-sample"
CIFAR_TEST, CIFAR_TRAIN = "data/cifar10-jpeg-test.zip", "data/cifar10-jpeg-train.zip"
NETWORKS = {
    "efficientnet_lite0": Network("efficientnet_lite0", None, IMAGENET, IMAGENET),
    "mobilenet_v2": Network("mobilenet_v2", None, IMAGENET, IMAGENET),
    "resnet20": Network(
        "checkpoints/resnet20-cifar10-jpeg.pth", "resnet20_cifar", CIFAR_TEST, CIFAR_TRAIN
    ),
}


class Ran(NamedTuple):
    """How a run of `dfq` ended.

    Attributes:
      code: its exit status.
      data: its JSON object; None if it printed none.
      seconds: from start to end.
      peak_mib: most memory it ever had resident.
      message: its last line on stderr.
    """

    code: int
    data: Any
    seconds: float
    peak_mib: float
    message: str

    @property
    def failure(self) -> str | None:
        """Why there is no result; None if there is one, collapsed networks included."""
        return None if self.data is not None else f"dfq exited {self.code}: {self.message}"


def dfq(*arguments: object) -> Ran:
    """Runs `dfq ARGUMENTS --json` and measures it."""
    line = [sys.executable, "-m", "dfq_jax.cli.app", *map(str, arguments), "--json"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(line, stdout=out, stderr=err, cwd=common.ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        text, log = out.read().decode(), err.read().decode().strip()
    unit = 2**20 if sys.platform == "darwin" else 2**10
    data = json.loads(text) if text.strip() else None
    message = log.splitlines()[-1] if log else ""
    return Ran(process.returncode, data, seconds, usage.ru_maxrss / unit, message)


class Run(NamedTuple):
    """One quantization."""

    network: str
    scheme: str
    layers: str
    preset: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where its result is kept."""
        return FOLDER / "-".join(map(str, self))

    def quantize(self, shared: Path) -> Ran:
        """Makes its result anew."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        common.log(f"dfq quantize {' '.join(map(str, self))}")
        return dfq(
            "quantize",
            *NETWORKS[self.network].arguments(shared),
            *("-o", self.folder, "--scheme", self.scheme, "--layers", self.layers),
            *("--preset", self.preset, "--seed", self.seed),
        )

    def ensure(self, shared: Path) -> str | None:
        """Makes its result unless there is one younger than the code; a message if that fails."""
        manifest = self.folder / "manifest.json"
        code = max(p.stat().st_mtime for p in (common.ROOT / "dfq_jax").rglob("*.py"))
        if manifest.exists() and manifest.stat().st_mtime > code:
            return None
        return self.quantize(shared).failure


def add_arguments(parser: argparse.ArgumentParser, presets: str, seeds: str) -> None:
    """The options that choose runs."""
    of = common.choices
    parser.add_argument("--networks", type=of(NETWORKS), default=tuple(NETWORKS), metavar="A,B")
    parser.add_argument(
        "--schemes",
        type=common.names,
        metavar="A,B",
        help=f"default: {','.join(SCHEMES)}; of networks of large images only w8a8",
    )
    parser.add_argument("--layers", type=of(LAYERS), default=LAYERS[:1], metavar="A,B")
    parser.add_argument(
        "--presets",
        type=of(PRESETS),
        metavar="A,B",
        help=f"default: {presets}; of networks of large images only fast",
    )
    parser.add_argument("--seeds", default=seeds, metavar="0,1", help=f"default: {seeds}")
    parser.set_defaults(usual_presets=common.names(presets))


def chosen(args: argparse.Namespace) -> list[Run]:
    """The runs the options ask for, by default fewer of the slow networks."""
    runs = []
    for network in args.networks:
        small = NETWORKS[network].data != IMAGENET
        schemes = args.schemes or (SCHEMES if small else SCHEMES[:1])
        presets = args.presets or (args.usual_presets if small else PRESETS[:1])
        runs += [
            Run(network, scheme, layers, preset, int(seed))
            for scheme in schemes
            for layers in args.layers
            for preset in presets
            for seed in (common.names(args.seeds) if small else common.names(args.seeds)[:1])
        ]
    return runs


def available(args: argparse.Namespace, runs: list[Run]) -> tuple[list[Run], str | None]:
    """The runs whose data are there, and what is missing for the others."""
    there, reason = present(args.shared, {run.network for run in runs})
    return [run for run in runs if run.network in there], reason


def present(shared: Path, networks: Iterable[str]) -> tuple[list[str], str | None]:
    """The networks whose data are there, in order, and what is missing for the others."""
    missing = {network: NETWORKS[network].absent(shared) for network in networks}
    reasons = sorted({reason for reason in missing.values() if reason})
    return [n for n, reason in missing.items() if reason is None], "; ".join(reasons) or None
