"""ONNX models become a `Program`: nodes as calls, initialisers and constants as arrays."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError, EncodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from dfq_jax.errors import CheckpointError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.frontends.onnx_file import OnnxFile, type_name
from dfq_jax.io.frontends.program import Call, Program, ProgramInput, Ref
from dfq_jax.io.readers.pickle_policy import listing, show

OLDEST_OPSET = 9
DEFAULT = ("", "ai.onnx")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
WHOLE = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
"""Of ids and masks."""
MAX_INLINED = 16 << 20  # bytes of a model once its functions are written out, less tensors
MAX_NODES = 100_000  # of a model once its functions are written out
MAX_CALLS = 50  # of functions within functions
MAX_DIM = 1 << 24
MAX_PATH = 1000  # characters of a node's name worth keeping
MAX_NAME = 100  # characters of an axis's name worth keeping
AGAIN = "Export it again."
SUBGRAPH = "<graph>"
PARAMETER = re.compile(r"(?=.*[A-Za-z_])[\w-]+(\.[\w-]+)+")
BARE_PARAMETERS = frozenset(("weight", "bias", "running_mean", "running_var"))
CONSTANTS: dict[str, Any] = {  # attribute of a Constant node: element type
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}
DECODERS: dict[int, Callable[[AttributeProto, OnnxFile], Any]] = {
    AttributeProto.FLOAT: lambda a, _: a.f,
    AttributeProto.INT: lambda a, _: a.i,
    AttributeProto.STRING: lambda a, _: a.s.decode(),
    AttributeProto.TENSOR: lambda a, file: file.array(a.t),
    AttributeProto.GRAPH: lambda a, _: SUBGRAPH,
    AttributeProto.FLOATS: lambda a, _: tuple(a.floats),
    AttributeProto.INTS: lambda a, _: tuple(a.ints),
    AttributeProto.STRINGS: lambda a, _: tuple(s.decode() for s in a.strings),
    AttributeProto.TENSORS: lambda a, file: tuple(map(file.array, a.tensors)),
    AttributeProto.GRAPHS: lambda a, _: SUBGRAPH,
}


def read_onnx_program(data: bytes, where: str, folder: Path | None) -> Program:
    """Reads an ONNX file, opset 9 or newer. Nothing in it is executed.

    Args:
      data: the whole file.
      where: the file, for messages.
      folder: its folder, the only place external data may come from; None forbids it.

    Returns:
      The network. Targets are `onnx.Conv`, or `domain.Op` outside the default domain; keyword
      arguments are the attributes and `opset_version`; a subgraph is the string `<graph>`.

    Raises:
      CheckpointError: if the file is damaged or its graph contradicts itself.
      UnsupportedModelError: if it is well-formed, but of a kind that is not supported.
      UnsafeInputError: if it would exhaust the machine or leaves its folder.
      ResourceError: if external data does not fit into memory.
    """
    file = OnnxFile(data, where, folder)
    opsets = _opsets(file.model, where)
    model, notes = _without_functions(file.model, where)
    graph = model.graph
    if not graph.node:
        raise CheckpointError(f"{where} is no ONNX model of a network: it has no nodes. {AGAIN}")
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise UnsupportedModelError(
            f"{where} stores {show(name)} as a sparse initialiser, which is not supported; save "
            "it dense."
        )
    _check_names(graph, where)
    arrays = {t.name: file.array(t) for t in graph.initializer}
    inputs = tuple(_input(v, where) for v in graph.input if v.name not in arrays)
    if not inputs:
        raise UnsupportedModelError(f"{where} has no input; all its tensors are stored in it.")
    read = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    calls = []
    for node in graph.node:
        if node.domain in DEFAULT and node.op_type == "Constant":
            arrays[node.output[0]] = _constant(node, file)
        else:
            calls.append(_call(node, file, opsets, read))
    if model.training_info:
        notes = (*notes, f"{where}: training information is ignored")
    paths = {name: name for name in arrays if _is_path(name)}
    outputs = tuple(v.name for v in graph.output)
    facts = {p.key: p.value for p in file.model.metadata_props}
    return Program(
        inputs, arrays, paths, tuple(calls), outputs, notes, facts, producer=model.producer_name
    )


def _is_path(name: str) -> bool:
    return name in BARE_PARAMETERS or PARAMETER.fullmatch(name) is not None


def _opsets(model: ModelProto, where: str) -> dict[str, int]:
    """{domain: version}, the default domain under both of its names."""
    if not model.ir_version or not model.HasField("graph"):
        raise CheckpointError(f"{where} is no ONNX model: it has no version or graph. {AGAIN}")
    opsets: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain in DEFAULT else entry.domain
        if opsets.setdefault(domain, entry.version) != entry.version:
            raise CheckpointError(f"{where} imports two opsets of {show(domain)!r}. {AGAIN}")
    opset, newest = opsets.get("", 1), onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        raise UnsupportedModelError(
            f"{where} uses ONNX opset {opset}; {OLDEST_OPSET} to {newest} are supported. Export it "
            "again with opset_version=17, or convert it: onnx.version_converter.convert_version("
            "model, 17)."
        )
    if opset > newest:
        raise UnsupportedModelError(
            f"{where} uses ONNX opset {opset}; {OLDEST_OPSET} to {newest} are supported. Export it "
            "again with opset_version=17, or get a newer onnx: pip install --upgrade onnx."
        )
    return opsets | dict.fromkeys(DEFAULT, opset)


def _without_functions(model: ModelProto, where: str) -> tuple[ModelProto, tuple[str, ...]]:
    """The model with its own functions written out where they are called."""
    if not model.functions:
        return model, ()
    names = [f"{f.domain}.{f.name}" for f in model.functions]
    _check_expansion(model, where)
    try:
        inlined = onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError, DecodeError, EncodeError, onnx.checker.ValidationError) as e:
        raise UnsupportedModelError(
            f"{where} has functions that cannot be inlined: {show(e, 200)}. {AGAIN}"
        ) from e
    if inlined.functions:
        left = [f"{f.domain}.{f.name}" for f in inlined.functions]
        raise UnsupportedModelError(
            f"{where} has functions that cannot be inlined: {listing(left)}. {AGAIN}"
        )
    return inlined, (f"{where}: inlined {listing(names)}",)


def _check_expansion(model: ModelProto, where: str) -> None:
    """Raises if functions call themselves, or would fill the memory once written out."""
    for unit, most, weight in (("bytes", MAX_INLINED, _bytes), ("nodes", MAX_NODES, _one)):
        needed = _expanded(model, weight, where)
        if needed > most:
            raise UnsafeInputError(
                f"{where} would grow to {needed} {unit} once its functions are written out; "
                "refused."
            )


def _bytes(node: NodeProto) -> int:
    return node.ByteSize()


def _one(_: NodeProto) -> int:
    return 1


def _expanded(model: ModelProto, weight: Callable[[NodeProto], int], where: str) -> int:
    """The weights of all nodes together, once functions are written out."""
    functions = {_key(f.domain, f.name, f.overload): f for f in model.functions}
    if len(functions) < len(model.functions):
        raise CheckpointError(f"{where} defines a function twice. {AGAIN}")
    sizes: dict[tuple[str, ...], int | None] = {}

    def total(nodes: Iterable[NodeProto], depth: int) -> int:
        if depth > MAX_CALLS:
            raise UnsafeInputError(f"{where} nests functions over {MAX_CALLS} deep; refused.")
        keys = ((weight(n), _key(n.domain, n.op_type, n.overload)) for n in _all_nodes(nodes))
        return sum(own + (size(key, depth) if key in functions else 0) for own, key in keys)

    def size(key: tuple[str, ...], depth: int) -> int:
        if key not in sizes:
            sizes[key] = None
            sizes[key] = total(functions[key].node, depth + 1)
        known = sizes[key]
        if known is None:
            raise CheckpointError(f"{where}: function {show(key[1])} calls itself. {AGAIN}")
        return known

    return total(model.graph.node, 0)


def _key(domain: str, name: str, overload: str) -> tuple[str, ...]:
    return ("" if domain in DEFAULT else domain), name, overload


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_nodes(attribute.g.node)
            for graph in attribute.graphs:
                yield from _all_nodes(graph.node)


def _check_names(graph: GraphProto, where: str) -> None:
    """Raises unless every value is defined once, before it is read."""
    weights, inputs = [t.name for t in graph.initializer], [v.name for v in graph.input]
    for kind, names in (("initialiser", weights), ("input", inputs)):
        if (repeated := _repeated(names)) is not None:
            raise CheckpointError(f"{where} defines {kind} {show(repeated)!r} twice. {AGAIN}")
    defined = _check_order(graph.node, {"", *weights, *inputs}, where)
    if not graph.output:
        raise CheckpointError(f"{where} has no outputs. {AGAIN}")
    for value in graph.output:
        if not value.name or value.name not in defined:
            raise CheckpointError(
                f"{where}: its output {show(value.name)!r} is computed by no node. {AGAIN}"
            )


def _check_order(nodes: Iterable[NodeProto], defined: set[str], where: str) -> set[str]:
    """All names, given those defined before the first node."""
    made = {name: _label(node) for node in nodes for name in node.output}
    for node in nodes:
        for name in node.input:
            if name not in defined:
                raise CheckpointError(_undefined(name, node, made, where))
        for name in filter(None, node.output):
            if name in defined:
                raise CheckpointError(
                    f"{where}: node {_label(node)} defines {show(name)!r} a second time. {AGAIN}"
                )
            defined.add(name)
    return defined


def _repeated(names: list[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def _undefined(name: str, node: NodeProto, made: dict[str, str], where: str) -> str:
    start = f"{where}: node {_label(node)} reads {show(name)!r}"
    if name in made:
        return (
            f"{start} before node {made[name]} computes it: the nodes are out of order, or form a "
            f"cycle. {AGAIN}"
        )
    return f"{start}, which is no input, initialiser or output of another node. {AGAIN}"


def _label(node: NodeProto) -> str:
    return f"{show(_path(node))!r} ({show(node.op_type)})"


def _path(node: NodeProto) -> str:
    return node.name or next(filter(None, node.output), "")


def _input(value: ValueInfoProto, where: str) -> ProgramInput:
    label = f"{where}: input {show(value.name)!r}"
    if value.type.WhichOneof("value") != "tensor_type":
        raise UnsupportedModelError(f"{label} is no tensor; only tensors are supported.")
    tensor = value.type.tensor_type
    if tensor.elem_type not in (*FLOATS, *WHOLE):
        raise UnsupportedModelError(
            f"{label} has type {type_name(tensor.elem_type)}; supported are "
            f"{', '.join(map(type_name, (*FLOATS, *WHOLE)))}."
        )
    if not tensor.HasField("shape"):
        raise UnsupportedModelError(f"{label} does not say its shape. Export it with one.")
    shape = tuple(d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim)
    if any(n is not None and n > MAX_DIM for n in shape):
        raise CheckpointError(f"{label} claims shape {list(shape)}. {AGAIN}")
    batch = tuple(n or 1 for n in shape[:1])  # a free batch size
    names = tuple(d.dim_param if _printable(d.dim_param) else "" for d in tensor.shape.dim)
    known = names if any(names) else ()
    return ProgramInput(value.name, batch + shape[1:], known, tensor.elem_type in WHOLE)


def _printable(text: str) -> bool:
    """Whether a name of an axis is one to write into other files."""
    return text.isprintable() and len(text) <= MAX_NAME


def _constant(node: NodeProto, file: OnnxFile) -> np.ndarray:
    """The value of a Constant node."""
    label = f"{file.where}: constant {_label(node)}"
    if len(node.output) != 1 or not node.output[0] or len(node.attribute) != 1:
        raise CheckpointError(f"{label} needs one output and one attribute. {AGAIN}")
    attribute = node.attribute[0]
    value = _decode(attribute, node, file)
    if attribute.name == "value" and isinstance(value, np.ndarray):
        return value
    if attribute.name not in CONSTANTS:
        raise UnsupportedModelError(f"{label} holds {show(attribute.name)}, not supported.")
    try:
        array = np.array(value, CONSTANTS[attribute.name])
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{label} is damaged: {show(error)}. {AGAIN}") from error
    array.setflags(write=False)
    return array


def _call(node: NodeProto, file: OnnxFile, opsets: dict[str, int], read: set[str]) -> Call:
    kwargs: dict[str, Any] = {}
    for attribute in node.attribute:
        if not attribute.name or attribute.name in kwargs:
            raise CheckpointError(
                f"{file.where}: node {_label(node)} has attribute {show(attribute.name)!r} "
                f"{'twice' if attribute.name else 'without a name'}. {AGAIN}"
            )
        kwargs[attribute.name] = _decode(attribute, node, file)
    kwargs["opset_version"] = opsets.get(node.domain, 0)
    domain = "onnx" if node.domain in DEFAULT else node.domain
    names = [name or None for name in node.output]
    outputs = names[:1] + [name if name in read else None for name in names[1:]]
    args = tuple(Ref(name) if name else None for name in node.input)
    path = _path(node)
    path = path if len(path) <= MAX_PATH else ""
    return Call(f"{domain}.{node.op_type}", args, kwargs, tuple(outputs), path)


def _decode(attribute: AttributeProto, node: NodeProto, file: OnnxFile) -> Any:
    """An attribute as numbers, text, arrays, or tuples of these."""
    label = f"{file.where}: attribute {show(attribute.name)!r} of node {_label(node)}"
    if attribute.ref_attr_name:
        raise CheckpointError(f"{label} refers to a function there is none of. {AGAIN}")
    if attribute.type not in DECODERS:
        kinds = AttributeProto.AttributeType
        kind = kinds.Name(attribute.type) if attribute.type in kinds.values() else attribute.type
        raise UnsupportedModelError(f"{label} is of kind {kind}, which is not supported.")
    try:
        return DECODERS[attribute.type](attribute, file)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{label} is no text. {AGAIN}") from error
