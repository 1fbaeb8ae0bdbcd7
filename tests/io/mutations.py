"""Damaged and hostile variations of small files: the same number gives the same bytes."""

import copy
import json
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import forged
import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto, TensorProto

T = TypeVar("T")
Rng = np.random.Generator
Change = Callable[[Rng, bytes], bytes]
READERS = ("pth", "safetensors", "pt2", "onnx")
LARGEST = 1 << 18  # bytes of a mutated file
CANARY = Path(tempfile.gettempdir()) / "dfq-jax-canary"  # no reader may ever create it

EDGES = (
    *(0, 1, 2, 7, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**48, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
BYTES = (
    *(b"\0", b"\xff", b"\x7f", b"\x80", b".", b"{", b"[", b'"', b"\n", b"\xff" * 10, bytes(16)),
    *((value % 2 ** (8 * n)).to_bytes(n, "little") for n in (2, 4, 8) for value in EDGES),
    *map(forged.varint, EDGES),
)
NUMBERS = (
    *(*map(str, EDGES), "-1", str(-(2**63)), "NaN", "-Infinity", "1e999", "0.5", "9" * 5000),
    *("null", "true", '"1"', "[]", "{}", "1e5", "3", "-0"),
)
RECORDS: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**60, 2**63, 0.5, "", "x", "conv.weight", "\ud800", "../x", [], {}),
    *([[]], [{}], {"as_int": 1}, {"as_int": -1}, {"as_int": 2**60}, {"name": "x"}),
    *({"as_none": True}, {"as_name": "x"}, {"as_tensors": [{"name": "c"}]}, "a" * 9000),
    {"as_ints": [2**40, 2**40]},
    {"as_graph": {"name": "g", "graph": {"nodes": [], "inputs": [], "outputs": []}}},
)  # fmt: skip
OPERATIONS = (
    *(bytes((code,)) for code in range(256)),
    *(forged.named(*n) for n in (("torch", "load"), ("builtins", "dict"), ("builtins", "list"))),
    *(b"q\0", b"h\0", b"h\1", b"j\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f", b"I01\n", b"L9999L\n"),
    *(forged.number(value) for value in (-1, 2**60, 2**63, 2**70)),
    *(forged.tensor(forged.storage("0", n), s, t) for n, s, t in (
        (2**60, (2**60,), (1,)), (6, (9, 9), (-1, 0)), (108, (4, 2**20), (0, 0)), (108, (0,), (1,)),
    )),
    *(b"(" * 3000, b"]" * 3000, b"N" + b"\x85" * 3000, b"}" + b"h\0h\1s" * 1000),
)  # fmt: skip
RUN = f"touch {CANARY}"
CODE = (
    forged.named("os", "system") + forged.text(RUN) + b"\x85R",
    forged.named("builtins", "exec") + forged.text(f"open({str(CANARY)!r}, 'w')") + b"\x85R",
    forged.text("posix") + forged.text("system") + b"\x93" + forged.text(RUN) + b"\x85R",
    b"(" + forged.text(RUN) + b"iposix\nsystem\n",
    b"(cposix\nsystem\n" + forged.text(RUN) + b"o",
    forged.named("pathlib", "Path.touch")
    + forged.sequence(forged.named("pathlib", "Path") + forged.text(str(CANARY)) + b"\x85R")
    + b"R",
)


def mutated(reader: str, number: int, seed: int = 0, with_torch: bool = False) -> bytes:
    """The file of that number: a few changes, most of them along the format's structure."""
    rng = np.random.default_rng((seed, READERS.index(reader), number))
    files = forged.seeds(with_torch)[reader]
    data = pick(rng, files)
    for _ in range(int(pick(rng, (1, 1, 1, 2, 2, 4)))):
        if rng.random() < 0.8:
            data = pick(rng, STRUCTURED[reader])(rng, data)
        elif rng.random() < 0.2:
            data = spliced(rng, data, pick(rng, files))
        else:
            data = pick(rng, PLAIN)(rng, data)
        data = data[:LARGEST]
    return data


def pick(rng: Rng, items: Sequence[T]) -> T:
    """One of them."""
    return items[int(rng.integers(len(items)))]


