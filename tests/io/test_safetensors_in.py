"""The safetensors parser against the `safetensors` package, and against hostile headers."""

import contextlib
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from dfq_jax.errors import CheckpointError, DfqError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.readers.safetensors import MAX_HEADER, read_safetensors

NUMPY_TYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]


def build(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def sample() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {f"t.{kind}": rng.integers(0, 2, (3, 4)).astype(kind) for kind in NUMPY_TYPES}
    tensors["scalar"] = np.array(2.5, np.float32)
    tensors["empty"] = np.zeros((0, 3), np.float32)
    tensors["bf16"] = rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16)
    return tensors


def test_reads_what_the_package_writes():
    tensors = sample()
    result = read_safetensors(save(tensors, {"format": "pt"}), "net.safetensors")
    assert set(result) == set(tensors)
    for name, expected in tensors.items():
        got = result[name]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
        assert got.tobytes() == expected.tobytes(), name
        assert got.flags.c_contiguous
        assert got.flags.aligned
        assert not got.flags.writeable


def test_header_may_end_in_spaces_and_hold_tensors_in_any_order():
    header = {"b": entry([1], [8, 12]), "a": entry()}
    data = build(json.dumps(header).encode() + b"   ", np.arange(3, dtype="<f4").tobytes())
    result = read_safetensors(data, "x")
    assert list(result) == ["b", "a"]
    assert result["b"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry(), "b": entry([2], [4, 12])}, 12, "'?b'? at byte 4 overlaps"),
        ({"a": entry(), "b": entry()}, 8, "overlaps"),
        ({"a": entry(), "b": entry([2], [12, 20])}, 20, "leaves a hole"),
        ({"a": entry([2], [4, 12])}, 12, "leaves a hole"),
        ({"a": entry()}, 12, "fill 8 bytes, the file holds 12"),
        ({"a": entry()}, 4, "fill 8 bytes, the file holds 4"),
        ({"a": entry([3])}, 8, "needs 12 bytes"),
        ({"a": entry([2], [8, 0])}, 8, "needs 8 bytes"),
        ({"a": entry([-2])}, 8, r"shape \[-2\]"),
        ({"a": entry([True, 2])}, 8, "shape"),
        ({"a": entry([2.0])}, 8, "shape"),
        ({"a": entry([float("nan")])}, 8, "NaN where a number should be"),
        ({"a": entry([float("inf")])}, 8, "Infinity where a number should be"),
        ({"a": entry([2**60])}, 8, "shape"),
        ({"a": entry([2**40, 2**40])}, 8, "claims shape"),
        ({"a": entry([0, 2**40, 2**40], [0, 0])}, 0, "claims shape"),
        ({"a": entry([1] * 40, [0, 4])}, 4, "shape"),
        ({"a": entry("2")}, 8, "shape"),
        ({"a": entry([2], [0])}, 8, "data_offsets"),
        ({"a": entry([2], [0, 8, 16])}, 8, "data_offsets"),
        ({"a": entry([2], [-8, 0])}, 8, "data_offsets"),
        ({"a": entry([2], [False, 8])}, 8, "data_offsets"),
        ({"a": entry([2], None)}, 8, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "needs exactly"),
        ({"a": {**entry(), "more": 1}}, 8, "needs exactly"),
        ({"a": 5}, 0, "needs exactly"),
        ([1], 0, "no JSON object"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        ({"__metadata__": []}, 0, "__metadata__"),
        (b'{"a": 1, "a": 2}', 0, "given twice"),
        (b"{bad", 0, "no valid JSON"),
        (b'{"a": "\xff"}', 0, "no valid JSON"),
        (b"[" * 100_000, 0, "no valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", 0, "no valid JSON"),
    ],
)
def test_bad_headers_are_refused(header, size, message):
    with pytest.raises(CheckpointError, match=rf"net\.safetensors is damaged: .*{message}"):
        read_safetensors(build(header, bytes(size)), "net.safetensors")


@pytest.mark.parametrize("kind", ["F8_E4M3", "C64", "F4", "x", 3])
def test_unsupported_types_are_named(kind):
    with pytest.raises(UnsupportedModelError, match=f"tensor a has type {kind}.*supported are F64"):
        read_safetensors(build({"a": entry(dtype=kind)}, bytes(8)), "x")


def test_header_length_is_checked_before_it_is_used():
    with pytest.raises(CheckpointError, match=r"should have 1152921504606846976 bytes"):
        read_safetensors(build(b"{}", length=2**60), "x")
    with pytest.raises(UnsafeInputError, match="header of"):
        read_safetensors(build(b" " * (MAX_HEADER + 1)), "x")


def test_every_truncation_is_refused():
    data = save(sample())
    for percent in range(100):
        with pytest.raises(CheckpointError, match="x is damaged"):
            read_safetensors(data[: len(data) * percent // 100], "x")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_files_end_in_tensors_or_a_typed_error(data):
    blob = bytearray(save({"w": np.arange(6, dtype=np.float32), "b": np.zeros(2, np.int8)}))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DfqError):
        read_safetensors(bytes(blob), "x")
