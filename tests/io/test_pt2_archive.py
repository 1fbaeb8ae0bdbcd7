"""Weights in `.pt2` files: bit parity with PyTorch, and what must be refused."""

import contextlib
import functools
import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq_jax.errors import CheckpointError, DfqError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.pt2_archive import Pt2Archive
from dfq_jax.io.pt2_graph import read_pt2

pytestmark = pytest.mark.torch
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16),
    *(torch.int32, torch.int64, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64),
]
WEIGHTS = "data/weights/model_weights_config.json"
MODEL = "models/model.json"
Change = Callable[[Any], Any]


class Canary:
    """Creates a file when unpickled by a careless reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Holder(torch.nn.Module):
    """Adds up whatever tensors it holds as buffers."""

    def __init__(self, tensors: dict[str, torch.Tensor], persistent: bool = True):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((b.double().sum() for b in self.buffers()), x)  # pyright: ignore


def exported(module: torch.nn.Module, *inputs: torch.Tensor) -> bytes:
    """What torch.export.save writes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module.eval(), inputs), buffer)
    return buffer.getvalue()


def held(tensors: dict[str, torch.Tensor], persistent: bool = True) -> bytes:
    return exported(Holder(tensors, persistent), torch.zeros(2))


def members(data: bytes) -> dict[str, bytes]:
    """Contents of the members, by name without the root."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def packed(
    contents: dict[str, bytes | None], root: str = "net/", method: int = zipfile.ZIP_STORED
) -> bytes:
    """An archive of any content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        for name, content in contents.items():
            if content is not None:
                target.writestr(root + name, content)
    return buffer.getvalue()


def changed(data: bytes, changes: dict[str, bytes | None]) -> bytes:
    """The same archive with members replaced, added or left out."""
    return packed({**members(data), **changes})


def edited(data: bytes, path: str, change: Change) -> bytes:
    """The same archive with one JSON member changed in place."""
    record = json.loads(members(data)[path])
    change(record)
    return changed(data, {path: json.dumps(record).encode()})


