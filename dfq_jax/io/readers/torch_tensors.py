"""PyTorch's tensor descriptions turned into NumPy arrays, every number checked before use."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from dfq_jax.errors import CheckpointError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.io.readers.pickle_values import Global, PersistentId, TensorRef
from dfq_jax.io.readers.zip_members import memory_budget

MAX_RANK = 32
MAX_ELEMENTS = 1 << 48
MAX_KEY = 1000  # characters of a storage key; PyTorch writes numbers

# Storage class and dtype names of PyTorch, bytes per element, and the NumPy type if there is one.
KINDS: tuple[tuple[str, str, int, type | None], ...] = (
    ("DoubleStorage", "float64", 8, np.float64),
    ("FloatStorage", "float32", 4, np.float32),
    ("HalfStorage", "float16", 2, np.float16),
    ("BFloat16Storage", "bfloat16", 2, ml_dtypes.bfloat16),
    ("LongStorage", "int64", 8, np.int64),
    ("IntStorage", "int32", 4, np.int32),
    ("ShortStorage", "int16", 2, np.int16),
    ("CharStorage", "int8", 1, np.int8),
    ("ByteStorage", "uint8", 1, np.uint8),
    ("BoolStorage", "bool", 1, np.bool_),
    ("", "uint16", 2, np.uint16),
    ("", "uint32", 4, np.uint32),
    ("", "uint64", 8, np.uint64),
    ("UntypedStorage", "", 1, None),
    ("ComplexFloatStorage", "complex64", 8, None),
    ("ComplexDoubleStorage", "complex128", 16, None),
    ("QInt8Storage", "qint8", 1, None),
    ("QUInt8Storage", "quint8", 1, None),
    ("QInt32Storage", "qint32", 4, None),
    ("QUInt4x2Storage", "quint4x2", 1, None),
    ("QUInt2x4Storage", "quint2x4", 1, None),
)
ITEM_BYTES = {kind[0]: kind[2] for kind in KINDS}
NUMPY_TYPE = {name: kind[3] for kind in KINDS for name in kind[:2] if name and kind[3]}


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where a tensor's bytes are, as the pickle names them.

    Attributes:
      key: name of the storage within the file.
      kind: PyTorch's class name, such as `FloatStorage`.
      numel: elements the pickle says it has.
      view: first element and length of the part meant, in files of very old versions.
    """

    key: str
    kind: str
    numel: int
    view: tuple[int, int] | None = None

    @property
    def item_bytes(self) -> int:
        """Bytes per element."""
        return ITEM_BYTES[self.kind]


def is_count(value: Any) -> bool:
    """Whether an unpickled value can be a size, stride or offset."""
    return type(value) is int and 0 <= value < 1 << 62


def parse_storage(reference: Any, where: str) -> Storage:
    """Checks a storage reference.

    Args:
      reference: an unpickled value, a `PersistentId` in a healthy file.
      where: the file, for messages.

    Returns:
      The storage it names.

    Raises:
      CheckpointError: if it is anything else.
    """
    value = reference.value if type(reference) is PersistentId else None
    if type(value) is not tuple or len(value) not in (5, 6) or value[0] != "storage":
        raise CheckpointError(f"{where} is damaged: a tensor refers to no storage.")
    kind, key, numel = value[1], value[2], value[4]
    if type(kind) is not Global or kind.name not in ITEM_BYTES or not kind.name:
        raise CheckpointError(f"{where}: storage of an unknown kind {kind_shown(kind)}.")
    if type(key) is not str or len(key) > MAX_KEY or not is_count(numel):
        raise CheckpointError(f"{where} is damaged: a storage with a bad key or size.")
    return Storage(key, kind.name, numel, _view(value[5] if len(value) == 6 else None, where))


