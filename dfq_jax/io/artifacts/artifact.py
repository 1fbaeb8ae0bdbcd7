"""The output folder: an integer network with everything needed to run, check and reproduce it."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from dfq_jax.base.files import sha256_of
from dfq_jax.errors import DataError, ExportError
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.query import output_shapes
from dfq_jax.graph.tasks import Task, task_from_json
from dfq_jax.io.artifacts.deployment import CHANNELS, run_py
from dfq_jax.io.artifacts.graph_json import (
    graph_from_json,
    graph_to_json,
    inputs_from_json,
    inputs_to_json,
    names_from_json,
    names_to_json,
    plan_from_json,
    plan_to_json,
)
from dfq_jax.io.artifacts.output_folder import (
    FAILED,
    FLOAT,
    FORMAT,
    MANIFEST,
    MODEL,
    RUN,
    SCHEMA_VERSION,
    TENSORS,
    check_output_folder,
    is_plain,
    read_manifest,
    replace_all,
    settle,
)
from dfq_jax.io.artifacts.quantized_tensors import pack_network, unpack_network
from dfq_jax.io.onnx.export import float_onnx, quantized_onnx, serialize
from dfq_jax.quantization.plan import Plan
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.types import InputContract

PACKAGES = ("dfq-jax", "jax", "numpy", "onnx")

NOTHING: Mapping[str, Any] = MappingProxyType({})

__all__ = [
    "Artifact",
    "Enclosed",
    "Origin",
    "check_output_folder",
    "load_artifact",
    "save_artifact",
]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A loaded output folder.

    Attributes:
      quantized: the network; its kernels are the dequantized codes.
      manifest: the content of manifest.json.
      folder: where it lies.
    """

    quantized: QuantizedModel
    manifest: dict[str, Any]
    folder: Path

    @property
    def failed(self) -> bool:
        """Whether the network was saved although it must not be called a success."""
        return self.manifest["status"] == "failed"

    @property
    def onnx_path(self) -> Path:
        """The integer network for ONNX Runtime."""
        return self.folder / (FAILED if self.failed else MODEL)

    @property
    def float_path(self) -> Path:
        """The float network for ONNX Runtime."""
        return self.folder / FLOAT

    @property
    def task(self) -> Task | None:
        """What the network is for, None in a folder that does not say.

        Raises:
          DataError: if the manifest says something that is no task.
        """
        report = self.manifest.get("report")
        told = report.get("task") if isinstance(report, dict) else None
        return None if told is None else task_from_json(told)


Page = Callable[[Mapping[str, int]], bytes]
"""{file: bytes} -> what a page says of them."""


class Origin(NamedTuple):
    """What a manifest tells of how a network was made, as plain data.

    Attributes:
      images: where the calibration images came from.
      report: how far the network can be trusted.
      preset: name of the settings used.
      seed: of everything random.
      source: of the weights: file name and SHA-256.
    """

    images: Mapping[str, Any] = NOTHING
    report: Mapping[str, Any] = NOTHING
    preset: str | None = None
    seed: int | None = None
    source: Mapping[str, Any] = NOTHING


class Enclosed(NamedTuple):
    """Files that lie in an output folder beside the network, by name.

    Attributes:
      files: as they are.
      pages: files that say how large the others are, e.g. the report as HTML.
    """

    files: Mapping[str, bytes] = NOTHING
    pages: Mapping[str, Page] = NOTHING


UNKNOWN, NONE_ENCLOSED = Origin(), Enclosed()


def save_artifact(
    folder: str | Path,
    quantized: QuantizedModel,
    *,
    float_model: Model,
    origin: Origin = UNKNOWN,
    enclosed: Enclosed = NONE_ENCLOSED,
    force: bool = False,
    failed: bool = False,
) -> dict[str, Any]:
    """Writes a quantized network and all that belongs to it.

    Args:
      folder: absent, empty, or holding an artifact, which is replaced.
      quantized: the network.
      float_model: what it came from, for comparison.
      origin: how it was made.
      enclosed: further files.
      force: also write into a folder that holds other files; they stay.
      failed: save the network under a name that says it is no success.

    Returns:
      The manifest.

    Raises:
      UsageError: if the folder must not be written to.
      ResourceError: if the disk is full; what was there before is intact.
      ExportError: if ONNX cannot express the network.
    """
    folder, (files, pages) = Path(folder), enclosed
    check_output_folder(folder, force, names=(*files, *pages))
    facts = metadata_of(float_model)
    content = {**networks(quantized, float_model, facts, failed=failed), **files}
    content |= written(pages, content)
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "status": "failed" if failed else "ok",
        "preset": origin.preset,
        "seed": origin.seed,
        "source": dict(origin.source),
        "weights_sha256": facts["dfq.weights_sha256"],
        "versions": versions(),
        "images": dict(origin.images),
        "report": dict(origin.report),
        **structure(quantized),
        "files": {name: described(data) for name, data in content.items()},
    }
    replace_all(folder, {**content, MANIFEST: as_json(manifest)})
    return manifest


def metadata_of(float_model: Model) -> dict[str, str]:
    """What every file says of itself."""
    digest = weights_sha256(float_model)
    return {"dfq.version": versions()["dfq-jax"], "dfq.weights_sha256": digest}


