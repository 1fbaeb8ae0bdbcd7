"""What `quantize` returns: the network, how far to trust it, and how to keep it."""

import dataclasses
import datetime
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dfq_jax.api.delivered import probe_array, probes_in_bytes
from dfq_jax.base.finite import finite_data
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.io.artifacts.artifact import Enclosed, Origin, save_artifact
from dfq_jax.io.artifacts.vertical_file import VERTICAL, pack_vertical
from dfq_jax.io.onnx.export import float_onnx, quantized_onnx, serialize
from dfq_jax.io.runtime.latency import Latency, bench
from dfq_jax.io.verification.verify import Verification
from dfq_jax.io.verification.verify import verify as compare_runtimes
from dfq_jax.pruning.prune import Pruned
from dfq_jax.pruning.sparse import Zeros
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.vertical import VerticalNetwork
from dfq_jax.recipes.joint import JointAllocation
from dfq_jax.recipes.mixed import Mixed
from dfq_jax.report.analyze import Report
from dfq_jax.report.histograms import codes_of_layers, histograms_png
from dfq_jax.report.html import Making, report_html
from dfq_jax.report.plots import front_png
from dfq_jax.report.shapes import lost_lines
from dfq_jax.report.summary import in_short, summary, worst_layers
from dfq_jax.types import Input, InputContract

PROBE = "probe.npz"
ORIGINAL = "original_weights"
"""In manifests: the fingerprint of what was cut down."""
TIMED = 1.0
"""Seconds to time both networks for."""


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """A quantized network with its trust report; printed, what to know of it.

    Attributes:
      quantized: the network.
      float_model: what it came from.
      images: all images, synthesized or given.
      probes: the images that judged the result.
      report: how far to trust it.
      settings: the resolved configuration, plain data.
      mixed: how bits were chosen, if they were.
      judges: the probes that the expected loss was estimated from, if it was.
      pruned: how it got smaller before it was quantized, if it did; `float_model` is the smaller
        network then, and the report judges what is lost against the original.
      zeros: which weights were made zero before it was quantized, if some were; the original
        judges likewise.
      original: fingerprint of the weights of the network that it was cut down from, if it was.
      joint: how bits and channels were decided together, if they were.
      vertical: the network of all widths, if it has many; `quantized` is that of 8 bits.
    """

    quantized: QuantizedModel
    float_model: Model
    images: Examples
    probes: Examples
    report: Report
    settings: Mapping[str, Any]
    mixed: Mixed | None = None
    judges: Examples | None = None
    pruned: Pruned | None = None
    zeros: Zeros | None = None
    original: str = ""
    vertical: VerticalNetwork | None = None
    joint: JointAllocation | None = None

    def summary(self) -> str:
        """The verdict, what it rests on, and the worst layers, in a few lines of text."""
        told = summary(self.report, self.settings)
        return "\n".join([told, *lost_lines(self.pruned, self.zeros)])

    def __str__(self) -> str:
        """The summary."""
        return self.summary()

    def __repr__(self) -> str:
        """One line, without the arrays."""
        return f"<Result {in_short(self.report, self.settings)}>"

    def verify(self) -> Verification:
        """Compares simulator, integer function and ONNX Runtime on the probes."""
        file = serialize(quantized_onnx(self.quantized))
        probes = probe_array(self.probe_bytes, self.input)
        return compare_runtimes(self.quantized, file, probes, task=self.report.task)

    def time(self) -> Latency:
        """Times one image on one thread of ONNX Runtime here, in about a second.

        Raises:
          ImportError: if ONNX Runtime is not installed.
          DfqError: if it cannot run one of the files.
        """
        files = float_onnx(self.float_model), quantized_onnx(self.quantized)
        return bench(*map(serialize, files), threads=1, warmup=2, seconds=TIMED)

    @property
    def contract(self) -> InputContract:
        """The input contract of a network of images.

        Raises:
          UnsupportedModelError: for others; `input` says what those read.
        """
        return self.float_model.contract

    @property
    def input(self) -> Input:
        """What the network reads."""
        return self.float_model.input

    @property
    def probe_bytes(self) -> bytes:
        """What `delivered.probes_in_bytes` keeps of the probes."""
        return probes_in_bytes(self.probes, self.judges)

    @property
    def histograms(self) -> bytes:
        """A PNG of the codes of the worst layers' kernels; empty where none is quantized."""
        found = codes_of_layers(self.quantized, [x.name for _, x in worst_layers(self.report)])
        return histograms_png(found) if found else b""

    @property
    def front(self) -> bytes:
        """A PNG of loss against what bits take, or bits and channels; empty if none were chosen."""
        found = self.joint or self.mixed
        return front_png(found.front, found.chosen, found.uniform) if found else b""

    @property
    def allocated(self) -> dict[str, Any]:
        """How bits, or bits and channels, were chosen, as plain data; empty if they were not."""
        bits = {} if self.mixed is None else {"mixed": plain(self.mixed)}
        return bits if self.joint is None else bits | {"joint": plain_joint(self.joint)}

    @property
    def lost(self) -> dict[str, Any]:
        """What the network lost before it was quantized, as plain data; empty if nothing."""
        found = {"pruning": self.pruned, "sparsity": self.zeros}
        told = {name: each.to_dict() for name, each in found.items() if each is not None}
        return told | ({ORIGINAL: self.original} if self.original else {})

    def save(
        self,
        folder: str | Path,
        *,
        source: Mapping[str, Any] | None = None,
        verification: Verification | None = None,
        latency: Latency | None = None,
        unverified: str = "",
        failed: bool = False,
        files: Mapping[str, bytes] | None = None,
        force: bool = False,
    ) -> dict[str, Any]:
        """Writes the output folder; a network that failed as `model.failed.onnx`.

        It did if it collapsed, or if it does not compute what was simulated.

        Args:
          folder: absent, empty, or an earlier output of ours.
          source: where the weights came from, plain data.
          verification: what `verify` found, to be kept in the report.
          latency: what `time` measured, to be kept there as well.
          unverified: why there is no verification, to be kept there as well.
          failed: whether it must not be called a success for a reason of the caller's.
          files: further files, by name.
          force: also write beside files of others.

        Returns:
          The manifest.

        Raises:
          UsageError: if the folder must not be written to.
          ResourceError: if the disk is full.
        """
        report = {**self.report.to_dict(), "settings": dict(self.settings), **self.lost}
        report |= self.allocated
        files = {PROBE: self.probe_bytes, **(files or {})}
        pictures = {"histograms": self.histograms}
        if front := self.front:
            files["front.png"] = pictures["front"] = front
        if self.vertical is not None:
            files[VERTICAL] = pack_vertical(self.vertical)
        found = None if verification is None else verification.to_dict()
        making = Making(pictures, self.pruned, self.zeros, self.joint is not None)
        told = partial(report_html, self.report, self.images, self.settings, found, making=making)
        report = finite_data(report) | later(found, unverified, latency)
        preset, seed = str(self.settings["preset"]), int(self.settings["seed"])
        origin = Origin(self.images.provenance, report, preset, seed, source or {})
        page = lambda sizes: told(about=about(origin.source, sizes))
        return save_artifact(
            folder,
            self.quantized,
            float_model=self.float_model,
            origin=origin,
            enclosed=Enclosed(files, {"report.html": page}),
            force=force,
            failed=failed or not self.report.passed or fails(verification),
        )


