"""Files of graphs made by hand to leave their folder, to contradict themselves, or to explode."""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import forged
import numpy as np
from forged import call, field, ref
from hostile import CORPUS, FLOATS, HUGE, Hostile, add
from onnx import TensorProto, helper

from dfq_jax.errors import (
    CheckpointError,
    DfqError,
    UnsafeInputError,
    UnsupportedModelError,
    UnsupportedOpError,
)

# .pt2


W = {"w": np.ones((2, 3), np.float32)}
RELU = call("aten.relu.default", "y", self="x")


MODEL, CONFIG = "models/model.json", "data/weights/model_weights_config.json"


def graph(
    title: str, nodes: list[Any], error: type[DfqError], match: str, member: str = "", to: Any = b""
) -> None:
    """A `.pt2` file with these calls, and another content of a member."""
    changes = {member: to} if member else {}
    data = forged.exported(forged.description(nodes, W, "y"), W, changes)
    add("pt2", title, data, error, match)


def weights(title: str, error: type[DfqError], match: str, path: str = "weight_0", **meta: Any):
    """A `.pt2` file that describes its weight so."""
    config = {"config": {"w": forged.payload(path, W["w"], **meta)}}
    graph(title, [RELU], error, match, CONFIG, config)


def sizes(*values: Any) -> list[Any]:
    """Sizes or strides."""
    return [{"as_int": n} for n in values]


def tower(levels: int) -> list[Any]:
    """Graphs in graphs, each handing the next one a list of twice what it got."""
    nodes: list[Any] = [call("aten.cat.default", "b", tensors={"as_tensors": [{"name": "a0"}]})]
    for level in range(levels):
        inner = {"inputs": [ref(f"a{level}")], "outputs": [], "nodes": nodes}
        given = "x" if level == levels - 1 else f"a{level + 1}"
        twice = {"as_tensors": [{"name": given}, {"name": given}]}
        nodes = [call("higher_order.wrap", "", {"as_graph": {"name": "g", "graph": inner}}, twice)]
    return nodes


def chain(count: int) -> list[Any]:
    """Changes of one tensor in place, then reads of all its former names, oldest first."""
    changes = [call("aten.relu_.default", f"r{at}", self="a") for at in range(count)]
    reads = [call("aten.relu.default", f"s{at}", self=f"r{at}") for at in range(count)]
    first = call("aten.relu.default", "a", self="x")
    return [first, *changes, *reads, call("aten.relu.default", "y", self="z")]


graph("cyclic names", [call("aten.relu.default", "a", self="y"),
      call("aten.relu.default", "y", self="a")], CheckpointError, "before anything")  # fmt: skip
graph("undefined name", [call("aten.relu.default", "y", self="z")], CheckpointError, "reads 'z'")
graph("defined twice", [RELU, RELU], CheckpointError, "'y' is defined twice")
weights("path outside", UnsafeInputError, "the odd path", path="../../../etc/passwd")
weights("negative size", CheckpointError, "a size, stride", sizes=sizes(-1, 3))
weights("strides beyond", CheckpointError, "reaches element", strides=sizes(2**40, 1))
weights("2^60 elements", CheckpointError, "claims shape", sizes=sizes(HUGE, 1))
weights("expanded", UnsafeInputError, "exceed the file", sizes=sizes(2**40, 1), strides=sizes(0, 0))
weights("sizes NaN", CheckpointError, "not an integer", sizes=sizes(float("nan"), 1))
graph("pickled weight", [RELU], UnsafeInputError, "stored as a pickle", CONFIG,
      {"config": {"w": {"path_name": "weight_0", "use_pickle": True}}})  # fmt: skip
graph("deep JSON", [RELU], UnsafeInputError, "nested too deeply",
      MODEL, b'{"a":' * 100_000)  # fmt: skip
graph("repeated key", [RELU], CheckpointError, "a repeated key", MODEL, b'{"a":1,"a":1}')
graph("JSON bomb", [RELU], UnsafeInputError, "over .* objects and lists",
      MODEL, b'{"a":[' + b'{"":1},' * 2_000_000 + b"1]}")  # fmt: skip