def networks(
    quantized: QuantizedModel, float_model: Model, facts: Mapping[str, str], *, failed: bool
) -> dict[str, bytes]:
    """{file: content} of the integer network, its tensors, the float one, and how to run it."""
    name = FAILED if failed else MODEL
    content = {
        name: serialize(quantized_onnx(quantized, metadata=facts)),
        TENSORS: pack_network(quantized),
    }
    content |= {FLOAT: serialize(float_onnx(float_model, metadata=facts))}
    read = float_model.input
    pictures = isinstance(read, InputContract) and read.channels in CHANNELS and read.axes == 4
    return content | ({RUN: run_py(name)} if pictures else {})


def written(pages: Mapping[str, Page], content: Mapping[str, bytes]) -> dict[str, bytes]:
    """{file: content} of pages that say how large other files are."""
    sizes = {name: len(data) for name, data in content.items()}
    return {name: page(sizes) for name, page in pages.items()}


def structure(quantized: QuantizedModel) -> dict[str, Any]:
    """The part of a manifest from which, with the tensors, the network is rebuilt."""
    return {
        "scheme": str(quantized.plan.scheme),
        "layers": quantized.plan.layers,
        **inputs_to_json(quantized.model.inputs),
        "names": names_to_json(quantized.model.names),
        "graph": graph_to_json(quantized.model.graph),
        "plan": plan_to_json(quantized.plan),
    }


def as_json(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as a file.

    Raises:
      ExportError: if provenance or report hold anything but plain data.
    """
    try:
        return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ExportError(f"the manifest takes plain, finite JSON data only: {error}") from error


def described(data: bytes) -> dict[str, Any]:
    """Size and hash of a file's content."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def versions() -> dict[str, str]:
    """{package: version} of what took part, `python` included."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def weights_sha256(model: Model) -> str:
    """SHA-256 over names, shapes and values of all parameters."""
    digest = hashlib.sha256()
    for name in sorted(model.params):
        for slot in sorted(model.params[name]):
            array = np.asarray(model.params[name][slot], "<f4")
            digest.update(f"{name}\0{slot}\0{array.shape}\0".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def load_artifact(folder: str | Path) -> Artifact:
    """Reads an output folder and checks every file in it.

    Raises:
      DataError: naming the file that is missing, damaged or from another version.
    """
    folder = Path(folder)
    settle(folder)
    manifest = read_manifest(folder)
    failed = manifest["status"] == "failed"
    needed = (TENSORS, FLOAT, FAILED if failed else MODEL)
    if missing := [name for name in needed if name not in manifest["files"]]:
        raise DataError(
            f"{folder / MANIFEST} has no hash of {', '.join(missing)}, so nobody can tell whether "
            "that is what was saved. Quantize again."
        )
    for name, expected in manifest["files"].items():
        check_file(folder, name, expected)
    inputs = inputs_from_json(manifest)
    graph, plan = graph_from_json(manifest["graph"]), plan_from_json(manifest["plan"])
    check_sites(graph, plan, folder / MANIFEST)
    data = (folder / TENSORS).read_bytes()
    params, qparams = unpack_network(data, graph, plan, folder / TENSORS)
    names = names_from_json(manifest.get("names", {}))
    model = Model(graph, params, inputs, names=names)
    check_runs(model, folder)
    return Artifact(QuantizedModel(model, plan, qparams), manifest, folder)


def check_sites(graph: Graph, plan: Plan, path: Path) -> None:
    """Refuses a plan that is not of this graph.

    Raises:
      DataError: naming the site.
    """
    edges = {node.name: len(node.inputs) for node in graph.nodes}
    grouped = [site for _, sites in plan.groups for site in sites]
    for site in (*plan.table, *grouped):
        argument = site.argument
        known = site.node in edges and (argument is None or argument < edges[site.node])
        if not known or site not in plan.table:
            raise DataError(
                f"{path} is damaged: it quantizes {site.path}, which the network has "
                "not. Quantize again."
            )


def check_runs(model: Model, folder: Path) -> None:
    """Refuses parameters that do not fit their layers, without computing anything.

    Raises:
      DataError: naming the layer.
    """
    try:
        output_shapes(model)
    except Exception as error:
        raise DataError(
            f"{folder} is damaged: {MANIFEST} and {TENSORS} make no network ({error}). "
            "Quantize again."
        ) from error


def check_file(folder: Path, name: str, expected: Any) -> None:
    """Raises DataError unless the file has the size and hash the manifest gives."""
    if not is_plain(name) or not isinstance(expected, dict):
        raise DataError(f"{folder / MANIFEST} lists {name!r}, which is no plain file.")
    path = folder / name
    try:
        size = path.stat().st_size
        damaged = (
            not path.is_file()
            or size != expected.get("bytes")
            or sha256_of(path) != expected.get("sha256")
        )
    except OSError as error:
        raise DataError(f"artifact file {path} is missing or unreadable: {error}") from error
    if damaged:
        raise DataError(
            f"artifact file {path} is not what was saved: {size} bytes, expected "
            f"{expected.get('bytes')}, or another content. Quantize again."
        )