@functools.cache
def small() -> bytes:
    """A convolution and a batch norm."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    return exported(net, torch.zeros(1, 3, 8, 8))


def arrays(data: bytes | memoryview) -> dict[str, np.ndarray]:
    """All weights by path."""
    program = read_pt2(data, "net.pt2")
    return {path: program.arrays[name] for name, path in program.paths.items()}


def assert_same(got: dict[str, np.ndarray], tensors: dict[str, torch.Tensor]) -> None:
    """Bit for bit, with shapes and types."""
    assert set(got) == set(tensors)
    for name, tensor in tensors.items():
        bits = tensor.detach().contiguous().view(BITS[tensor.element_size()]).numpy()
        assert got[name].shape == tuple(tensor.shape), name
        assert got[name].dtype.name == str(tensor.dtype).removeprefix("torch."), name
        assert got[name].tobytes() == bits.tobytes(), name
        assert not got[name].flags.writeable, name
        assert got[name].flags.aligned, name


def mixed_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return {
        "channels_last": torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last),
        "transposed": base.t(),
        "column": base[:, 2],
        "strided": base[::2, 1::3],
        "tail": base[2:],
        "shared": base,
        "expanded": torch.randn(3, 1).expand(3, 4),
        "scalar": torch.tensor(3.5),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "one": torch.randn(1, 1, 1),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


@pytest.mark.filterwarnings("ignore:No complete tensor")
@pytest.mark.parametrize("persistent", [True, False])
def test_views_scalars_and_shared_storages(persistent):
    tensors = mixed_tensors()
    assert_same(arrays(held(tensors, persistent)), tensors)


def test_weight_that_is_only_a_view():
    kernel = torch.nn.Parameter(torch.randn(6, 4).t())
    net = torch.nn.Linear(6, 4)
    net.weight = kernel
    got = arrays(exported(net, torch.zeros(1, 6)))
    assert_same(got, dict(net.state_dict()))
    assert got["weight"].strides == (4, 16)


def test_every_type():
    tensors = {}
    for dtype in TYPES:
        values = torch.arange(-3, 9) if dtype.is_signed else torch.arange(0, 12)
        name = str(dtype).removeprefix("torch.")
        tensors[f"{name}_a"] = values.to(dtype).reshape(3, 4)
        tensors[f"{name}_b"] = values.to(dtype).reshape(3, 4).t()
    assert_same(arrays(held(tensors)), tensors)


def test_weights_are_views_of_the_file():
    data = small()
    whole = np.frombuffer(data, np.uint8)
    got = arrays(data)
    assert all(np.shares_memory(array, whole) for array in got.values())
    assert all(np.shares_memory(a, whole) for a in arrays(memoryview(data)).values())
    assert_same(arrays(memoryview(bytearray(data))), {n: torch.tensor(a) for n, a in got.items()})


def test_tied_weights_are_one_array():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[1].weight = net[0].weight
    got = arrays(exported(net, torch.zeros(1, 3)))
    assert_same(got, dict(net.state_dict()))
    assert got["0.weight"] is got["1.weight"]


def test_big_endian():
    tensors = {
        "w": torch.randn(3, 4).t(),
        "h": torch.randn(3).bfloat16(),
        "b": torch.tensor([True, False]),
        "n": torch.tensor(7),
    }
    data = held(tensors)
    contents: dict[str, bytes | None] = {**members(data), "byteorder": b"big"}
    for at, width in enumerate((4, 2, 1, 8)):
        raw = np.frombuffer(contents[f"data/weights/weight_{at}"] or b"", f"u{width}")
        contents[f"data/weights/weight_{at}"] = raw.byteswap().tobytes()
    assert_same(arrays(packed(contents)), tensors)


@pytest.mark.parametrize("root", ["", "n/", "an odd name/", "abc/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_any_root_compression_and_alignment(root, method):
    contents: dict[str, bytes | None] = {**members(small()), "byteorder": None}
    got, expected = arrays(packed(contents, root, method)), arrays(small())
    assert_same(got, {name: torch.tensor(array) for name, array in expected.items()})


def test_large_file_is_fast_and_not_copied():
    net = torch.nn.Linear(5000, 5000, bias=False)
    data = exported(net, torch.zeros(1, 5000))
    tracemalloc.start()
    started = time.perf_counter()
    got = arrays(data)
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) > 100_000_000
    assert got["weight"].tobytes() == net.weight.detach().numpy().tobytes()
    assert peak < 1_000_000
    assert seconds < 1


def test_model_choice():
    contents = members(small())
    renamed = {name.replace("model", "net", 1): c for name, c in contents.items()}
    renamed = {
        ("models/net.json" if name == "nets/model.json" else name): c for name, c in renamed.items()
    }
    assert set(arrays(packed({**renamed}))) == set(arrays(small()))
    assert set(arrays(packed({**renamed, **contents}))) == set(arrays(small()))
    other = {"models/other.json": b"{}"}
    with pytest.raises(UnsupportedModelError, match=r"2 models \(net, other\) and none is called"):
        arrays(packed({**renamed, **other}))


def test_old_layouts_say_which_version_is_needed():
    old = {
        "version": b"8.7",
        "serialized_exported_program.json": b"{}",
        "serialized_state_dict.pt": b"",
        "serialized_constants.pt": b"",
    }
    with pytest.raises(UnsupportedModelError, match=r"PyTorch 2\.7 or older.* PyTorch 2\.9 or"):
        read_pt2(packed({**old}, root=""), "net.pt2")
    contents: dict[str, bytes | None] = {**members(small()), WEIGHTS: None}
    contents["data/weights/model.pt"] = b""
    with pytest.raises(UnsupportedModelError, match=r"by PyTorch 2\.8, which .* PyTorch 2\.9 or"):
        read_pt2(packed(contents), "net.pt2")


def test_compiled_package():
    package = {"archive_format": b"pt2", "data/aotinductor/model/x.so": b"\x7fELF"}
    with pytest.raises(UnsupportedModelError, match="AOTInductor"):
        read_pt2(packed({**package}), "net.pt2")


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"archive_format": None}, CheckpointError, "no archive of torch.export"),
        ({"archive_format": b"pt3"}, CheckpointError, "archive format pt3"),
        ({"archive_version": b"1"}, UnsupportedModelError, "archive version 1"),
        ({"byteorder": b"middle"}, CheckpointError, "byte order middle"),
        ({MODEL: None}, CheckpointError, "no model under models/"),
        ({WEIGHTS: None}, CheckpointError, "no member .*weights_config"),
        ({"data/constants/model_constants_config.json": None}, CheckpointError, "no member"),
        ({"data/weights/weight_0": None}, CheckpointError, "no member .*weight_0"),
        ({"data/weights/weight_0": b""}, CheckpointError, "meta device"),
        ({"data/weights/weight_0": b"abc"}, CheckpointError, "reaches element 107 of a storage"),
        ({MODEL: b"[]"}, CheckpointError, "no JSON object"),
        ({MODEL: b"{"}, CheckpointError, "no valid JSON"),
        ({MODEL: b"\xff"}, CheckpointError, "no valid JSON"),
        ({MODEL: b'{"a": 1, "a": 2}'}, CheckpointError, "a repeated key"),
        ({MODEL: b"[" * 200_000}, UnsafeInputError, "nested too deeply"),
        ({MODEL: b'{"a":' * 200_000}, UnsafeInputError, "nested too deeply"),
        ({MODEL: b'{"a": ' + b"9" * 5000 + b"}"}, CheckpointError, "no valid JSON"),
        ({MODEL: b"{}" + b" " * (64 << 20)}, UnsafeInputError, "bytes of JSON"),
        ({WEIGHTS: b"{}"}, CheckpointError, "'config' is missing"),
        ({WEIGHTS: b'{"config": []}'}, CheckpointError, "'config' is .*, not an object"),
    ],
)
def test_members_that_are_damaged(changes, error, text):
    with pytest.raises(error, match=text):
        read_pt2(changed(small(), changes), "net.pt2")


def tensor_meta(**fields: Any) -> Change:
    """Changes what the file says about the tensor `0.weight`."""

    def change(record: Any) -> None:
        record["config"]["0.weight"]["tensor_meta"].update(fields)

    return change


def payload(**fields: Any) -> Change:
    """Changes where the file says the tensor `0.weight` is."""

    def change(record: Any) -> None:
        record["config"]["0.weight"].update(fields)

    return change


def ints(*values: Any) -> list[Any]:
    return [{"as_int": value} for value in values]


HUGE = 2**60


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (tensor_meta(sizes=ints(HUGE, 3, 3, 3)), CheckpointError, "claims shape"),
        (tensor_meta(sizes=ints(2**40, 1, 1, 1)), UnsafeInputError, "exceed the file many"),
        (
            tensor_meta(sizes=ints(2**40, 1, 1, 1), strides=ints(0, 0, 0, 0)),
            UnsafeInputError,
            "exceed the file many",
        ),
        (tensor_meta(sizes=ints(0, HUGE, 3, 3)), CheckpointError, "claims shape"),
        (tensor_meta(sizes=ints(5, 3, 3, 3)), CheckpointError, "reaches element 134"),
        (tensor_meta(sizes=ints(-4, 3, 3, 3)), CheckpointError, "a size, stride or offset is -4"),
        (tensor_meta(strides=ints(-27, 9, 3, 1)), CheckpointError, "offset is -27"),
        (tensor_meta(strides=ints(HUGE, 9, 3, 1)), CheckpointError, "reaches element"),
        (tensor_meta(strides=ints(27, 9, 3)), CheckpointError, "4 sizes and 3 strides"),
        (tensor_meta(sizes=ints(*[1] * 65), strides=ints(*[1] * 65)), CheckpointError, "65 sizes"),
        (tensor_meta(storage_offset={"as_int": 1}), CheckpointError, "reaches element 108"),
        (tensor_meta(storage_offset={"as_int": HUGE}), CheckpointError, "reaches element"),
        (tensor_meta(storage_offset={"as_int": True}), CheckpointError, "not an integer"),
        (tensor_meta(storage_offset=3), CheckpointError, "not an object"),
        (tensor_meta(sizes=[{"as_expr": {}}] * 4), CheckpointError, "size"),
        (tensor_meta(sizes=[{}] * 4), CheckpointError, "0 tags"),
        (tensor_meta(sizes=None), CheckpointError, "not a list"),
        (tensor_meta(dtype=8), CheckpointError, "reaches element 107 of a storage of 54"),
        (tensor_meta(dtype=10), UnsupportedModelError, "type complex64"),
        (tensor_meta(dtype=29), UnsupportedModelError, "type float8_e4m3fn"),
        (tensor_meta(dtype=99), UnsupportedModelError, "type number 99"),
        (tensor_meta(dtype=7.0), CheckpointError, "not an integer"),
        (tensor_meta(layout=1), UnsupportedModelError, "sparse layout 1"),
        (payload(tensor_meta=None), CheckpointError, "not an object"),
        (payload(path_name="../x"), UnsafeInputError, r"odd path \.\./x"),
        (payload(path_name="/etc/passwd"), UnsafeInputError, "odd path"),
        (payload(path_name="..\\x"), UnsafeInputError, "odd path"),
        (payload(path_name=""), UnsafeInputError, "odd path"),
        (payload(path_name="weight_99"), CheckpointError, "no member"),
        (payload(path_name=3), CheckpointError, "not text"),
        (payload(use_pickle=1), CheckpointError, "not a boolean"),
        (lambda r: r["config"].pop("0.weight"), CheckpointError, "does not list it"),
        (lambda r: r["config"].update({"0.weight": 1}), CheckpointError, "not an object"),
    ],
)
def test_descriptions_that_lie(change, error, text):
    data = edited(small(), WEIGHTS, change)
    tracemalloc.start()
    with pytest.raises(error, match=text):
        read_pt2(data, "net.pt2")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_pickled_weights_are_refused_unopened(tmp_path):
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Canary(canary), 2)
    data = edited(small(), WEIGHTS, payload(use_pickle=True))
    data = changed(data, {"data/weights/weight_0": bomb})
    with pytest.raises(UnsafeInputError, match=r"0\.weight is stored as a pickle.*torch\.export"):
        read_pt2(data, "net.pt2")
    assert not canary.exists()


def test_pickles_that_no_weight_needs_are_not_opened(tmp_path):
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Canary(canary), 2)

    def extra(record: Any) -> None:
        record["config"]["unused"] = {"path_name": "weight_9", "is_param": False}
        record["config"]["unused"] |= {"use_pickle": True, "tensor_meta": None}

    data = edited(small(), WEIGHTS, extra)
    parts = ("data/sample_inputs/model.pt", "data/weights/weight_9", "data/constants/opaque_obj_0")
    data = changed(data, dict.fromkeys(parts, bomb))
    assert set(arrays(data)) == set(arrays(small()))
    assert not canary.exists()


def test_truncated_anywhere():
    data = small()
    for percent in range(0, 100, 2):
        with pytest.raises(CheckpointError):
            read_pt2(data[: len(data) * percent // 100], "net.pt2")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_raise_only_typed_errors(source):
    data = bytearray(small())
    for _ in range(source.draw(st.integers(1, 3))):
        at = source.draw(st.integers(0, len(data) - 1))
        data[at] = source.draw(st.integers(0, 255))
    with contextlib.suppress(DfqError):
        read_pt2(bytes(data), "net.pt2")


def test_repeated_and_escaping_members():
    twice = io.BytesIO(small())
    with warnings.catch_warnings(), zipfile.ZipFile(twice, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(UnsafeInputError, match="same name"):
        read_pt2(twice.getvalue(), "net.pt2")
    with pytest.raises(UnsafeInputError, match="outside its folder"):
        read_pt2(changed(small(), {"../../x": b""}), "net.pt2")


def test_zip_bombs():
    contents = {**members(small()), MODEL: b"[" + b" " * (50 << 20)}
    with pytest.raises(UnsafeInputError, match="zip bomb"):
        read_pt2(packed({**contents}, method=zipfile.ZIP_DEFLATED), "net.pt2")


def test_hostile_names_are_escaped():
    def change(record: Any) -> None:
        specs = record["graph_module"]["signature"]["input_specs"]
        specs[0]["parameter"]["parameter_name"] = "\x1b[31m<script>\n"

    with pytest.raises(CheckpointError, match=r"tensor \\x1b\[31m<script>\\n"):
        read_pt2(edited(small(), MODEL, change), "net.pt2")


def test_constants_and_weights_are_found_in_either_list():
    data = small()
    contents = members(data)
    weights = json.loads(contents[WEIGHTS])
    moved = {"config": {"1.running_mean": weights["config"].pop("1.running_mean")}}
    path = moved["config"]["1.running_mean"]["path_name"]
    changes = {
        WEIGHTS: json.dumps(weights).encode(),
        "data/constants/model_constants_config.json": json.dumps(moved).encode(),
        f"data/constants/{path}": contents[f"data/weights/{path}"],
    }
    archive = Pt2Archive(changed(data, {**changes}), "net.pt2")
    assert archive.weight("1.running_mean").shape == (4,)
    assert archive.constant("1.running_mean") is archive.weight("1.running_mean")
    assert struct.unpack("<4f", archive.constant("1.running_mean").tobytes()) == (0.0,) * 4
