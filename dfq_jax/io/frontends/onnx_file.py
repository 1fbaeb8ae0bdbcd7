"""ONNX files as bytes from a stranger: protobuf within bounds, tensors checked before they exist.

The bytes are walked once before protobuf sees them. The walk bounds what parsing costs, and takes
the raw data of all tensors out of the message: tensors are read-only views into the file.
"""

import math
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from onnx import TensorProto

from dfq_jax.errors import CheckpointError, ResourceError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.readers.pickle_policy import show

MAX_BYTES = (1 << 31) - 1  # of a protobuf message
MAX_FIELDS = 1 << 18  # each costs protobuf up to 400 bytes; networks have some 10,000
MAX_DEPTH = 50
MAX_PACKED = 32 << 20  # bytes of numbers of variable length, which protobuf expands up to 16 times
MAX_RANK = 32
MAX_SIZE = 1 << 48
AGAIN = "Download or export it again."
NUMBERS = frozenset(
    getattr(FieldDescriptor, f"TYPE_{sign}INT{bits}")
    for sign in ("", "U", "S")
    for bits in (32, 64)
) | {FieldDescriptor.TYPE_BOOL, FieldDescriptor.TYPE_ENUM}
WIDTHS = {1: 8, 5: 4}  # of fixed-size fields, by wire type
DTYPES: dict[int, tuple[type, str, type]] = {  # of the values; typed field, bits in it
    TensorProto.FLOAT: (np.float32, "float_data", np.float32),
    TensorProto.DOUBLE: (np.float64, "double_data", np.float64),
    TensorProto.FLOAT16: (np.float16, "int32_data", np.uint16),
    TensorProto.BFLOAT16: (ml_dtypes.bfloat16, "int32_data", np.uint16),
    TensorProto.INT8: (np.int8, "int32_data", np.int8),
    TensorProto.INT16: (np.int16, "int32_data", np.int16),
    TensorProto.INT32: (np.int32, "int32_data", np.int32),
    TensorProto.INT64: (np.int64, "int64_data", np.int64),
    TensorProto.UINT8: (np.uint8, "int32_data", np.uint8),
    TensorProto.UINT16: (np.uint16, "int32_data", np.uint16),
    TensorProto.UINT32: (np.uint32, "uint64_data", np.uint32),
    TensorProto.UINT64: (np.uint64, "uint64_data", np.uint64),
    TensorProto.BOOL: (np.bool_, "int32_data", np.bool_),
}
FIELDS: dict[str, type] = {
    "float_data": np.float32,
    "double_data": np.float64,
    "int32_data": np.int32,
    "int64_data": np.int64,
    "uint64_data": np.uint64,
}


def type_name(number: int) -> str:
    """Name of an ONNX element type."""
    known = number in TensorProto.DataType.values()
    return TensorProto.DataType.Name(number) if known else str(number)


