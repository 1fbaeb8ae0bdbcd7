"""ONNX files as bytes: tensors against `onnx.numpy_helper`, and hostile bytes and external data."""

import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dfq_jax.errors import CheckpointError, DfqError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.frontends import onnx_file
from dfq_jax.io.frontends.onnx_file import DTYPES, ExternalData, OnnxFile

VALUES = np.array([[0, 1, 1], [1, 0, 1]])
WEIGHT = np.arange(6, dtype=np.float32)


def pack(*tensors: TensorProto) -> bytes:
    """A model that holds these."""
    graph = helper.make_graph([], "g", [], [], list(tensors))
    return helper.make_model(graph).SerializeToString()


def read(tensor: TensorProto, folder: Path | None = None) -> np.ndarray:
    """The tensor, after a way through a file."""
    file = OnnxFile(pack(tensor), "net.onnx", folder)
    return file.array(file.model.graph.initializer[0])


def raw(data: bytes = bytes(8), dims: tuple[int, ...] = (2,), kind: int = TensorProto.FLOAT):
    return TensorProto(name="w", data_type=kind, dims=dims, raw_data=data)


def field(number: int, content: bytes) -> bytes:
    """A field in wire format, as bytes."""
    size = bytearray()
    length = len(content)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes((number << 3 | 2,)) + bytes((*size, length)) + content


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("as_raw", [True, False])
def test_every_type_is_read_as_onnx_reads_it(kind, as_raw):
    dtype = np.dtype(DTYPES[kind][0])
    values = VALUES.astype(dtype)
    data = values.tobytes() if as_raw else values
    got = read(helper.make_tensor("w", kind, values.shape, data, raw=as_raw))
    assert (got.dtype, got.shape) == (dtype, values.shape)
    assert got.tobytes() == values.tobytes()
    assert not got.flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38], np.float32),
        np.array([np.nan, -np.inf, 6e-8], np.float16),
        np.array([2.5, -1e30], ml_dtypes.bfloat16),
        np.array([np.iinfo(np.int64).min, np.iinfo(np.int64).max]),
        np.array([2**64 - 1], np.uint64),
        np.array([2**32 - 1], np.uint32),
        np.array([-128, 127], np.int8),
        np.array(2.5, np.float32),
        np.zeros((0, 3), np.float32),
        np.zeros((2, 0), np.int64),
    ],
)
@pytest.mark.parametrize("as_raw", [True, False])
def test_extreme_values_and_shapes(array, as_raw):
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    data = array.tobytes() if as_raw else array
    tensor = helper.make_tensor("w", kind, array.shape, data, raw=as_raw)
    got = read(tensor)
    expected = numpy_helper.to_array(tensor)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.tobytes() == expected.tobytes()


def test_raw_data_is_a_view_into_the_file_and_costs_nothing():
    data = pack(numpy_helper.from_array(np.ones(4_000_000, np.float32), "w"))
    tracemalloc.start()
    file = OnnxFile(data, "net.onnx", None)
    array = file.array(file.model.graph.initializer[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.shares_memory(np.frombuffer(data, np.uint8), array)
    assert peak < 100_000
    assert file.model.ByteSize() < 200


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (raw(dims=(2**60,)), "claims shape"),
        (raw(dims=(2**40, 2**40)), "claims shape"),
        (raw(b"", dims=(0, 2**60)), "claims shape"),
        (raw(dims=(-2,)), r"claims shape \[-2\]"),
        (raw(dims=(-1, -2)), "claims shape"),
        (raw(dims=(1,) * 40), "claims shape"),
        (raw(dims=(2**40,)), "needs 4398046511104 bytes, found 8"),
        (raw(dims=(3,)), r"FLOAT \[3\] needs 12 bytes, found 8"),
        (raw(dims=(1,)), "needs 4 bytes, found 8"),
        (raw(dims=()), "needs 4 bytes, found 8"),
        (raw(b"\0\2", kind=TensorProto.BOOL), "truth values"),
        (TensorProto(name="w", data_type=1, dims=(3,), float_data=(1, 2)), "needs 3 values.*has 2"),
        (TensorProto(name="w", data_type=1, dims=(2**40,)), "float_data has 0"),
        (TensorProto(name="w", data_type=1, dims=(1,), int32_data=(1,)), "float_data has 0"),
        (TensorProto(name="w", data_type=1, raw_data=b"1234", float_data=(1,)), "several places"),
        (TensorProto(name="w", data_type=1, float_data=(1,), int64_data=(1,)), "several places"),
        (TensorProto(name="w", data_type=1, float_data=(1,), segment={"begin": 0}), "several"),
        (TensorProto(name="w", data_type=3, dims=(1,), int32_data=(128,)), "outside its type"),
        (TensorProto(name="w", data_type=2, dims=(1,), int32_data=(-1,)), "outside its type"),
        (TensorProto(name="w", data_type=10, dims=(1,), int32_data=(65536,)), "outside its type"),
        (TensorProto(name="w", data_type=9, dims=(1,), int32_data=(2,)), "outside its type"),
        (TensorProto(name="w", data_type=12, dims=(1,), uint64_data=(2**32,)), "outside its type"),
    ],
)
def test_tensors_that_contradict_themselves_are_refused(tensor, message):
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=rf"net\.onnx is damaged: tensor w .*{message}"):
        read(tensor)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("kind", "name", "remedy"),
    [
        (TensorProto.STRING, "STRING", "are FLOAT"),
        (TensorProto.COMPLEX64, "COMPLEX64", "are FLOAT"),
        (TensorProto.INT4, "INT4", "give the float network"),
        (TensorProto.UINT4, "UINT4", "give the float network"),
        (TensorProto.FLOAT8E4M3FN, "FLOAT8E4M3FN", "are FLOAT"),
        (0, "UNDEFINED", "are FLOAT"),
        (999, "999", "are FLOAT"),
    ],
)
def test_unsupported_types_are_named(kind, name, remedy):
    with pytest.raises(UnsupportedModelError, match=f"tensor w has type {name}, .*{remedy}"):
        read(TensorProto(name="w", data_type=kind, dims=(1,)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x08", "number at byte 1 has no end"),
        (b"\x08" + b"\xff" * 20, "number at byte 1 has no end"),
        (b"\x0b", "byte 0 starts no field"),
        (b"\x3a\x05\x00", "field at byte 0 is cut off .4 bytes short"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "cut off"),
        (b"\x09\x00", "cut off"),
        (field(7, field(2, b"\xff\xfe")), r"onnx.GraphProto.name is no text"),
        (b"\x00\x00", "not a protobuf message"),
    ],
)
def test_bytes_that_are_no_protobuf(data, message):
    with pytest.raises(CheckpointError, match=rf"net\.onnx is damaged: .*{message}"):
        OnnxFile(data, "net.onnx", None)


