"""The safetensors format: an 8-byte length, a JSON header, and tensors back to back after it."""

import json
import math
from typing import Any

import ml_dtypes
import numpy as np

from dfq_jax.errors import CheckpointError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.readers.pickle_policy import show

MAX_HEADER = 16 << 20  # more than 100,000 tensors
MAX_VALUES = 1_000_000  # objects and lists in the header, three for each tensor
MAX_RANK = 32
MAX_SIZE = 1 << 48
DTYPES: dict[str, type] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
TensorEntry = tuple[str, np.dtype, tuple[int, ...], int, int]  # name, dtype, shape, begin, end


def read_safetensors(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Reads all tensors of a safetensors file.

    Args:
      data: the whole file.
      where: the file, for messages.

    Returns:
      Read-only arrays by name, in header order.

    Raises:
      CheckpointError: if the header is damaged, or its offsets overlap, leave holes, reach outside
        the file or contradict shape and type.
      UnsafeInputError: if the header is absurdly large.
      UnsupportedModelError: if a tensor has a type that is not supported.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise CheckpointError(
            f"{where} is damaged: its header should have {length} bytes, the file has {len(data)} "
            "in all (cut short?). Download or save it again."
        )
    if length > MAX_HEADER:
        raise UnsafeInputError(f"{where} has a header of {length} bytes; refused.")
    header = _parse_header(data[8 : 8 + length], where)
    entries = [_entry(name, value, where) for name, value in header.items()]
    _check_layout(entries, len(data) - 8 - length, where)
    body = memoryview(data)[8 + length :]
    return {name: _array(body[a:b], dtype, shape) for name, dtype, shape, a, b in entries}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is given twice")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} where a number should be")


def _parse_header(text: bytes, where: str) -> dict[str, Any]:
    if text.count(b"{") + text.count(b"[") > MAX_VALUES:
        raise UnsafeInputError(f"{where} has a header of over {MAX_VALUES:,} values; refused.")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"its header is no valid JSON: {show(error)}") from error
    if type(header) is not dict:
        raise _damaged(where, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(v) is not str for v in metadata.values()):
        raise _damaged(where, "its __metadata__ maps text to something other than text")
    return header


def _entry(name: str, value: Any, where: str) -> TensorEntry:
    label = f"tensor {show(name)}"
    if type(value) is not dict or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(where, f"{label} needs exactly dtype, shape and data_offsets")
    shape, offsets = value["shape"], value["data_offsets"]
    if type(shape) is not list or not all(map(_is_count, shape)) or len(shape) > MAX_RANK:
        raise _damaged(where, f"{label} has shape {show(shape)}")
    if type(offsets) is not list or not all(map(_is_count, offsets)) or len(offsets) != 2:
        raise _damaged(where, f"{label} has data_offsets {show(offsets)}")
    kind = value["dtype"]
    if type(kind) is not str or kind not in DTYPES:
        raise UnsupportedModelError(
            f"{where}: {label} has type {show(kind)}, which is not supported; "
            f"supported are {', '.join(DTYPES)}."
        )
    dtype = np.dtype(DTYPES[kind])
    if math.prod(max(n, 1) for n in shape) > MAX_SIZE:
        raise _damaged(where, f"{label} claims shape {shape}")
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise _damaged(
            where, f"{label} of {kind}{shape} needs {needed} bytes, data_offsets give {offsets}"
        )
    return name, dtype, tuple(shape), offsets[0], offsets[1]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _check_layout(entries: list[TensorEntry], size: int, where: str) -> None:
    position = 0
    for name, _, _, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        if begin != position:
            problem = "overlaps the one before it" if begin < position else "leaves a hole"
            raise _damaged(where, f"tensor {show(name)} at byte {begin} {problem} ({position})")
        position = end
    if position != size:
        raise _damaged(where, f"its tensors fill {position} bytes, the file holds {size}")


def _array(data: memoryview, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    bits = np.frombuffer(data, f"<u{dtype.itemsize}").astype(f"u{dtype.itemsize}").reshape(shape)
    array = bits != 0 if dtype == np.bool_ else bits.view(dtype)
    array.setflags(write=False)
    return array


def _damaged(where: str, detail: str) -> CheckpointError:
    return CheckpointError(f"{where} is damaged: {detail}. Download or save it again.")


def looks_like_safetensors(data: bytes) -> bool:
    """Whether the bytes start as this format does: a sane length, then a JSON object."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 1 << 40