def _view(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if type(value) is tuple and len(value) == 3 and is_count(value[1]) and is_count(value[2]):
        return value[1], value[2]
    raise CheckpointError(f"{where} is damaged: a storage view with a bad offset or size.")


def kind_shown(value: Any) -> str:
    """A short name for an unpickled value's kind, safe to print."""
    cls = getattr(value, "cls", value)
    if type(cls) is Global:
        return show(cls)
    return "tensor" if type(value) is TensorRef else type(value).__name__


class TensorReader:
    """Makes arrays from tensor descriptions of one file.

    Two names for the same part of one storage share one array; all arrays are read-only.
    """

    def __init__(
        self,
        fetch: Callable[[Storage], memoryview],
        where: str,
        *,
        file_bytes: int,
        big_endian: bool = False,
    ):
        """Prepares reading.

        Args:
          fetch: gives all bytes of a storage.
          where: the file, for messages.
          file_bytes: its size, which bounds what may be allocated.
          big_endian: byte order of the storages.
        """
        self._fetch, self._where, self._big_endian = fetch, where, big_endian
        self._budget = memory_budget(file_bytes)
        self._arrays: dict[Any, np.ndarray] = {}

    def read(self, name: str, ref: TensorRef) -> np.ndarray:
        """Copies one tensor out of its storage.

        Args:
          name: for messages.
          ref: what the pickle says about it.

        Returns:
          A contiguous, read-only array of the native byte order.

        Raises:
          CheckpointError: if it reaches outside its storage, or is nonsense.
          UnsupportedModelError: if its numbers are complex, quantized or otherwise unknown here.
          UnsafeInputError: if the tensors together would be far larger than the file.
        """
        storage = parse_storage(ref.storage, self._where)
        dtype = self._dtype(name, ref, storage)
        size, stride = self._geometry(name, ref)
        key = (storage, dtype, ref.offset, size, stride)
        if key not in self._arrays:
            self._budget -= math.prod(size) * dtype.itemsize
            if self._budget < 0:
                raise UnsafeInputError(
                    f"{self._where}: with tensor {show(name)} of shape {size} the tensors exceed "
                    "the file many times over; refused. Save contiguous copies of expanded tensors."
                )
            data = self._bytes_of(name, storage)
            self._check_extent(name, len(data) // dtype.itemsize, (ref.offset, size, stride))
            self._arrays[key] = self._copy(data, dtype, (ref.offset, size, stride))
        return self._arrays[key]

    def _dtype(self, name: str, ref: TensorRef, storage: Storage) -> np.dtype:
        kind = ref.dtype.name if type(ref.dtype) is Global else storage.kind
        dtype = NUMPY_TYPE.get(kind)
        if dtype is None or ref.metadata:
            detail = f"type {show(kind)}" + (" and lazy conjugation" if ref.metadata else "")
            raise UnsupportedModelError(
                f"{self._where}: tensor {show(name)} has {detail}, which is not supported. "
                "Save plain float or integer weights."
            )
        return np.dtype(dtype)

    def _geometry(self, name: str, ref: TensorRef) -> tuple[tuple[int, ...], tuple[int, ...]]:
        parts = (ref.size, ref.stride, (ref.offset,))
        healthy = all(type(part) is tuple and all(map(is_count, part)) for part in parts)
        if not healthy or len(ref.size) != len(ref.stride) or len(ref.size) > MAX_RANK:
            raise CheckpointError(
                f"{self._where} is damaged: tensor {show(name)} has a shape, stride or offset that "
                "is negative, too large or no number."
            )
        if math.prod(max(n, 1) for n in ref.size) > MAX_ELEMENTS:
            raise CheckpointError(
                f"{self._where} is damaged: tensor {show(name)} claims shape {ref.size}."
            )
        used = 0 not in ref.size  # strides that mean nothing must not tell tensors apart
        stride = tuple(
            s if used and n > 1 else 0 for n, s in zip(ref.size, ref.stride, strict=True)
        )
        return ref.size, stride

    def _bytes_of(self, name: str, storage: Storage) -> memoryview:
        data = self._fetch(storage)
        start, count = storage.view or (0, storage.numel)
        end = (start + count) * storage.item_bytes
        if end > len(data):
            raise CheckpointError(
                f"{self._where} is damaged: tensor {show(name)} needs {end} bytes of storage "
                f"{show(storage.key)}, which has {len(data)}. Download or save the file again."
            )
        return data[start * storage.item_bytes : end]

    def _check_extent(self, name: str, held: int, geometry: tuple) -> None:
        offset, size, stride = geometry
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if 0 not in size and last >= held:
            raise CheckpointError(
                f"{self._where} is damaged: tensor {show(name)} of shape {size} reaches element "
                f"{last} of a storage of {held}. Download or save the file again."
            )

    def _copy(self, data: memoryview, dtype: np.dtype, geometry: tuple) -> np.ndarray:
        offset, size, stride = geometry
        width = dtype.itemsize
        if 0 in size:
            bits = np.zeros(size, f"u{width}")
        else:
            strides = tuple(s * width for s in stride)
            bits = np.ndarray(size, f"u{width}", data, offset * width, strides).copy(order="C")
        if self._big_endian:
            bits.byteswap(inplace=True)
        array = bits != 0 if dtype == np.bool_ else bits.view(dtype)
        array.setflags(write=False)
        return array
