"""What `quantize` returns: the network, how far to trust it, and how to keep it."""

import dataclasses
import datetime
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from dfq_jax.base.npz import read_npz
from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.io.artifacts.artifact import save_artifact
from dfq_jax.io.onnx.export import float_onnx, quantized_onnx, serialize
from dfq_jax.io.runtime.latency import Latency, bench
from dfq_jax.io.verification.verify import Verification
from dfq_jax.io.verification.verify import verify as compare_runtimes
from dfq_jax.pruning.prune import Pruned
from dfq_jax.pruning.sparse import Zeros
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.recipes.mixed import Mixed
from dfq_jax.recipes.probes import base_pixels
from dfq_jax.report.analyze import Report
from dfq_jax.report.histograms import codes_of, histograms_png
from dfq_jax.report.html import report_html
from dfq_jax.report.plots import front_png
from dfq_jax.report.shapes import lost_lines
from dfq_jax.report.summary import in_short, summary, worst_layers
from dfq_jax.synthesis.sources.pixels import from_pixels, to_pixels
from dfq_jax.types import InputContract, finite_data

PROBE = "probe.npz"
MOST_PROBES = 16
TIMED = 1.0
"""Seconds to time both networks for."""
MOST_OUTSIDE = 0.8
"""Share of the values of images that may be out of range: of optimised ones up to a half are."""


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
        images = probe_images(self.probe_bytes, self.contract)
        return compare_runtimes(self.quantized, file, images, task=self.report.task)

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
        """The input contract of the network."""
        return self.float_model.contract

    @property
    def probe_bytes(self) -> bytes:
        """Up to 16 images as 8-bit pixels in an `.npz`, kept to verify the network again.

        Under `base` those that the probes of the estimate are made of again (`probes_from`).
        """
        buffer = io.BytesIO()
        pixels = to_pixels(self.probes.images[:MOST_PROBES], self.contract)
        arrays = {"pixels": pixels}
        if self.judges is not None and len(base := base_pixels(self.judges)) < len(self.judges):
            arrays["base"] = base
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @property
    def histograms(self) -> bytes:
        """A PNG of the codes of the worst layers' kernels; empty where none is quantized."""
        found = codes_of(self.quantized, [x.name for _, x in worst_layers(self.report)])
        return histograms_png(found) if found else b""

    @property
    def lost(self) -> dict[str, Any]:
        """What the network lost before it was quantized, as plain data; empty if nothing."""
        found = {"pruning": self.pruned, "sparsity": self.zeros}
        return {name: told.to_dict() for name, told in found.items() if told is not None}

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
        files = {PROBE: self.probe_bytes, **(files or {})}
        pictures = {"histograms": self.histograms}
        if self.mixed is not None:
            front = front_png(self.mixed.front, self.mixed.chosen, self.mixed.uniform)
            files["front.png"] = pictures["front"] = front
            report["mixed"] = plain(self.mixed)
        found = None if verification is None else verification.to_dict()
        told = (self.report, self.images, self.settings, found)
        shown = {"pictures": pictures, "pruned": self.pruned, "zeros": self.zeros}
        page = lambda sizes: report_html(*told, about=about(source or {}, sizes), **shown)
        return save_artifact(
            folder,
            self.quantized,
            float_model=self.float_model,
            images_provenance=self.images.provenance,
            report=finite_data(report) | later(found, unverified, latency),
            preset=str(self.settings["preset"]),
            seed=int(self.settings["seed"]),
            source=source,
            files=files,
            pages={"report.html": page},
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


def probe_images(data: bytes, contract: InputContract) -> Float[Array, "n h w c"]:
    """Network input from the bytes of a probe file.

    Raises:
      ValueError: if it holds other than pixels of such images, or one of `NOT_AN_NPZ`.
    """
    pixels = read_npz(data, ("pixels",))["pixels"]
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != 4
        or not len(pixels)
        or pixels.shape[1:] != contract.shape
    ):
        raise ValueError(f"found {pixels.dtype} {pixels.shape}, expected uint8 {contract.shape}")
    return from_pixels(pixels, contract)


def deliverable(images: Examples, contract: InputContract) -> Examples:
    """The images as a camera could deliver them: 8-bit pixels, values outside clipped.

    Raises:
      UsageError: if they were made for another input contract.
    """
    check_contract(images, contract)
    pixels = to_pixels(images.images, contract)
    return dataclasses.replace(images, arrays=(from_pixels(pixels, contract),))


def split_probes(images: Examples) -> tuple[Examples, Examples]:
    """Three quarters to calibrate with, one to judge by; fewer than 4 images do both."""
    return images.split(len(images) // 4) if len(images) >= 4 else (images, images)


def check_contract(images: Examples, contract: InputContract) -> None:
    """Refuses images made for another input, and values that are no normalised pixels.

    Raises:
      UsageError: naming the first field that differs, or how many values are out of range.
    """
    for field in ("height", "width", "mean", "std"):
        given, wanted = getattr(images.contract, field), getattr(contract, field)
        if given != wanted:
            raise UsageError(
                f"the images were made for {field} {given}, the network reads {wanted}; "
                "synthesize them from this network."
            )
    if images.images.shape[1:] != contract.shape:
        raise UsageError(
            f"the images have shape {tuple(images.images.shape[1:])}, the network reads "
            f"{contract.shape} (height, width, channels)."
        )
    values, (low, high) = np.asarray(images.images), contract.value_range
    outside = 1 - np.mean((values >= low) & (values <= high))
    if outside > MOST_OUTSIDE:
        raise UsageError(
            f"{100 * outside:.0f} % of the images' values lie outside [{low:.3g}, {high:.3g}], so "
            f"they are no pixels normalised for this network: (pixel/255 - {contract.mean}) / "
            f"{contract.std}."
        )