def test_deep_nesting_is_refused():
    data = b""
    for _ in range(2000):
        data = field(1, field(5, field(6, data)))
    with pytest.raises(UnsafeInputError, match="over 50 levels deep"):
        OnnxFile(field(7, data), "net.onnx", None)


def test_many_fields_are_refused(monkeypatch):
    monkeypatch.setattr(onnx_file, "MAX_FIELDS", 5000)
    OnnxFile(field(7, b"\x0a\x00" * 4999), "net.onnx", None)
    for data in (field(7, b"\x0a\x00" * 5000), field(7, field(5, b"\x08\x01" * 5000))):
        with pytest.raises(UnsafeInputError, match="over 5000 fields; refused"):
            OnnxFile(data, "net.onnx", None)


def test_numbers_that_would_expand_are_refused():
    data = field(7, field(5, field(7, bytes((32 << 20) + 1))))
    with pytest.raises(UnsafeInputError, match=r"over 32 MiB of numbers one by one.*raw_data"):
        OnnxFile(data, "net.onnx", None)


def test_files_beyond_protobuf_are_refused(monkeypatch):
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 10)
    with pytest.raises(UnsupportedModelError, match=r"has 11 bytes.*ends at 2 GiB.*external_data"):
        OnnxFile(bytes(11), "net.onnx", None)


def test_fields_given_twice_merge_as_in_protobuf():
    twice = raw().SerializeToString() + raw(bytes(range(8))).SerializeToString()[-10:]
    data = field(7, field(5, twice)) + field(7, field(5, raw().SerializeToString()))
    file = OnnxFile(data, "net.onnx", None)
    expected = onnx.load_model_from_string(data).graph.initializer
    assert len(expected) == 2
    for mine, theirs in zip(file.model.graph.initializer, expected, strict=True):
        assert file.array(mine).tobytes() == theirs.raw_data


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_files_end_in_tensors_or_a_typed_error(data):
    blob = bytearray(pack(raw(), numpy_helper.from_array(VALUES, "v")))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        file = OnnxFile(bytes(blob), "x", None)
        for tensor in file.model.graph.initializer:
            file.array(tensor)
    except DfqError:
        pass


