"""The zip archives of `torch.export.save` (PyTorch 2.9 and newer): model description and weights.

Weights are raw storages beside a JSON list of shapes and strides, so neither PyTorch nor pickle is
needed. Arrays are views of the file's bytes; every number is checked before it is used.
"""

import math
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dfq_jax.errors import CheckpointError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.frontends.pt2_json import check, damaged, get, parse_json, tagged
from dfq_jax.io.readers.pickle_policy import listing, show
from dfq_jax.io.readers.torch_tensors import MAX_ELEMENTS, MAX_RANK, is_count
from dfq_jax.io.readers.zip_members import ZipMembers, memory_budget

RESAVE = "torch.export.save(torch.export.export(model.eval(), (example,)), 'net.pt2')"
PAYLOAD_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
STRIDED = 7  # of torch.export's `Layout`
# torch.export's `ScalarType`: PyTorch's name, and the NumPy type if weights may have it.
SCALAR_TYPES: dict[int, tuple[str, type | None]] = {
    1: ("uint8", np.uint8),
    2: ("int8", np.int8),
    3: ("int16", np.int16),
    4: ("int32", np.int32),
    5: ("int64", np.int64),
    6: ("float16", np.float16),
    7: ("float32", np.float32),
    8: ("float64", np.float64),
    9: ("complex32", None),
    10: ("complex64", None),
    11: ("complex128", None),
    12: ("bool", np.bool_),
    13: ("bfloat16", ml_dtypes.bfloat16),
    28: ("uint16", np.uint16),
    29: ("float8_e4m3fn", None),
    30: ("float8_e5m2", None),
    31: ("float8_e4m3fnuz", None),
    32: ("float8_e5m2fnuz", None),
    33: ("float8_e8m0fnu", None),
    34: ("uint32", np.uint32),
    35: ("uint64", np.uint64),
}


class Geometry(NamedTuple):
    """Where a tensor lies in its storage; all in elements."""

    dtype: np.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Pt2Archive:
    """One exported model in a `.pt2` file.

    Attributes:
      where: what messages call the file.
      model: the model's JSON description.
    """

    def __init__(self, data: bytes, where: str):
        """Finds the model in the file; reads its description but no weights.

        Args:
          data: the whole file.
          where: what messages call it.

        Raises:
          CheckpointError: if the file is damaged or no archive of torch.export.
          UnsupportedModelError: if PyTorch 2.8 or older wrote it, or it holds no single model.
          UnsafeInputError: if it is built to exhaust the machine.
        """
        self.where, self._zip = where, ZipMembers(data, where)
        self._root = _root(self._zip)
        self._name = _model_name(self._zip, self._root)
        self._big_endian = self._byte_order() == "big"
        self._budget = memory_budget(len(data))
        self._arrays: dict[tuple[str, Geometry], np.ndarray] = {}
        self.model = self._json(f"models/{self._name}.json")
        self._weights = self._payloads("weights")
        self._constants = self._payloads("constants")

    def weight(self, name: str) -> np.ndarray:
        """A parameter or persistent buffer.

        Args:
          name: its fully qualified name.

        Returns:
          A read-only array; one shared by all names of the same part of a storage.

        Raises:
          CheckpointError: if it is missing, or reaches outside its storage.
          UnsupportedModelError: if its numbers are complex or otherwise unknown here.
          UnsafeInputError: if it is pickled, or the tensors would be far larger than the file.
        """
        return self._read(name, "weights", self._weights, self._constants)

    def constant(self, name: str) -> np.ndarray:
        """A non-persistent buffer or other constant; as `weight`.

        Args:
          name: its fully qualified name.

        Returns:
          A read-only array.

        Raises:
          CheckpointError: if it is missing, or reaches outside its storage.
          UnsupportedModelError: if its numbers are complex or otherwise unknown here.
          UnsafeInputError: if it is pickled, or the tensors would be far larger than the file.
        """
        return self._read(name, "constants", self._constants, self._weights)

    def _read(self, name: str, folder: str, first: dict, second: dict) -> np.ndarray:
        where = f"{self.where}: tensor {show(name)}"
        if name not in first and name in second:
            folder, first = ("constants" if folder == "weights" else "weights"), second
        if name not in first:
            raise damaged(where, f"data/{folder} does not list it")
        payload = first[name]
        path = get(payload, "path_name", str, where)
        if not PAYLOAD_NAME.fullmatch(path):
            raise UnsafeInputError(f"{where} is stored under the odd path {show(path)}; refused.")
        if get(payload, "use_pickle", bool, where):
            raise UnsafeInputError(
                f"{where} is stored as a pickle, which could run code; refused and not opened. "
                f"PyTorch pickles tensor subclasses; export plain dense tensors: {RESAVE}."
            )
        geometry = _geometry(payload.get("tensor_meta"), where)
        key = (f"{self._root}data/{folder}/{path}", geometry)
        if key not in self._arrays:
            self._spend(geometry, where)
            array = _view(self._zip.read(key[0]), geometry, self._big_endian, where)
            array.setflags(write=False)
            self._arrays[key] = array
        return self._arrays[key]

    def _spend(self, geometry: Geometry, where: str) -> None:
        self._budget -= math.prod(geometry.size) * geometry.dtype.itemsize
        if self._budget < 0:
            raise UnsafeInputError(
                f"{where} has shape {geometry.size}; with it the tensors exceed the file many "
                "times over; refused. Export contiguous copies of expanded tensors."
            )

    def _json(self, path: str) -> dict[str, Any]:
        return parse_json(self._zip.read(self._root + path), f"{self.where}: {path}")

    def _payloads(self, folder: str) -> dict[str, Any]:
        path = f"data/{folder}/{self._name}_{folder}_config.json"
        return get(self._json(path), "config", dict, f"{self.where}: {path}")

    def _byte_order(self) -> str:
        if f"{self._root}byteorder" not in self._zip:
            return "little"
        order = _text(self._zip, f"{self._root}byteorder")
        if order not in ("little", "big"):
            raise damaged(self.where, f"byte order {show(order)}")
        return order