def span(rng: Rng, data: bytes) -> tuple[int, int]:
    """Start and end of a short part."""
    start = int(rng.integers(len(data) + 1))
    return start, min(len(data), start + int(2 ** rng.uniform(0, 8)))


# changes of bytes


def flipped(rng: Rng, data: bytes) -> bytes:
    """One bit changed."""
    at = int(rng.integers(max(len(data), 1)))
    return (
        data[:at] + bytes(b ^ 1 << int(rng.integers(8)) for b in data[at : at + 1]) + data[at + 1 :]
    )


def overwritten(rng: Rng, data: bytes) -> bytes:
    """A few bytes replaced by ones that readers stumble over."""
    at, value = span(rng, data)[0], pick(rng, BYTES)
    return data[:at] + value + data[at + len(value) :]


def inserted(rng: Rng, data: bytes) -> bytes:
    """The same bytes, added once or many times."""
    at, value = span(rng, data)[0], pick(rng, BYTES)
    return data[:at] + value * int(2 ** rng.uniform(0, 10)) + data[at:]


def moved(rng: Rng, data: bytes) -> bytes:
    """A block copied, moved or taken out."""
    start, end = span(rng, data)
    block, how = data[start:end], int(rng.integers(3))
    rest = data if how == 0 else data[:start] + data[end:]
    at = int(rng.integers(len(rest) + 1))
    return rest if how == 2 else rest[:at] + block + rest[at:]


def truncated(rng: Rng, data: bytes) -> bytes:
    """Cut short."""
    return data[: int(rng.integers(len(data) + 1))]


def spliced(rng: Rng, data: bytes, other: bytes) -> bytes:
    """The start of one file and the end of another."""
    return truncated(rng, data) + other[int(rng.integers(len(other) + 1)) :]


PLAIN: tuple[Change, ...] = (flipped, overwritten, inserted, moved, truncated)


# changes of zip archives


def fields_of_zip(rng: Rng, data: bytes) -> bytes:
    """A number in a header of an archive replaced."""
    kinds = ((b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22))
    mark, size = pick(rng, kinds)
    starts = [found.start() for found in re.finditer(re.escape(mark), data)]
    if not starts:
        return overwritten(rng, data)
    at = pick(rng, starts) + int(rng.integers(4, size))
    value = pick(rng, BYTES)[: int(pick(rng, (1, 2, 4)))]
    return data[:at] + value + data[at + len(value) :]


def members_of_zip(rng: Rng, data: bytes, pattern: str = "", change: Change | None = None) -> bytes:
    """A member changed, renamed, exchanged or left out; all checksums right."""
    try:
        members = forged.unpacked(data)
    except (zipfile.BadZipFile, zlib.error, *ODD):
        return overwritten(rng, data)
    names = [name for name in members if re.search(pattern, name)]
    if not names:
        return overwritten(rng, data)
    name, other = pick(rng, names), pick(rng, [*members])
    how = 0 if change else int(rng.integers(5))
    if how == 0:
        members[name] = (change or pick(rng, PLAIN))(rng, members[name])
    elif how == 1:
        members[name], members[other] = members[other], members[name]
    elif how == 2:
        del members[name]
    else:
        odd = pick(rng, ("../x", "/x", "a\\b", name + "\0", "", "x" * 3000, other, "code/x"))
        members[odd] = members.pop(name)
    method = pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    try:
        return forged.packed(members, method)
    except ODD:
        return data


ODD = (ValueError, LookupError, OSError, struct.error, NotImplementedError, RuntimeError, EOFError)


# changes of pickles


def operations(rng: Rng, data: bytes) -> bytes:
    """Operations added to a pickle, or one written over."""
    at, value = span(rng, data)[0], pick(rng, OPERATIONS)
    keep = at + len(value) if rng.random() < 0.3 else at
    return data[:at] + value + data[keep:]


def code(rng: Rng, data: bytes) -> bytes:
    """Operations that run a program in a careless reader."""
    marks = [0, len(data), *(found.end() for found in re.finditer(rb"\x80\x02|[(}u)R]", data))]
    at = pick(rng, marks)
    return data[:at] + pick(rng, CODE) + data[at:]


