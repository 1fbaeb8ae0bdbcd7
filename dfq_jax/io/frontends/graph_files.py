"""Networks that bring their own graph: `.pt2` archives, ONNX files, live PyTorch modules."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dfq_jax.errors import CheckpointError, SeveralInputsError, UnsupportedModelError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.graph.query import output_shapes
from dfq_jax.io.frontends.contracts import (
    ImportedNetwork,
    ToldInput,
    imported,
    refuse_integers,
)
from dfq_jax.io.frontends.ends import without_choices
from dfq_jax.io.frontends.live import exported_program
from dfq_jax.io.frontends.lost_norms import folded_batch_norm_message
from dfq_jax.io.frontends.onnx_graph import read_onnx_program
from dfq_jax.io.frontends.program import Call, Program
from dfq_jax.io.frontends.pt2_graph import read_pt2
from dfq_jax.io.frontends.token_inputs import imported_tokens
from dfq_jax.io.frontends.volume_inputs import imported_volumes
from dfq_jax.io.importing.aten_table import ATEN
from dfq_jax.io.importing.engine import Imported, OperatorTable
from dfq_jax.io.importing.onnx_table import ONNX
from dfq_jax.io.importing.token_rows import reads_tokens
from dfq_jax.io.importing.volumes import reads_volumes
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.io.zoo.bind import check_finite
from dfq_jax.types import SourceNames

UNTOLD = ToldInput()
NOTHING_RECORDED = (
    "no batch-norm statistics: ranges will come from noise images; expect lower accuracy"
)


@dataclasses.dataclass(frozen=True)
class GraphFile:
    """A network read from a file that holds its graph.

    Attributes:
      model: the network.
      notes: one line for each thing the user should know.
      sha256: hash of the file.
      bytes: its size.
    """

    model: Model
    notes: tuple[str, ...]
    sha256: str
    bytes: int


def load_graph(path: Path, told: ToldInput = UNTOLD, *, no_bn_fallback: bool = False) -> GraphFile:
    """Reads a `.pt2` or ONNX file, recognised by content.

    Args:
      path: the file.
      told: what the user says of its images.
      no_bn_fallback: accept an ONNX file whose batch norms were folded away.

    Returns:
      The network.

    Raises:
      CheckpointError: if the file is damaged.
      UnsupportedModelError: if it holds what cannot be imported, lost its batch norms, or holds
        integers already.
      DataError: if its input contract is unusable.
      UsageError: for a layout that its input cannot have.
      UnsafeInputError: if it tries to exhaust the machine or to leave its folder.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{show(path.name)} cannot be read: {show(error)}.") from error
    where = show(path.name)
    if data.startswith(b"PK"):
        program, table, notes = without_choices(read_pt2(data, where)), ATEN, ()
        lost = None
    elif path.suffix.lower() == ".pt2":
        raise CheckpointError(
            f"{where} is no .pt2 archive: it starts with {show(data[:8])}. Save it with "
            "torch.export.save, or download it again."
        )
    else:
        program, table = prepared(read_onnx_program(data, where, path.parent)), ONNX
        refuse_integers(program, where)
        lost = folded_batch_norm_message(program, where)
        notes = () if lost is None else (NOTHING_RECORDED,)
        lost = None if no_bn_fallback else lost
    model, more = with_lost_statistics(lost, partial(model_of, program, table, where, told))
    model, digest = named(model, program), hashlib.sha256(data).hexdigest()
    return GraphFile(model, (*program.notes, *notes, *more), digest, len(data))


def load_module(
    module: Any, example: Any, told: ToldInput = UNTOLD
) -> tuple[Model, tuple[str, ...]]:
    """A live `torch.nn.Module` or `ExportedProgram` by the same path as its `.pt2` file.

    Args:
      module: the module, or what `torch.export.export` made of it.
      example: an input tensor, or the shape of one image such as (3, 224, 224).
      told: what the user says of its images.

    Returns:
      The network, and notes for the user.

    Raises:
      ImportError: if PyTorch is not installed.
      UnsupportedModelError: if it cannot be exported or imported.
    """
    where = type(module).__name__
    program = without_choices(exported_program(module, example, where=where))
    model, notes = model_of(program, ATEN, where, told)
    return named(model, program), (*program.notes, *notes)


def named(model: Model, program: Program) -> Model:
    """The network with the names that its source has for what it reads and returns."""
    names = SourceNames(program.inputs[0].name, program.outputs)
    return dataclasses.replace(model, names=names)


