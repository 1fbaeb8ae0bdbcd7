"""The public functions: load, predict, quantize, evaluate, verify, bench, export."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Float, Shaped

from dfq_jax.api.delivered import probe_array
from dfq_jax.api.result import PROBE
from dfq_jax.base.files import npz_fault, write_atomically
from dfq_jax.data.accuracy import Accuracy
from dfq_jax.data.accuracy import measured_accuracy as measure
from dfq_jax.data.sources import open_source
from dfq_jax.errors import DataError, UsageError
from dfq_jax.graph.evaluate import evaluate as run_graph
from dfq_jax.graph.graph import Model
from dfq_jax.io.artifacts.artifact import Artifact, load_artifact
from dfq_jax.io.artifacts.images import NOT_AN_NPZ
from dfq_jax.io.artifacts.output_folder import MANIFEST
from dfq_jax.io.artifacts.vertical_file import unpack_vertical
from dfq_jax.io.frontends.contracts import ToldInput
from dfq_jax.io.frontends.graph_files import load_module
from dfq_jax.io.frontends.jax_live import is_torch
from dfq_jax.io.frontends.jax_networks import load_network
from dfq_jax.io.frontends.normalisation import with_normalisation
from dfq_jax.io.load import as_layout
from dfq_jax.io.load import load as load_file
from dfq_jax.io.onnx.export import float_onnx, quantized_onnx, serialize
from dfq_jax.io.runtime.latency import Latency
from dfq_jax.io.runtime.latency import bench as time_both
from dfq_jax.io.runtime.session import contract_of, predictor
from dfq_jax.io.verification.verify import Verification
from dfq_jax.io.verification.verify import verify as compare_runtimes
from dfq_jax.io.zoo.catalog import Size
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.vertical import narrowed
from dfq_jax.types import InputContract


def load(
    source: Any,
    params: Any = None,
    example: Any = None,
    *,
    arch: str | None = None,
    size: Size | None = None,
    layout: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    no_bn_fallback: bool = False,
    unchecked: bool = False,
    batch_norms: Mapping[str, str] | None = None,
) -> Model:
    """Reads a network; `dfq_jax.io.load.load` also returns notes and the identity of the file.

    A network of JAX is a `flax.linen` module with its variables, a `flax.nnx` module, a callable
    pytree, or any function of (params, images) that JAX can trace.

    Args:
      source: a network with its graph (`.pt2`, `.onnx`); a checkpoint (`.pth`, `.th`, `.pt`,
        `.safetensors`) with `arch`; the name of a built-in architecture whose weights an installed
        package carries; a live `torch.nn.Module` or `ExportedProgram` (extra `torch`); or a
        network of JAX.
      params: variables of a linen module, or what a function of JAX is given first.
      example: for a module or function: an input array, or the shape of one image as the module
        reads it: (3, 224, 224) for PyTorch, (224, 224, 3) for Flax.
      arch: name of the architecture of a checkpoint.
      size: pixels the network reads: of each side, or (height, width); None for the published or
        exported ones.
      layout: `nchw` or `nhwc`, where a file or module with its own graph has the channels of
        images; None to find it. Exported files keep it, the library has them last.
      mean: per channel (or one for all) of pixels in [0, 1]; together with `std`.
      std: what images are divided by, likewise.
      no_bn_fallback: accept an ONNX file whose batch norms were folded away.
      unchecked: do not run an ONNX file or a function of JAX beside what was imported from it,
        which is done once, on noise (a file only where ONNX Runtime is installed).
      batch_norms: what their parameters are called in a network of JAX that computes them in a way
        not known here: {"mean": "mu", "std": "sigma", "scale": "gamma", "bias": "beta"}, for `std`
        also `var` or `inv_std`; a path in which `*` stands for the module, as `state.*.mu`, too.

    Returns:
      The network, batch norms in place.

    Raises:
      DfqError: one of its children; see `dfq_jax.errors`.
      ImportError: for a module, if PyTorch is not installed.
    """
    if isinstance(source, str | Path):
        if params is not None:
            raise UsageError("a file holds its own weights; leave out params.")
        check_not_named(batch_norms)
        reading = partial(load_file, no_bn_fallback=no_bn_fallback, unchecked=unchecked)
        return reading(source, arch=arch, size=size, layout=layout, mean=mean, std=std).model
    if arch is not None or size is not None:
        raise UsageError("a module has its own graph and size; leave out arch and size.")
    told = ToldInput(layout=as_layout(layout))
    model = load_live(source, params, example, told, unchecked, batch_norms)
    return dataclasses.replace(model, inputs=(with_normalisation(model.contract, mean, std),))


def load_live(
    source: Any,
    params: Any,
    example: Any,
    told: ToldInput,
    unchecked: bool,
    batch_norms: Mapping[str, str] | None,
) -> Model:
    """Reads a network in memory, of PyTorch or JAX; see `load`."""
    if not is_torch(source):
        how = {"unchecked": unchecked, "batch_norms": batch_norms}
        return load_network(source, params, example, told, **how)[0]
    check_not_named(batch_norms)
    if params is not None:
        raise UsageError(
            "a PyTorch module holds its own weights; leave out params, and give the shape of an "
            "image by name: example=(3, 224, 224)."
        )
    return load_module(source, example, told)[0]


def check_not_named(batch_norms: Mapping[str, str] | None) -> None:
    """Refuses names of parameters where batch norms are operators of their own.

    Raises:
      UsageError: if there are any.
    """
    if batch_norms is not None:
        raise UsageError("names of batch norms are for networks of JAX; leave out batch_norms.")


@jax.jit
def predict(model: Model, images: Shaped[Array, "n ..."]) -> Float[Array, "n ..."]:
    """First output of a float network for images (NHWC, normalised by `model.contract`).

    Scores Float[n classes] of a classifier; images of scores are NHWC too.
    """
    return run_graph(model, images)[0][0]


def evaluate(
    model: Model | str | Path,
    data: str,
    *,
    limit: int | None = None,
    batch: int = 50,
    on_batch: Callable[[int, int, float], object] | None = None,
) -> Accuracy:
    """Accuracy on labelled images: a Model runs in JAX, a file or folder in ONNX Runtime.

    Args:
      model: a network, an output folder of `quantize`, or a `.onnx` file with our metadata.
      data: a folder of class folders, a zip of one, or `tfds:NAME[:SPLIT]`.
      limit: judge only so many images, evenly spaced.
      batch: images at a time.
      on_batch: told (done, total, top-1 so far).

    Returns:
      Top-1, top-5 and the number of images.

    Raises:
      DataError: for data or a folder that cannot be read.
    """
    if isinstance(model, Model):
        contract, run = model.contract, lambda x: predict(model, x)
    else:
        file = load_artifact(model).onnx_path if Path(model).is_dir() else Path(model)
        contract = stated_contract(file)
        run = predictor(file, layout=contract.layout)
    return measure(run, open_source(data), contract, batch=batch, limit=limit, on_batch=on_batch)


def stated_contract(file: Path) -> InputContract:
    """The input contract an ONNX file carries.

    Raises:
      DataError: if it carries none.
    """
    contract = contract_of(file)
    if contract is None:
        raise DataError(
            f"{file} does not say how its input is normalised (no dfq.contract metadata); "
            "evaluate the output folder of `dfq quantize` instead."
        )
    return contract


def verify(folder: str | Path) -> Verification:
    """Compares the network in an output folder with ONNX Runtime, on the probes kept there.

    Where that is missing, or too old for the file, with ONNX's reference evaluator.

    Args:
      folder: output folder of `quantize`.

    Returns:
      Differences by layer in quantization steps, and end to end.

    Raises:
      DataError: if the folder is damaged.
      UnsupportedModelError: if neither runs it.
    """
    artifact = load_artifact(folder)
    told = probes_of(artifact)
    return compare_runtimes(artifact.quantized, artifact.onnx_path, told, task=artifact.task)


def narrow(folder: str | Path, bits: int, path: str | Path) -> Verification:
    """Writes the ONNX file of one width of a network that has many.

    Args:
      folder: output folder of `train` by `vertical_layered`.
      bits: of the weights.
      path: the `.onnx` file; replaced atomically, and kept where it is found to differ.

    Returns:
      How it compares with the simulator, on the probes of the folder.

    Raises:
      UsageError: for a width or folder that has not so many, and a path of the folder's own files.
      DataError: if the folder is damaged.
    """
    artifact = load_artifact(folder)
    found, probes = narrowed(unpack_vertical(artifact), bits), probes_of(artifact)
    own = {artifact.folder / name for name in (*artifact.manifest["files"], MANIFEST)}
    if Path(path).resolve() in {file.resolve() for file in own}:
        raise UsageError(f"{path} is a file of the network of all widths: write to another one.")
    export(found, path)
    return compare_runtimes(found, Path(path), probes, task=artifact.task)


def probes_of(artifact: Artifact) -> Shaped[Array, "n ..."]:
    """The images that judged the network of an output folder, normalised.

    Raises:
      DataError: if the folder does not hold them.
    """
    path, read = artifact.folder / PROBE, artifact.quantized.model.input
    try:
        return probe_array(path.read_bytes(), read)
    except (*NOT_AN_NPZ, OSError) as error:
        raise DataError(
            f"{path} does not hold the images to verify with: {npz_fault(error)}"
        ) from error


def bench(folder: str | Path, *, runs: int = 50) -> Latency:
    """Float against integer latency of an output folder, batch 1, in ONNX Runtime here."""
    artifact: Artifact = load_artifact(folder)
    return time_both(artifact.float_path, artifact.onnx_path, runs=runs)


def export(model: Model | QuantizedModel, path: str | Path) -> None:
    """Writes a network as ONNX: float, or in QDQ form if it is quantized.

    Args:
      model: the network.
      path: the `.onnx` file; replaced atomically.

    Raises:
      ExportError: if ONNX cannot express it.
    """
    proto = float_onnx(model) if isinstance(model, Model) else quantized_onnx(model)
    write_atomically(path, serialize(proto))