def names(rng: Rng, data: bytes) -> bytes:
    """The name of a class or a storage replaced."""
    found = pick(rng, (b"OrderedDict", b"torch._utils", b"FloatStorage", b"Namespace", b"storage"))
    new = pick(rng, (b"system", b"builtins", b"os", b"HalfStorage", b"QInt8Storage", b"x" * 5000))
    return data.replace(found, new, 1)


def pickle_change(rng: Rng, data: bytes) -> bytes:
    """One of these, in the pickle of a checkpoint."""
    change = pick(rng, (operations, operations, names, code, *PLAIN))
    if data.startswith(b"PK"):
        return members_of_zip(rng, data, r"data\.pkl$", change)
    return change(rng, data)


# changes of JSON


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def record_change(rng: Rng, data: bytes) -> bytes:
    """A value of a JSON document left out, replaced, repeated or exchanged."""
    try:
        root = json.loads(data.decode())
        found = list(places(root))
    except (ValueError, TypeError, RecursionError):
        return overwritten(rng, data)
    if not found:
        return inserted(rng, data)
    (here, key), (there, other) = pick(rng, found), pick(rng, found)
    how = int(rng.integers(5))
    if how == 0:
        del here[key]
    elif how == 1:
        here[key], there[other] = copy.deepcopy(there[other]), copy.deepcopy(here[key])
    elif how == 2 and isinstance(here, list):
        here.extend(copy.deepcopy(here[key]) for _ in range(int(rng.integers(1, 40))))
    elif how == 3 and isinstance(here, dict):
        here[pick(rng, ("as_int", "as_tensor", "as_none", "name", "dtype", "x"))] = here.pop(key)
    else:
        here[key] = copy.deepcopy(pick(rng, RECORDS))
    return json.dumps(root).encode()


def text_change(rng: Rng, data: bytes) -> bytes:
    """A number of a JSON text replaced, brackets piled up, or a key repeated."""
    how = int(rng.integers(3))
    pattern = (rb"-?\d+", rb'[{\[]|"[^"]*"', rb'"[^"]*" ?: ?\d+')[how]
    found = list(re.finditer(pattern, data))
    if not found:
        return overwritten(rng, data)
    start, end = pick(rng, found).span()
    if how == 0:
        return data[:start] + pick(rng, NUMBERS).encode() + data[end:]
    if how == 2:
        return data[:end] + b", " + data[start:end] + data[end:]
    depth = int(pick(rng, (30, 400, 20_000)))
    left, right = pick(rng, ((b"[", b"]"), (b'{"a":', b"}")))
    closed = right * depth if rng.random() < 0.8 else b""
    return data[:start] + left * depth + b"1" + closed + data[end:]


JSON: tuple[Change, ...] = (record_change, record_change, text_change, text_change, *PLAIN)


def header_change(rng: Rng, data: bytes) -> bytes:
    """The header of a safetensors file, its length set right or wrong."""
    length = int.from_bytes(data[:8], "little")
    header = pick(rng, JSON)(rng, data[8 : 8 + length])
    length_told = len(header) if rng.random() < 0.9 else pick(rng, EDGES)
    return struct.pack("<Q", length_told) + header + data[8 + length :]


def json_of_zip(rng: Rng, data: bytes) -> bytes:
    """A JSON member of an archive."""
    pattern = pick(rng, ("model.json$", "model.json$", "config.json$"))
    return members_of_zip(rng, data, pattern, pick(rng, JSON))


# changes of protobuf