def model_of(
    program: Program, table: OperatorTable, where: str, told: ToldInput = UNTOLD
) -> tuple[Model, tuple[str, ...]]:
    """The network a program describes, its shapes checked, and notes on its statistics."""
    found: Imported | ImportedNetwork
    try:
        if reads_tokens(program):
            found = imported_tokens(program, table, told)
            read, notes = found.read, found.notes
        elif reads_volumes(program):
            found = imported_volumes(program, table, told)
            read, notes = found.read, found.notes
        else:
            found, read, notes = imported(program, table, where, told)
    except UnsupportedModelError as error:
        raise type(error)(f"{where}: {error}") from None
    check_weights(found, where)
    model = Model(found.graph, on_device(found.params), (read,))
    check_shapes(model, where)
    return model, (*notes, *statistics(model))


def on_device(params: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, jax.Array]]:
    """The parameters as JAX arrays; each NumPy array is let go before the next one moves."""
    moved: dict[str, dict[str, jax.Array]] = {}
    for name in list(params):
        slots = params.pop(name)
        moved[name] = {slot: jax.device_put(slots.pop(slot)) for slot in list(slots)}
    return moved


def check_shapes(model: Model, where: str) -> None:
    """Traces the network once.

    Raises:
      UnsupportedModelError: naming the node whose inputs do not fit it.
    """
    read = [jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in model.inputs]
    try:
        jax.eval_shape(lambda m, *xs: evaluate(m, *xs)[0], model, *read)
    except (TypeError, ValueError) as error:
        output_shapes(model)  # tells which node it is
        raise UnsupportedModelError(f"{where}: {show(error, 300)}") from error


def check_weights(imported: Imported | ImportedNetwork, where: str) -> None:
    """Refuses NaN and infinite weights, by name."""
    arrays = {f"{n}.{k}": v for n, slots in imported.params.items() for k, v in slots.items()}
    try:
        check_finite(arrays)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None


def statistics(model: Model) -> tuple[str, ...]:
    """A note on batch norms that never saw data."""
    fresh = [
        node.name
        for node in model.graph.nodes
        if isinstance(node.op, BatchNorm) and never_updated(model.params[node.name])
    ]
    if not fresh:
        return ()
    return (
        f"{len(fresh)} batch norms hold mean 0 and variance 1, as if never trained "
        f"(first: {show(fresh[0])}); they are of no use for making images",
    )


def never_updated(slots: Mapping[str, Any]) -> bool:
    """Whether statistics are those a new layer starts with."""
    return bool(np.all(np.asarray(slots["mean"]) == 0) and np.all(np.asarray(slots["var"]) == 1))


def with_lost_statistics(
    lost: str | None, importing: Callable[[], tuple[Model, tuple[str, ...]]]
) -> tuple[Model, tuple[str, ...]]:
    """What is imported, or refused with all that stands in the way.

    Args:
      lost: what to tell of batch norms that an exporter folded away; None if nothing.
      importing: makes the network.

    Raises:
      UnsupportedModelError: if the network cannot be imported, or its batch norms were lost.
    """
    try:
        made = importing()
    except SeveralInputsError:
        raise  # a better file of it would be refused, too
    except UnsupportedModelError as error:
        raise error if lost is None else type(error)(f"{error}\nBesides, {lost}") from None
    if lost is not None:
        raise UnsupportedModelError(lost)
    return made


def prepared(program: Program) -> Program:
    """An ONNX program with module paths from node names, and splits that know their outputs.

    Where it chooses the largest of its scores in the end, it returns the scores.
    """

    def better(call: Call) -> Call:
        kwargs = dict(call.kwargs)
        if call.target == "onnx.Split":
            kwargs["outputs"] = len(call.outputs)
        path, label = module_path(call.path), call.path
        return dataclasses.replace(call, path=path, label=label, kwargs=kwargs)

    found = without_choices(program)
    return dataclasses.replace(found, calls=tuple(map(better, found.calls)))


def module_path(name: str) -> str:
    """`layer1.0.relu` from the node name `/layer1/layer1.0/relu/Relu` of PyTorch's exporter."""
    if "/" not in name:
        return ""
    path: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        known = ".".join(path)
        path = [part] if known and part.startswith(f"{known}.") else [*path, part]
    return ".".join(path)