graph("lists that double", [*tower(30), RELU], CheckpointError, "a list where a nested graph")
graph("old names", chain(8_000), CheckpointError, "reads 'z'")
DEEP = {"nn_module_stack": "x," + "a." * 200_000 + ",T"}
graph("deep module path", [{**RELU, "metadata": DEEP}, call("aten.relu.default", "w", self="y")],
      CheckpointError, "'w' is defined twice")  # fmt: skip
graph("a custom object", [call("aten.relu.default", "y", {"as_custom_obj": {"name": "o",
      "class_fqn": "os.system"}})], UnsupportedModelError, "only PyTorch can run")  # fmt: skip
graph("unknown operator", [call("os.system", "y", self="x")], UnsupportedOpError, "os.system")
add("pt2", "an archive of pickles", forged.packed({"archive_format": b"pt2", "models/model.json":
    b"{}", "data/weights/model.pt": b""}), UnsupportedModelError, "PyTorch 2.8")  # fmt: skip


# .onnx

NODE = helper.make_node("Relu", ["x"], ["y"], name="act")


def model(
    title: str, error: type[DfqError], match: str, nodes: Any = (NODE,), w: Any = (), **options: Any
) -> None:
    """An ONNX file of these nodes and weights."""
    add("onnx", title, forged.onnx_model(nodes, w, **options), error, match)


def weight(title: str, error: type[DfqError], match: str, **fields: Any) -> None:
    """An ONNX file with one more weight."""
    fields = {"name": "w", "data_type": TensorProto.FLOAT, "dims": (6,)} | fields
    model(title, error, match, w=[TensorProto(**fields)])


def elsewhere(
    title: str, error: type[DfqError], match: str, prepare: Callable[[Path], object], **entry: str
) -> None:
    """An ONNX file with a weight in another file, which `prepare` puts into the folder."""
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(6,))
    outside.data_location = TensorProto.EXTERNAL
    for key, value in entry.items():
        outside.external_data.add(key=key, value=value)
    data = forged.onnx_model([NODE], [outside])

    def make(folder: Path) -> bytes:
        prepare(folder)
        return data

    CORPUS[f"onnx: {title}"] = Hostile("onnx", make, error, match)


def hard_link(folder: Path) -> None:
    """Another name of a file beside the folder."""
    os.link(folder.parent / forged.OUTSIDE, folder / "hard.bin")