def _root(archive: ZipMembers) -> str:
    """The folder that holds everything, with its slash; empty if members lie at the top."""
    where, names = archive.where, archive.names
    if "serialized_exported_program.json" in archive:
        raise _too_old(where, "2.7 or older")
    folder = names[0].partition("/")[0] + "/" if names else ""
    for root in (folder, ""):
        if f"{root}archive_format" in archive:
            break
    else:
        raise CheckpointError(
            f"{where} is no archive of torch.export: it has no member 'archive_format'. {RESAVE} "
            "writes one."
        )
    form = _text(archive, f"{root}archive_format")
    if form != "pt2":
        raise damaged(where, f"archive format {show(form)} instead of pt2")
    named = f"{root}archive_version" in archive
    version = _text(archive, f"{root}archive_version") if named else "0"
    if version != "0":
        raise UnsupportedModelError(
            f"{where} has archive version {show(version)}; only version 0 is known. Export it with "
            "PyTorch 2.9 to 2.13."
        )
    return root


def _text(archive: ZipMembers, name: str) -> str:
    return str(archive.read(name)[:16], "latin-1").strip()


def _model_name(archive: ZipMembers, root: str) -> str:
    folder, where = f"{root}models/", archive.where
    models = [
        name[len(folder) : -len(".json")]
        for name in archive.names
        if name.startswith(folder) and name.endswith(".json")
    ]
    if not models and any(name.startswith(f"{root}data/aotinductor/") for name in archive.names):
        raise UnsupportedModelError(
            f"{where} is a package compiled by AOTInductor: machine code instead of a graph. "
            f"Export the model itself: {RESAVE}."
        )
    if not models:
        raise CheckpointError(f"{where} is incomplete: it has no model under models/.")
    model = "model" if "model" in models else models[0]
    if len(models) > 1 and model != "model":
        raise UnsupportedModelError(
            f"{where} holds {len(models)} models ({listing(models)}) and none is called 'model'. "
            f"Save the one you want by itself: {RESAVE}."
        )
    config = f"{root}data/weights/{model}_weights_config.json"
    if f"{root}data/weights/{model}.pt" in archive and config not in archive:
        raise _too_old(where, "2.8")
    return model


def _too_old(where: str, version: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where} was written by PyTorch {version}, which stores the weights of exported programs "
        "as pickles; these can run code and are not opened. If you trust it, save it again with "
        f"PyTorch 2.9 or newer: {RESAVE}, or "
        "torch.export.save(torch.export.load('old.pt2'), 'net.pt2')."
    )


def _geometry(meta: Any, where: str) -> Geometry:
    code = get(meta, "dtype", int, where)
    name, kind = SCALAR_TYPES.get(code, (f"number {code}", None))
    if kind is None or get(meta, "layout", int, where) != STRIDED:
        problem = f"type {name}" if kind is None else f"sparse layout {meta['layout']}"
        raise UnsupportedModelError(
            f"{where} has {problem}, which is not supported. Export plain dense float weights."
        )
    sizes = tuple(_count(n, where) for n in get(meta, "sizes", list, where))
    strides = tuple(_count(n, where) for n in get(meta, "strides", list, where))
    offset = _count(get(meta, "storage_offset", dict, where), where)
    if len(sizes) != len(strides) or len(sizes) > MAX_RANK:
        raise damaged(where, f"{len(sizes)} sizes and {len(strides)} strides")
    if math.prod(max(n, 1) for n in sizes) > MAX_ELEMENTS:
        raise damaged(where, f"it claims shape {sizes}")
    used = 0 not in sizes  # strides that mean nothing must not tell tensors apart
    stride = tuple(s if used and n > 1 else 0 for n, s in zip(sizes, strides, strict=True))
    return Geometry(np.dtype(kind), offset, sizes, stride)


def _count(record: Any, where: str) -> int:
    tag, value = tagged(record, where)
    if tag != "as_int" or not is_count(check(value, int, where, "a size, stride or offset")):
        raise damaged(where, f"a size, stride or offset is {show(value)}")
    return value


def _view(data: memoryview, geometry: Geometry, big_endian: bool, where: str) -> np.ndarray:
    dtype, offset, size, stride = geometry
    width = dtype.itemsize
    if 0 in size:
        return np.zeros(size, dtype)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if last >= len(data) // width:
        raise damaged(
            where,
            f"shape {size} reaches element {last} of a storage of {len(data) // width} (a weight "
            "without values, on the meta device, is stored empty)",
        )
    strides = tuple(s * width for s in stride)
    bits = np.ndarray(size, f"u{width}", data, offset * width, strides)
    if big_endian and width > 1:
        bits = bits.byteswap()
    if not bits.flags.aligned:  # never by PyTorch, which aligns storages to 64 bytes
        bits = bits.copy()
    if dtype == np.bool_:
        return bits != 0
    return bits.view(dtype)
