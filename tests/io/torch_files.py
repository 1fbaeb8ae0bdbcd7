"""Files of `torch.save` in both formats, written by PyTorch or piece by piece."""

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch._utils

from dfq_jax.io.readers.checkpoint import Checkpoint, read_checkpoint
from dfq_jax.io.readers.torch_checkpoint import MAGIC_NUMBER

REBUILD = vars(torch._utils)["_rebuild_tensor_v2"]
FORMATS = ["zip", "stream"]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def saved(value: object, form: str = "zip", protocol: int = 2) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(
        value,
        buffer,
        _use_new_zipfile_serialization=form == "zip",
        pickle_protocol=protocol,
    )
    return buffer.getvalue()


def load(data: bytes, folder: Path, name: str = "net.pth") -> Checkpoint:
    """Reads bytes through a file."""
    path = folder / name
    path.write_bytes(data)
    return read_checkpoint(path)


def assert_same(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit, with shapes, types and order."""
    assert list(checkpoint.tensors) == list(tensors)
    for name, tensor in tensors.items():
        got = checkpoint.tensors[name]
        bits = tensor.detach().contiguous().view(BITS[tensor.element_size()]).numpy()
        assert got.shape == tuple(tensor.shape), name
        assert got.dtype.name == str(tensor.dtype).removeprefix("torch."), name
        assert got.tobytes() == bits.tobytes(), name
        assert got.flags.c_contiguous
        assert not got.flags.writeable


def rewrite(
    data: bytes, changes: dict[str, bytes | None], method: int = zipfile.ZIP_STORED
) -> bytes:
    """The same archive with members (named without the root) replaced, added or left out."""
    source = zipfile.ZipFile(io.BytesIO(data))
    root = source.namelist()[0].split("/")[0]
    members = {name.removeprefix(root + "/"): source.read(name) for name in source.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        for name, content in (members | changes).items():
            if content is not None:
                target.writestr(f"{root}/{name}", content)
    return buffer.getvalue()


def mixed_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return {
        "conv.weight": torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last),
        "transposed": base.t(),
        "column": base[:, 2],
        "strided": base[::2, 1::3],
        "tail": base[2:],
        "shared": base,
        "expanded": torch.randn(3, 1).expand(3, 4),
        "windows": torch.arange(10.0).unfold(0, 4, 2),
        "scalar": torch.tensor(3.5),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "nothing": torch.zeros(0),
        "one": torch.randn(1, 1, 1),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


class Pickler(pickle.Pickler):
    """Writes `Stored` as PyTorch writes storages."""

    def persistent_id(self, obj):
        return ("storage", *obj.parts) if isinstance(obj, Stored) else None


class Stored:
    """A storage reference of any content."""

    def __init__(self, *parts: object):
        self.parts = parts


class Rebuilt:
    """A tensor description of any content."""

    def __init__(self, storage: object, offset: object, size: object, stride: object):
        self.args: tuple = (storage, offset, size, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return REBUILD, self.args


def dump(value: object) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(value)
    return buffer.getvalue()


def forged_zip(value: object, storages: dict[str, bytes]) -> bytes:
    """A zip checkpoint of any content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr("archive/data.pkl", dump(value))
        for key, content in storages.items():
            target.writestr(f"archive/data/{key}", content)
    return buffer.getvalue()


def forged_stream(value: object, storages: dict[str, tuple[int, bytes]]) -> bytes:
    """A stream checkpoint of any content."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(map(dump, (MAGIC_NUMBER, 1001, system, value, list(storages))))
    return head + b"".join(struct.pack("<q", n) + raw for n, raw in storages.values())


def floats(key: str = "0", numel: object = 6) -> Stored:
    return Stored(torch.FloatStorage, key, "cpu", numel, None)


RAW = np.arange(6, dtype="<f4").tobytes()


def forged(form: str, value: object) -> bytes:
    """A checkpoint of either format with one storage of six floats."""
    if form == "zip":
        return forged_zip(value, {"0": RAW})
    return forged_stream(value, {"0": (6, RAW)})