def later(
    verification: Mapping[str, Any] | None, unverified: str, latency: Latency | None
) -> dict[str, Any]:
    """What was found out about the file once it was written, as plain data."""
    return {
        "verification": finite_data(verification),
        "unverified": unverified or None,
        "latency": None if latency is None else finite_data(latency.to_dict()),
    }


def about(source: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, object]:
    """What a report is of: the file that was quantized, when, and how large the results are."""
    names = {"name": "model", "architecture": "architecture", "sha256": "SHA-256 of the model"}
    facts: dict[str, object] = {name: source[key] for key, name in names.items() if source.get(key)}
    facts["date"] = datetime.date.today().isoformat()
    return facts | {
        f"bytes of {name}": f"{size:,}" for name, size in sizes.items() if name.endswith(".onnx")
    }


def fails(verification: Verification | None) -> bool:
    """Whether a file was verified and did not pass."""
    return verification is not None and not verification.passed


def plain(found: Mixed) -> dict[str, Any]:
    """How bits were chosen, as JSON data."""
    point = lambda p: {"cost": str(p.cost), "predicted_kl": p.loss, "bits": list(p.bits)}
    return {
        "choices": [{"name": c.name, "weight": c.weight} for c in found.space.choices],
        "chosen": point(found.chosen),
        "uniform": point(found.uniform),
        "front": [point(p) for p in found.front],
    }


def plain_joint(found: JointAllocation) -> dict[str, Any]:
    """How bits and channels were decided together, as JSON data."""
    point = lambda p: {
        "cost": str(p.cost),
        "predicted_kl": p.loss,
        "channels": list(p.counts),
        "bits": list(p.bits),
    }
    return {
        "groups": [{"name": name, "channels": count} for name, count in found.groups],
        "kernels": [choice.name for choice in found.space.choices],
        "chosen": point(found.chosen),
        "uniform": point(found.uniform),
        "front": [point(p) for p in found.front],
    }