class OnnxFile:
    """A parsed file.

    Attributes:
      model: the message, less the raw data of its tensors; read those with `array`.
      where: the file, for messages.
    """

    def __init__(self, data: bytes, where: str, folder: Path | None) -> None:
        """Parses within bounds.

        Args:
          data: the whole file.
          where: the file, for messages.
          folder: where external data may lie; None forbids it.

        Raises:
          CheckpointError: if the bytes are damaged.
          UnsafeInputError: if parsing them would exhaust the machine.
          UnsupportedModelError: if the file is larger than the format allows.
        """
        if len(data) > MAX_BYTES:
            raise UnsupportedModelError(
                f"{where} has {len(data)} bytes; a single ONNX file ends at 2 GiB. Keep the "
                "weights beside it: onnx.save_model(model, path, save_as_external_data=True)."
            )
        self.where = where
        self.model = onnx.ModelProto()
        self._data = memoryview(data)
        self._external = None if folder is None else ExternalData(folder, where)
        slim = Walk(self._data, where).message(0, len(data), onnx.ModelProto.DESCRIPTOR, 0)
        try:
            self.model.ParseFromString(slim)
        except DecodeError as error:
            raise _damaged(where, f"not a protobuf message: {show(error)}") from error

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The values of a tensor of this file.

        Args:
          tensor: an initialiser or attribute of `model`.

        Returns:
          A read-only array, a view into the file where its values are stored in one piece.

        Raises:
          CheckpointError: if shape, type and data contradict each other, or data is missing.
          UnsafeInputError: if its data lies outside the folder, or behind a link.
          UnsupportedModelError: if its type is not supported.
        """
        label = f"tensor {show(tensor.name)}"
        if tensor.data_type not in DTYPES:
            kind, remedy = type_name(tensor.data_type), "give the float network it came from"
            if not kind.endswith(("INT4", "INT2")):
                remedy = f"supported are {', '.join(map(type_name, DTYPES))}"
            raise UnsupportedModelError(
                f"{self.where}: {label} has type {kind}, which is not supported; {remedy}."
            )
        dtype = np.dtype(DTYPES[tensor.data_type][0])
        shape = tuple(tensor.dims)
        sizes = [max(n, 1) for n in shape]
        if len(shape) > MAX_RANK or min(shape, default=0) < 0 or math.prod(sizes) > MAX_SIZE:
            raise _damaged(self.where, f"{label} claims shape {show(list(shape))}")
        count = math.prod(shape)
        fields = [name for name in FIELDS if len(getattr(tensor, name))]
        if len(fields) + tensor.HasField("raw_data") > 1 or tensor.HasField("segment"):
            raise _damaged(self.where, f"{label} stores its values in several places")
        if tensor.data_location == TensorProto.EXTERNAL:
            data = self._external_bytes(tensor, label, count * dtype.itemsize)
        elif tensor.HasField("raw_data"):
            start, length = struct.unpack("<QQ", tensor.raw_data)
            data = self._data[start : start + length]
        else:
            return self._typed(tensor, label, count).view(dtype).reshape(shape)
        if len(data) != count * dtype.itemsize:
            raise _damaged(
                self.where,
                f"{label} of {type_name(tensor.data_type)} {list(shape)} needs "
                f"{count * dtype.itemsize} bytes, found {len(data)}",
            )
        if dtype == np.bool_ and np.frombuffer(data, np.uint8).max(initial=0) > 1:
            raise _damaged(self.where, f"{label} holds truth values other than 0 and 1")
        return np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)

    def _typed(self, tensor: TensorProto, label: str, count: int) -> np.ndarray:
        _, field, kind = DTYPES[tensor.data_type]
        values = getattr(tensor, field)
        if len(values) != count:
            raise _damaged(
                self.where,
                f"{label} of shape {list(tensor.dims)} needs {count} values, {field} has "
                f"{len(values)}",
            )
        array = np.fromiter(values, FIELDS[field], count)
        if np.dtype(kind).kind != "f":
            least, most = (0, 1) if kind is np.bool_ else (np.iinfo(kind).min, np.iinfo(kind).max)
            if count and not least <= int(array.min()) <= int(array.max()) <= most:
                raise _damaged(self.where, f"{label} holds values outside its type")
        array = array.astype(kind)
        array.setflags(write=False)
        return array

    def _external_bytes(self, tensor: TensorProto, label: str, needed: int) -> memoryview:
        if self._external is None:
            raise CheckpointError(
                f"{self.where}: {label} lies in another file, but the model came without a "
                "folder; read it from its path."
            )
        return self._external.read({e.key: e.value for e in tensor.external_data}, label, needed)


class Walk:
    """One pass over the wire format, along the schema."""

    def __init__(self, data: memoryview, where: str) -> None:
        self._data, self._where = data, where
        self._fields = self._packed = 0

    def message(self, start: int, end: int, kind: Any, depth: int) -> bytes:
        """The message at `start:end`, with (offset, length) in place of each `raw_data`.

        Args:
          start: of the message.
          end: of the message.
          kind: its protobuf `Descriptor`.
          depth: messages around it.

        Returns:
          The message for protobuf to parse.

        Raises:
          CheckpointError: if the bytes are not in wire format.
          UnsafeInputError: if there is too much, or it nests too deep.
        """
        if depth > MAX_DEPTH:
            raise UnsafeInputError(
                f"{self._where} nests messages over {MAX_DEPTH} levels deep; refused."
            )
        parts: list[bytes | memoryview] = []
        for number, wire, begin, value, stop in self._entries(start, end):
            field = kind.fields_by_number.get(number)
            if field is None or wire != 2:
                parts.append(self._data[begin:stop])
                continue
            if field.message_type is not None:
                inner = self.message(value, stop, field.message_type, depth + 1)
            elif field.name == "raw_data":
                inner = struct.pack("<QQ", value, stop - value)
            else:
                inner = self._leaf(field, value, stop)
            parts += (_varint(number << 3 | 2), _varint(len(inner)), inner)
        return b"".join(parts)

    def _leaf(self, field: FieldDescriptor, start: int, end: int) -> memoryview:
        value = self._data[start:end]
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                str(value, "utf-8")
            except UnicodeDecodeError as error:
                raise _damaged(self._where, f"its {field.full_name} is no text") from error
        elif field.type in NUMBERS:
            self._packed += len(value)
            if self._packed > MAX_PACKED:
                raise UnsafeInputError(
                    f"{self._where} stores over {MAX_PACKED >> 20} MiB of numbers one by one. "
                    "Store tensors as raw_data, as onnx.numpy_helper.from_array does."
                )
        return value

    def _entries(self, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(field, wire type, start of the tag, of the value, end) of each field."""
        while start < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise UnsafeInputError(f"{self._where} has over {MAX_FIELDS} fields; refused.")
            tag, value = self._number(start, end)
            wire = tag & 7
            if wire == 0:
                stop = self._number(value, end)[1]
            elif wire == 2:
                length, value = self._number(value, end)
                stop = value + length
            elif wire in WIDTHS:
                stop = value + WIDTHS[wire]
            else:
                raise _damaged(self._where, f"byte {start} starts no field")
            if stop > end:
                raise _damaged(
                    self._where, f"the field at byte {start} is cut off ({stop - end} bytes short)"
                )
            yield tag >> 3, wire, start, value, stop
            start = stop

    def _number(self, start: int, end: int) -> tuple[int, int]:
        """(value, position after it) of the variable-length number at `start`."""
        if start < end and self._data[start] < 128:  # nearly all of them
            return self._data[start], start + 1
        result = 0
        for i, byte in enumerate(self._data[start : min(end, start + 10)]):
            result |= (byte & 127) << 7 * i
            if byte < 128:
                return result, start + i + 1
        raise _damaged(self._where, f"the number at byte {start} has no end")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes((value,))