def wire(rng: Rng, data: bytes) -> bytes:
    """A field somewhere in a message renumbered, repeated, left out, wrapped or changed."""
    fields = forged.taken_apart(data)
    if not fields:
        return pick(rng, PLAIN)(rng, data)
    at = int(rng.integers(len(fields)))
    number, value = fields[at]
    how = int(rng.integers(12))
    if how >= 5 and isinstance(value, bytes):
        fields[at] = (number, wire(rng, value))
    elif how == 0:
        fields[at] = (int(rng.integers(1, 30)), value)
    elif how == 1:
        fields[at:at] = [fields[at]] * int(2 ** rng.uniform(0, 8))
    elif how == 2:
        del fields[at]
    elif how == 3 and isinstance(value, bytes):
        for _ in range(int(2 ** rng.uniform(0, 7))):
            value = forged.field(abs(number), value)
        fields[at] = (number, value)
    else:
        fields[at] = (number, pick(rng, EDGES) if isinstance(value, int) else pick(rng, BYTES))
    return b"".join(forged.written(*each) for each in fields)


def message(rng: Rng, data: bytes) -> bytes:
    """A field of an ONNX model set to what it must not be."""
    try:
        model = onnx.load_model_from_string(data)
        pick(rng, (of_tensor, of_node, of_graph))(rng, model)
        return model.SerializeToString()
    except (DecodeError, EncodeError, *ODD):
        return wire(rng, data)


def of_tensor(rng: Rng, model: ModelProto) -> None:
    """Shape, type or place of a weight."""
    weight = pick(rng, model.graph.initializer)
    how = int(rng.integers(4))
    if how == 0:
        weight.dims[:] = [pick(rng, (0, 1, 2, 4, -1, 2**31, 2**60)) for _ in range(rng.integers(6))]
    elif how == 1:
        weight.data_type = int(rng.integers(25))
    elif how == 2:
        weight.raw_data = weight.raw_data * 2 + b"x" * int(rng.integers(3))
    else:
        weight.data_location = TensorProto.EXTERNAL
        weight.ClearField("raw_data")
        places = (
            "w.bin",
            f"../{forged.OUTSIDE}",
            "/etc/passwd",
            "link",
            "",
            "missing",
            "w.bin/x",
            "C:x",
        )
        weight.external_data.add(key="location", value=pick(rng, places))
        value = pick(rng, ("-1", "4", "432", "1e3", "9" * 30, str(2**62)))
        weight.external_data.add(key=pick(rng, ("offset", "length")), value=value)


def of_node(rng: Rng, model: ModelProto) -> None:
    """Operator, edges or attributes of a node."""
    node, other = pick(rng, model.graph.node), pick(rng, model.graph.node)
    how = int(rng.integers(4))
    if how == 0:
        node.op_type, other.op_type = other.op_type, node.op_type
    elif how == 1:
        node.input[:] = [*node.input[1:], pick(rng, [*other.input, *other.output, "", "x"])]
    elif how == 2 and node.attribute:
        value = pick(rng, node.attribute)
        value.ints[:] = [pick(rng, (-1, 0, 1, 3, 2**31, 2**62)) for _ in range(rng.integers(6))]
        value.i = pick(rng, (-1, 0, 5, 2**62))
    else:
        node.output[:] = [*other.output, *node.output]


def of_graph(rng: Rng, model: ModelProto) -> None:
    """Order of the nodes, version, size of the input, or calls of functions."""
    how = int(rng.integers(5))
    graph = model.graph
    if how == 0:
        order = rng.permutation(len(graph.node))
        nodes = [graph.node[int(at)] for at in order]
        del graph.node[:]
        graph.node.extend(nodes)
    elif how == 1:
        model.opset_import[0].version = int(pick(rng, (-1, 0, 9, 11, 13, 20, 99, 2**40)))
    elif how == 2:
        sizes = graph.input[0].type.tensor_type.shape.dim
        pick(rng, sizes).dim_value = pick(rng, (-1, 0, 1, 5, 2**20, 2**24, 2**60))
    elif how == 3 and model.functions:
        inner = model.functions[0]
        for _ in range(int(rng.integers(1, 30))):
            inner.node.append(graph.node[4])
    else:
        graph.node.extend([pick(rng, graph.node)])


STRUCTURED: dict[str, tuple[Change, ...]] = {
    "pth": (pickle_change, pickle_change, pickle_change, fields_of_zip, members_of_zip),
    "safetensors": (header_change,),
    "pt2": (json_of_zip, json_of_zip, json_of_zip, fields_of_zip, members_of_zip),
    "onnx": (wire, message, message),
}
