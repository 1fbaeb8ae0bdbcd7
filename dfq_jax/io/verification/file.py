"""Whether a file holds exactly what the exporter writes for a network: constants, nodes, bounds."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx

from dfq_jax.io.onnx.builder import printable
from dfq_jax.io.onnx.export import quantized_onnx
from dfq_jax.quantization.simulate import QuantizedModel

METADATA = ("dfq.contract", "dfq.inputs", "dfq.scheme", "dfq.layers")
LATER = ("crop",)
"""Keys of the contract that older files lack."""


def differences(proto: onnx.ModelProto, quantized: QuantizedModel) -> Iterator[str]:
    """What in a file is not as the exporter writes it for this network, in sentences.

    Every initializer and node counts, by name and byte for byte. Names of tensors and nodes decide,
    not their order. Version and provenance of the writer may be others.

    Args:
      proto: the file.
      quantized: the network it should hold.

    Yields:
      One sentence each; none if all is as it should be.

    Raises:
      ExportError: if ONNX cannot express the network.
    """
    wanted = quantized_onnx(quantized)
    yield from compared("initializer", tensors(proto), tensors(wanted), told_tensor)
    yield from compared("node", nodes(proto), nodes(wanted), told_node)
    for what in ("input", "output"):
        found, due = ([*map(plain, getattr(p.graph, what))] for p in (proto, wanted))
        if found != due:
            yield f"its {what}s are not those of the network"
    if operators(proto) != operators(wanted):
        yield f"it uses operators of {operators(proto)}, the network those of {operators(wanted)}"
    if proto.functions or proto.graph.sparse_initializer:
        yield "it defines functions or sparse tensors, which the exporter never writes"
    mine, theirs = ({p.key: p.value for p in m.metadata_props} for m in (wanted, proto))
    for key in METADATA:
        if key in mine and not same_fact(theirs.get(key), mine[key]):
            yield f"its {key} is not that of the network"


def same_fact(found: str | None, wanted: str) -> bool:
    """Whether a property says what the exporter says, less what older versions did not say."""
    try:
        said, due = json.loads(found or ""), json.loads(wanted)
    except (ValueError, RecursionError):
        return found == wanted
    if not (isinstance(said, dict) and isinstance(due, dict)):
        return found == wanted
    return {k: due[k] for k in LATER if k in due} | said == due


def compared(
    what: str, found: Mapping[str, Any], wanted: Mapping[str, Any], told: Any
) -> Iterator[str]:
    """A sentence for every name that only one side has or that differs."""
    for name, value in wanted.items():
        shown = printable(name)
        if name not in found:
            yield f"{what} {shown!r} is missing"
        elif found[name] != value:
            yield f"{what} {shown!r} {told(found[name], value)}"
    for name in found.keys() - wanted.keys():
        yield f"{what} {printable(name)!r} is not one of the network"


def tensors(proto: onnx.ModelProto) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """{initializer: (element type, shape, bytes)}."""
    return {t.name: (t.data_type, tuple(t.dims), raw(t)) for t in proto.graph.initializer}


def raw(tensor: onnx.TensorProto) -> bytes:
    """The bytes of a tensor, also of one that stores its values in typed fields or elsewhere."""
    if tensor.HasField("raw_data") or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return tensor.raw_data
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data


def told_tensor(found: tuple, wanted: tuple) -> str:
    """How an initializer differs."""
    (kind, shape, data), (due_kind, due_shape, due) = found, wanted
    if (kind, shape) != (due_kind, due_shape):
        name = onnx.TensorProto.DataType.Name
        return f"is {name(kind)} {list(shape)}, not {name(due_kind)} {list(due_shape)}"
    if len(data) != len(due):
        return f"has {len(data)} bytes, not {len(due)}"
    apart = np.flatnonzero(np.frombuffer(data, np.uint8) != np.frombuffer(due, np.uint8))
    return f"differs in {apart.size} of {len(due)} bytes, the first at {apart[0]}"


def nodes(proto: onnx.ModelProto) -> dict[str, tuple]:
    """{node: what it computes from what}; nodes without a name go by their first output."""
    return {n.name or f"-> {n.output[0]}": described(n) for n in proto.graph.node}


def described(node: onnx.NodeProto) -> tuple:
    """Operator, inputs, outputs and attributes of a node."""
    how = sorted((a.name, plain(a)) for a in node.attribute)
    domain = "" if node.domain == "ai.onnx" else node.domain
    return domain, node.op_type, tuple(node.input), tuple(node.output), tuple(how)


def told_node(found: tuple, wanted: tuple) -> str:
    """In what a node differs first."""
    parts = ("domain", "operator", "inputs", "outputs", "attributes")
    for part, a, b in zip(parts, found, wanted, strict=True):
        if a != b and part != "attributes":
            return f"has other {part}: {a}, not {b}"
    names = sorted({name for name, _ in set(found[-1]) ^ set(wanted[-1])})
    return f"has other attributes: {', '.join(names)}"


def plain(message: Any) -> bytes:
    """A message as bytes, without what is only for readers."""
    copy = type(message)()
    copy.CopyFrom(message)
    copy.ClearField("doc_string")
    return copy.SerializeToString(deterministic=True)


def operators(proto: onnx.ModelProto) -> dict[str, int]:
    """{domain: version} of the operators a file may use; ONNX's own domain is called `ai.onnx`."""
    return {o.domain or "ai.onnx": o.version for o in proto.opset_import}