def external(**entry: str) -> TensorProto:
    """A tensor of `WEIGHT`'s shape in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=WEIGHT.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entry.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's folder inside a folder with secrets."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    (folder / "sub" / "w.bin").write_bytes(bytes(8) + WEIGHT.tobytes() + bytes(4))
    return folder


@pytest.mark.parametrize(
    "entry",
    [
        {"location": "w.bin"},
        {"location": "./w.bin", "offset": "0", "length": "24"},
        {"location": "sub/w.bin", "offset": "8", "length": "24", "checksum": "x"},
        {"location": "sub//w.bin", "offset": "8"},
    ],
)
def test_external_data_is_read(folder, entry):
    got = read(external(**entry), folder)
    assert got.tolist() == WEIGHT.tolist()
    assert not got.flags.writeable


def test_models_saved_by_onnx_with_external_data(folder):
    arrays = {f"w{i}": np.full((64, 3 + i), i, np.float32) for i in range(3)}
    tensors = [numpy_helper.from_array(a, name) for name, a in arrays.items()]
    model = onnx.load_model_from_string(pack(*tensors))
    onnx.save_model(model, folder / "net.onnx", save_as_external_data=True, size_threshold=0)
    file = OnnxFile((folder / "net.onnx").read_bytes(), "net.onnx", folder)
    for tensor in file.model.graph.initializer:
        assert tensor.data_location == TensorProto.EXTERNAL
        assert (file.array(tensor) == arrays[tensor.name]).all()


@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "../../etc/passwd",
        "sub/../../secret",
        "sub/..",
        "..",
        "/etc/passwd",
        "//x",
        r"..\secret",
        r"sub\w.bin",
        r"\\host\share",
        r"C:\secret",
        "C:secret",
    ],
)
def test_external_data_outside_the_folder_is_never_opened(folder, location, monkeypatch):
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(UnsafeInputError, match="outside the model's folder; nothing was opened"):
        read(external(location=location), folder)


@pytest.mark.parametrize("location", ["link", "loop/w.bin", "dangling"])
def test_external_data_behind_a_symbolic_link_is_never_opened(folder, location, monkeypatch):
    (folder / "link").symlink_to("w.bin")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling").symlink_to("nowhere")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(UnsafeInputError, match="is a symbolic link; nothing was opened"):
        read(external(location=location), folder)


def test_external_data_with_a_hard_link_is_never_opened(folder, monkeypatch):
    os.link(folder.parent / "secret", folder / "hard.bin")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(UnsafeInputError, match=r"second hard link.*nothing was opened"):
        read(external(location="hard.bin"), folder)


def test_external_data_in_a_pipe_or_folder_is_never_opened(folder):
    os.mkfifo(folder / "pipe")
    for location in ("pipe", "sub"):
        with pytest.raises(UnsafeInputError, match="no regular file"):
            read(external(location=location), folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "names no file"),
        ({"location": ""}, "names no file"),
        ({"location": "./"}, "names no file"),
        ({"location": "a\0b"}, "names no file"),
        ({"location": "missing.bin"}, "cannot be found.*Keep that file in the folder"),
        ({"location": "w.bin/x"}, "cannot be found"),
        ({"location": "x" * 5000}, "cannot be found"),
        ({"location": "w.bin", "offset": "4"}, r"at 4:28, but that file has 24 bytes \(cut short"),
        ({"location": "w.bin", "offset": "9" * 18}, "but that file has 24 bytes"),
        ({"location": "w.bin", "offset": "-4"}, "offset '-4', which is no count"),
        ({"location": "w.bin", "offset": "1e3"}, "is no count"),
        ({"location": "w.bin", "offset": "9" * 5000}, "is no count"),
        ({"location": "w.bin", "offset": "٣"}, "is no count"),
        ({"location": "w.bin", "length": "-1"}, "length '-1', which is no count"),
        ({"location": "w.bin", "length": "20"}, "with length 20, its shape needs 24"),
        ({"location": "w.bin", "length": "28"}, "with length 28, its shape needs 24"),
    ],
)
def test_external_data_that_is_not_there(folder, entry, message):
    with pytest.raises(CheckpointError, match=rf"net\.onnx: tensor w lies in .*{message}"):
        read(external(**entry), folder)


def test_huge_external_tensor_is_refused_before_it_is_read(folder):
    tensor = external(location="w.bin")
    tensor.dims[:] = [2**45]
    with pytest.raises(CheckpointError, match="but that file has 24 bytes"):
        read(tensor, folder)


def test_external_data_needs_a_folder():
    with pytest.raises(CheckpointError, match="came without a folder"):
        read(external(location="w.bin"))


def test_external_data_cannot_be_multiplied_by_overlaps(folder):
    data = ExternalData(folder, "net.onnx")
    first = data.read({"location": "w.bin", "length": "20"}, "tensor a", 20)
    again = data.read({"location": "./w.bin"}, "tensor b", 20)
    assert again is first
    with pytest.raises(UnsafeInputError, match=r"tensor c.*tensors overlap"):
        data.read({"location": "w.bin", "offset": "4"}, "tensor c", 20)


def test_external_data_is_not_exchanged_behind_our_back(folder, monkeypatch):
    genuine = os.open

    def exchange(path, *rest):
        os.rename(folder / "sub" / "w.bin", folder / "w.bin")
        return genuine(path, *rest)

    monkeypatch.setattr(os, "open", exchange)
    with pytest.raises(UnsafeInputError, match="exchanged while it was read"):
        read(external(location="w.bin"), folder)


def test_unreadable_external_data(folder, monkeypatch):
    def fail(*_):
        raise PermissionError("no")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(CheckpointError, match="cannot be read: no"):
        read(external(location="w.bin"), folder)
