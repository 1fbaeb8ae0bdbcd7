"""Checkpoint and graph files of any content, written piece by piece without PyTorch."""

import functools
import importlib.util
import io
import json
import math
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

MAGIC = 0x1950A86A20F9469CFC6C
OUTSIDE = "outside.bin"  # lies beside the folder of an ONNX file
Members = Mapping[str, bytes]


# pickles, as operations


def text(value: str) -> bytes:
    """Pushes a string."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Pushes an integer."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(raw),)) + raw


def named(module: str, name: str) -> bytes:
    """Pushes a global."""
    return f"c{module}\n{name}\n".encode()


def sequence(*items: bytes) -> bytes:
    """Pushes a tuple."""
    return b"(" + b"".join(items) + b"t"


def mapping(items: Mapping[str, bytes]) -> bytes:
    """Pushes a dict."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key: str = "0", count: int = 6, kind: str = "FloatStorage") -> bytes:
    """Pushes a storage."""
    parts = (text("storage"), named("torch", kind), text(key), text("cpu"), number(count))
    return sequence(*parts) + b"Q"


def tensor(
    store: bytes, size: Iterable[int], stride: Iterable[int] | None = None, offset: int = 0
) -> bytes:
    """Pushes a tensor; without `stride`, a contiguous one."""
    size = tuple(size)
    if stride is None:
        stride = [math.prod(size[at + 1 :]) for at in range(len(size))]
    geometry = (number(offset), sequence(*map(number, size)), sequence(*map(number, stride)))
    hooks = named("collections", "OrderedDict") + b")R"
    arguments = sequence(store, *geometry, b"\x89", hooks)
    return named("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def pickled(body: bytes) -> bytes:
    """One pickle of protocol 2."""
    return b"\x80\x02" + body + b"."


# files


def packed(members: Members, method: int = zipfile.ZIP_STORED, root: str = "net/") -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        for name, content in members.items():
            entry = zipfile.ZipInfo(root + name)
            entry.compress_type = method
            target.writestr(entry, content)
    return buffer.getvalue()


def unpacked(data: bytes) -> dict[str, bytes]:
    """The members of a healthy archive by name, the root taken away."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        return {name.partition("/")[2]: source.read(name) for name in source.namelist()}


def checkpoint(root: bytes, storages: Members, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip checkpoint whose pickle does what `root` says."""
    members = {f"data/{key}": content for key, content in storages.items()}
    return packed({"data.pkl": pickled(root), "byteorder": b"little", **members}, method)


def stream(root: bytes, keys: bytes, tail: bytes) -> bytes:
    """A stream checkpoint: `keys` pushes its list of storages, `tail` are these."""
    system = mapping({"protocol_version": number(1001), "little_endian": b"\x88"})
    return b"".join(map(pickled, (number(MAGIC), number(1001), system, root, keys))) + tail


def safetensors(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file; `header` is JSON text, or what to write as such."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def entry(shape: Iterable[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """A tensor in a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def exported(
    model: Any, weights: Mapping[str, np.ndarray], changes: Mapping[str, Any] | None = None
) -> bytes:
    """A `.pt2` archive; `changes` are to its members, bytes or what to write as JSON."""
    config = {name: payload(f"weight_{at}", w) for at, (name, w) in enumerate(weights.items())}
    members: dict[str, Any] = {
        "archive_format": b"pt2",
        "archive_version": b"0",
        "byteorder": b"little",
        "models/model.json": model,
        "data/weights/model_weights_config.json": {"config": config},
        "data/constants/model_constants_config.json": {"config": {}},
    }
    for at, array in enumerate(weights.values()):
        members[f"data/weights/weight_{at}"] = array.tobytes()
    members |= changes or {}
    listed = members.items()
    return packed({k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in listed})


def payload(path: str, array: np.ndarray, **changes: Any) -> dict[str, Any]:
    """How a `.pt2` archive describes a float32 weight; `changes` to its geometry."""
    meta: dict[str, Any] = {"dtype": 7, "layout": 7, "storage_offset": {"as_int": 0}}
    meta["sizes"] = [{"as_int": n} for n in array.shape]
    meta["strides"] = [{"as_int": n // array.itemsize} for n in array.strides]
    meta |= changes
    return {"path_name": path, "is_param": True, "use_pickle": False, "tensor_meta": meta}


def ref(name: str) -> dict[str, Any]:
    """A tensor in the graph of a `.pt2` archive."""
    return {"as_tensor": {"name": name}}


def call(target: str, output: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A call there; tensors are names, everything else is tagged already."""
    given = [("", arg) for arg in args] + list(kwargs.items())
    inputs = [
        {"name": name, "arg": ref(arg) if isinstance(arg, str) else arg} for name, arg in given
    ]
    outputs = [ref(output)] if output else []
    return {"target": f"torch.ops.{target}", "inputs": inputs, "outputs": outputs, "metadata": {}}


def description(
    nodes: list[Any], weights: Iterable[str], output: str, shape: Iterable[int] = (1, 3, 8, 8)
) -> dict[str, Any]:
    """The model of a `.pt2` archive that reads `x` and parameters called like their paths."""
    inputs: list[Any] = [
        {"parameter": {"arg": {"name": name}, "parameter_name": name}} for name in weights
    ]
    inputs.append({"user_input": {"arg": ref("x")}})
    signature = {"input_specs": inputs, "output_specs": [{"user_output": {"arg": ref(output)}}]}
    values = {"x": {"sizes": [{"as_int": n} for n in shape]}}
    graph = {"inputs": [], "outputs": [ref(output)], "nodes": nodes, "tensor_values": values}
    module = {"graph": graph, "signature": signature}
    return {"schema_version": {"major": 8, "minor": 8}, "graph_module": module}


def onnx_model(
    nodes: Iterable[Any], weights: Iterable[Any] = (), output: str = "y", **options: Any
) -> bytes:
    """An ONNX file that reads the image `x`."""
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    made = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "g", [image], [made], list(weights))
    options.setdefault("opset_imports", [helper.make_opsetid("", 17)])
    return helper.make_model(graph, **options).SerializeToString()


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of protobuf."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    """A number of protobuf."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def taken_apart(data: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of a message: numbers, and lengths with content; empty if it is none."""
    fields: list[tuple[int, int | bytes]] = []
    at = 0
    try:
        while at < len(data):
            tag, at = number_at(data, at)
            value, at = number_at(data, at) if tag & 7 != 5 else (4, at)
            if tag & 7 in (2, 5):
                value, at = data[at : at + value], at + value
            fields.append((tag >> 3 if tag & 7 != 5 else -(tag >> 3), value))
    except IndexError:
        return []
    return fields if at == len(data) else []


def number_at(data: bytes, at: int) -> tuple[int, int]:
    """The variable-length number there, and the position after it."""
    value = shift = 0
    while data[at] > 127:
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1


def written(number: int, value: int | bytes) -> bytes:
    """A field; a negative number stands for four bytes without a length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return field(number, value) if number >= 0 else varint(-number << 3 | 5) + value


# healthy files


def parameters() -> dict[str, np.ndarray]:
    """Weights of a convolution, a batch norm and a linear layer."""
    shapes = {"conv.weight": (4, 3, 3, 3), "bn.weight": (4,), "bn.bias": (4,)}
    shapes |= {
        "bn.running_mean": (4,),
        "bn.running_var": (4,),
        "fc.weight": (5, 4),
        "fc.bias": (5,),
    }
    rng = np.random.default_rng(0)
    return {name: rng.uniform(0.1, 1, shape).astype("<f4") for name, shape in shapes.items()}


def small_checkpoint(form: str) -> bytes:
    """A `.pth` file: `zip`, `deflated` or `stream`."""
    arrays = dict(enumerate(parameters().items()))
    tensors = {n: tensor(storage(str(k), a.size), a.shape) for k, (n, a) in arrays.items()}
    tensors["shared"] = tensor(storage("0", 108), (3, 4), (1, 3), 7)
    noise = named("argparse", "Namespace") + b")\x81" + mapping({"lr": b"G?\xf0" + bytes(6)}) + b"b"
    root = mapping({"state_dict": mapping(tensors), "epoch": b"K\x03", "args": noise})
    if form == "stream":
        keys = b"](" + b"".join(text(str(k)) for k in arrays) + b"e"
        tail = b"".join(struct.pack("<q", a.size) + a.tobytes() for _, a in arrays.values())
        return stream(root, keys, tail)
    method = zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED
    return checkpoint(root, {str(k): a.tobytes() for k, (_, a) in arrays.items()}, method)


def small_safetensors() -> bytes:
    """A `.safetensors` file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, array in parameters().items():
        header[name] = entry(array.shape, len(body), len(body) + array.nbytes)
        body += array.tobytes()
    for at, kind in enumerate(("F16", "BF16", "BOOL", "U8")):
        width = 2 if at < 2 else 1
        header[kind] = entry((2, 1), len(body), len(body) + 2 * width, kind)
        body += bytes(2 * width)
    return safetensors(header, body)


def ints(*values: int) -> dict[str, Any]:
    """A list argument of a call in a `.pt2` archive."""
    return {"as_ints": list(values)}


def small_exported() -> bytes:
    """A `.pt2` file with an in-place operator, a nested graph and a computed constant."""
    one = {"as_int": 1}
    w, number = parameters(), {"as_float": 1e-5}
    inner = {
        "inputs": [ref("a")],
        "outputs": [ref("b")],
        "nodes": [call("aten.relu_.default", "b", self="a")],
        "tensor_values": {},
    }
    statistics = {key: f"bn.{key}" for key in ("weight", "bias", "running_mean", "running_var")}
    nodes = [
        call("aten.conv2d.default", "c", input="x", weight="conv.weight", stride=ints(1, 1),
             padding=ints(1, 1)),
        call("aten.batch_norm.default", "n", input="c", **statistics, training={"as_bool": False},
             momentum=number, eps=number, cudnn_enabled={"as_bool": True}),
        call("higher_order.wrap_with_set_grad_enabled", "r", {"as_bool": False},
             {"as_graph": {"name": "g", "graph": inner}}, "n"),
        call("aten.slice.Tensor", "s", self="r", dim=one, start={"as_int": 0}, end={"as_int": 2}),
        call("aten.cat.default", "j", tensors={"as_tensors": [{"name": "s"}] * 2}, dim=one),
        call("aten.adaptive_avg_pool2d.default", "p", self="j", output_size=ints(1, 1)),
        call("aten.full.default", "k", size=ints(1, 4, 1, 1), fill_value={"as_float": 2.0}),
        call("aten.mul.Tensor", "m", self="p", other="k"),
        call("aten.view.default", "v", self="m", size=ints(1, 4)),
        call("aten.linear.default", "y", input="v", weight="fc.weight", bias="fc.bias"),
    ]  # fmt: skip
    return exported(description(nodes, w, "y"), w)


def small_onnx(**external: str) -> bytes:
    """An ONNX file with computed shapes and a function; `external` puts one weight elsewhere."""
    w = parameters()
    weights = [numpy_helper.from_array(array, name) for name, array in w.items()]
    weights.append(helper.make_tensor("sizes", TensorProto.INT64, [2], [1, -1]))
    weights.append(helper.make_tensor("two", TensorProto.FLOAT, [1], [2.0]))
    if external:
        weights[0].ClearField("raw_data")
        weights[0].data_location = TensorProto.EXTERNAL
        for key, value in external.items():
            weights[0].external_data.add(key=key, value=value)
    bn = [f"bn.{key}" for key in ("weight", "bias", "running_mean", "running_var")]
    zero = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    double = helper.make_function(
        "f", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], opsets[:1]
    )
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", *bn], ["n"], name="bn"),
        helper.make_node("Clip", ["n", "", "two"], ["r"], name="act"),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Twice", ["p"], ["t"], domain="f"),
        helper.make_node("Shape", ["t"], ["shape"]),
        helper.make_node("Constant", [], ["zero"], value=zero),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Constant", [], ["rest"], value_ints=[-1]),
        helper.make_node("Concat", ["batch", "rest"], ["target"], axis=0),
        helper.make_node("GlobalAveragePool", ["t"], ["g"]),
        helper.make_node("Reshape", ["g", "target"], ["v"]),
        helper.make_node("Reshape", ["v", "sizes"], ["u"]),
        helper.make_node("Gemm", ["u", "fc.weight", "fc.bias"], ["y"], name="fc", transB=1),
    ]
    return onnx_model(nodes, weights, opset_imports=opsets, functions=[double])


@functools.cache
def seeds(with_torch: bool = False) -> dict[str, tuple[bytes, ...]]:
    """{reader: healthy files}; also some that PyTorch writes, where asked for and installed."""
    found: dict[str, tuple[bytes, ...]] = {
        "pth": tuple(map(small_checkpoint, ("zip", "deflated", "stream"))),
        "safetensors": (small_safetensors(),),
        "pt2": (small_exported(),),
        "onnx": (small_onnx(), small_onnx(location="w.bin", length="432")),
    }
    if with_torch and importlib.util.find_spec("torch"):
        for reader, more in torch_seeds().items():
            found[reader] += more
    return found


def torch_seeds() -> dict[str, tuple[bytes, ...]]:
    """What PyTorch writes of a small network."""
    import torch

    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Hardswish())
    rest = (torch.nn.AdaptiveAvgPool2d((2, 2)), torch.nn.Flatten(), torch.nn.Linear(16, 5))
    net, image = torch.nn.Sequential(*layers, *rest).eval(), torch.zeros(1, 3, 8, 8)
    files: dict[str, list[bytes]] = {"pth": [], "pt2": [], "onnx": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for new in (True, False):
            buffer = io.BytesIO()
            torch.save(net.state_dict(), buffer, _use_new_zipfile_serialization=new)
            files["pth"].append(buffer.getvalue())
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(net, (image,)), buffer)
        files["pt2"].append(buffer.getvalue())
        buffer = io.BytesIO()
        export: Any = torch.onnx.export
        export(net, (image,), buffer, dynamo=False, opset_version=17)
        files["onnx"].append(buffer.getvalue())
    return {reader: tuple(found) for reader, found in files.items()}


def folder_for_onnx(parent: Path) -> Path:
    """A folder with external data, a link, and a secret beside it."""
    folder = parent / "model"
    folder.mkdir()
    weight = parameters()["conv.weight"].tobytes()
    (folder / "w.bin").write_bytes(weight)
    (parent / OUTSIDE).write_bytes(weight)
    (folder / "link").symlink_to(f"../{OUTSIDE}")
    return folder