class ExternalData:
    """Tensors in files beside the model: regular files below one folder, behind no link."""

    def __init__(self, folder: Path, where: str) -> None:
        self._folder, self._where = folder, where
        self._read: dict[tuple[Path, int, int], memoryview] = {}
        self._left: dict[Path, int] = {}  # bytes not read yet: overlaps cannot multiply a file

    def read(self, entry: dict[str, str], label: str, needed: int) -> memoryview:
        """The bytes of one tensor.

        Args:
          entry: `location`, and perhaps `offset` and `length`, as in the file.
          label: the tensor, for messages.
          needed: bytes its shape and type need.

        Returns:
          That many bytes.

        Raises:
          CheckpointError: if the file is missing or too short, or the entry makes no sense.
          UnsafeInputError: if the location leaves the folder or passes a link.
          ResourceError: if they do not fit into memory.
        """
        location = entry.get("location", "")
        here = f"{self._where}: {label} lies in {show(location)!r}"
        offset, length = (_count(entry.get(k, d), k, here) for k, d in _defaults(needed))
        if length != needed:
            raise CheckpointError(f"{here} with length {length}, its shape needs {needed}. {AGAIN}")
        path = self._find(location, here)
        key = (path, offset, length)
        if key not in self._read:
            self._read[key] = self._load(path, offset, length, here)
        return self._read[key]

    def _find(self, location: str, here: str) -> Path:
        """The file, each step on the way to it checked."""
        steps = [step for step in location.split("/") if step not in ("", ".")]
        if not steps or "\0" in location:
            raise CheckpointError(f"{here}, which names no file. {AGAIN}")
        outside = location.startswith("/") or ".." in steps or re.search(r"\\|^\w:", location)
        if outside:
            raise UnsafeInputError(f"{here}, outside the model's folder; nothing was opened.")
        path = self._folder
        for step in steps:
            path = path / step
            status = self._status(path, here)
            if stat.S_ISLNK(status.st_mode):
                raise UnsafeInputError(
                    f"{here}, but {show(step)} is a symbolic link; nothing was opened. Copy the "
                    "data itself into the model's folder."
                )
        return path

    def _status(self, path: Path, here: str) -> os.stat_result:
        try:
            return path.lstat()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{here}, which cannot be found ({show(error)}). Keep that file in the folder of "
                "the model."
            ) from error

    def _load(self, path: Path, offset: int, length: int, here: str) -> memoryview:
        status = self._status(path, here)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeInputError(f"{here}, which is no regular file; nothing was opened.")
        if status.st_nlink > 1:
            raise UnsafeInputError(
                f"{here}, which has a second hard link somewhere; nothing was opened. Copy it: "
                "cp file copy && mv copy file."
            )
        if offset + length > status.st_size:
            raise CheckpointError(
                f"{here} at {offset}:{offset + length}, but that file has {status.st_size} bytes "
                "(cut short?). Download or export it again."
            )
        left = self._left.setdefault(path, status.st_size) - length
        if left < 0:
            raise UnsafeInputError(f"{here}, whose tensors overlap; refused.")
        self._left[path] = left
        return _read_range(path, offset, length, status, here)


def _defaults(needed: int) -> tuple[tuple[str, str], ...]:
    return ("offset", "0"), ("length", str(needed))


def _count(text: str, key: str, here: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise CheckpointError(f"{here} with {key} {show(text)!r}, which is no count. {AGAIN}")
    return int(text)


def _read_range(
    path: Path, offset: int, length: int, status: os.stat_result, here: str
) -> memoryview:
    flags = os.O_RDONLY | sum(
        getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")
    )
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            opened = os.fstat(file.fileno())
            if (opened.st_dev, opened.st_ino) != (status.st_dev, status.st_ino):
                raise UnsafeInputError(f"{here}, which was exchanged while it was read.")
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{here}, which cannot be read: {show(error)}.") from error
    except MemoryError as error:
        raise ResourceError(f"{here}, which does not fit into memory.") from error
    if len(data) != length:
        raise CheckpointError(f"{here}, which became shorter while it was read.")
    return memoryview(data)


def _damaged(where: str, detail: str) -> CheckpointError:
    return CheckpointError(f"{where} is damaged: {detail}. {AGAIN}")