def nested(levels: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on."""
    data = b""
    for _ in range(levels):
        data = field(1, field(5, field(6, data)))
    return field(7, data)


def laughing(levels: int) -> bytes:
    """Functions that each call the one before ten times."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    functions = []
    for level in range(levels):
        inner = helper.make_node("Relu", ["a"], ["b"])
        if level:
            inner = helper.make_node(f"F{level - 1}", ["a"], ["b"], domain="f")
        nodes = [inner] + [helper.make_node(inner.op_type, ["a"], [f"b{n}"], domain=inner.domain)
                           for n in range(9)]  # fmt: skip
        functions.append(helper.make_function("f", f"F{level}", ["a"], ["b"], nodes, opsets))
    start = helper.make_node(f"F{levels - 1}", ["x"], ["y"], domain="f")
    return forged.onnx_model([start], functions=functions, opset_imports=opsets)


def long_function(nodes: int, calls: int) -> bytes:
    """A long function called in a row: a small file of half a million nodes."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    body = [relu(f"v{n}", f"v{n + 1}") for n in range(nodes)]
    function = helper.make_function("f", "F", ["v0"], [f"v{nodes}"], body, opsets)
    row = ["x", *(f"u{n}" for n in range(calls - 1)), "y"]
    steps = [helper.make_node("F", [a], [b], domain="f") for a, b in pairwise(row)]
    return forged.onnx_model(steps, functions=[function], opset_imports=opsets)


def calling_itself() -> bytes:
    """A function that calls itself."""
    opsets = [helper.make_opsetid("f", 1), helper.make_opsetid("", 17)]
    again = helper.make_node("F", ["a"], ["b"], domain="f")
    function = helper.make_function("f", "F", ["a"], ["b"], [again], opsets)
    start = helper.make_node("F", ["x"], ["y"], domain="f")
    return forged.onnx_model([start], functions=[function], opset_imports=opsets)


def relu(*names: str) -> Any:
    """A node from one value to another."""
    return helper.make_node("Relu", names[:1], names[1:])


add("onnx", "messages in messages", nested(30_000)[:200_000], CheckpointError, "cut off")
add("onnx", "graphs in graphs", nested(2_000), UnsafeInputError, "over 50 levels deep")
add("onnx", "packed numbers", field(7, field(5, field(7, bytes((32 << 20) + 1)))), UnsafeInputError,
    "numbers one by one")  # fmt: skip
add("onnx", "many fields", field(7, b"\x0a\0" * (1 << 18)), UnsafeInputError, "over 262144 fields")
add("onnx", "endless number", b"\x08" + b"\xff" * 100, CheckpointError, "has no end")
add("onnx", "length of 2^62", b"\x3a" + forged.varint(2**62), CheckpointError, "is cut off")
add("onnx", "functions that multiply", laughing(20), UnsafeInputError, "would grow to")
add("onnx", "a function in a row", long_function(500, 1000), UnsafeInputError, "would grow to")
add("onnx", "a function that calls itself", calling_itself(), CheckpointError, "calls itself")
model("a cycle", CheckpointError, "form a cycle", [relu("y", "a"), relu("a", "y")])
model("undefined name", CheckpointError, "which is no input", [relu("z", "y")])
model("defined twice", CheckpointError, "a second time", [relu("x", "y"), relu("x", "y")])
model("opset 2^40", UnsupportedModelError, "opset 1099511627776",
      opset_imports=[helper.make_opsetid("", 2**40)])  # fmt: skip
model("another domain", UnsupportedOpError, "os.system",
      [helper.make_node("system", ["x"], ["y"], domain="os")])  # fmt: skip
weight("2^60 elements", CheckpointError, "claims shape", dims=(HUGE,), raw_data=FLOATS)
weight("negative size", CheckpointError, "claims shape", dims=(-6,), raw_data=FLOATS)
weight("2^40 values", CheckpointError, "float_data has 0", dims=(2**40,))
weight("two places", CheckpointError, "several places", raw_data=FLOATS, float_data=(1.0,))
model("long name of a node", UnsupportedOpError, "os.system",
      [helper.make_node("system", ["x"], ["y"], domain="os", name="a/" * 300_000)])  # fmt: skip
OUTSIDE = "outside the model's folder; nothing was opened"
for location in (f"../{forged.OUTSIDE}", "/etc/passwd", "sub/../../x", r"..\x", "C:x"):
    elsewhere(f"data in {location}", UnsafeInputError, OUTSIDE, lambda _: None, location=location)
elsewhere("data behind a link", UnsafeInputError, "symbolic link; nothing was opened",
          lambda _: None, location="link")  # fmt: skip
elsewhere("data behind a hard link", UnsafeInputError, "second hard link", hard_link,
          location="hard.bin")  # fmt: skip
elsewhere("data in a pipe", UnsafeInputError, "no regular file",
          lambda folder: os.mkfifo(folder / "pipe"), location="pipe")  # fmt: skip
elsewhere("data in a folder", UnsafeInputError, "no regular file",
          lambda folder: (folder / "sub").mkdir(), location="sub")  # fmt: skip
elsewhere("data beyond the end", CheckpointError, "cut short", lambda _: None, location="w.bin",
          offset=str(2**55))  # fmt: skip
elsewhere("data before the start", CheckpointError, "which is no count", lambda _: None,
          location="w.bin", offset="-4")  # fmt: skip
