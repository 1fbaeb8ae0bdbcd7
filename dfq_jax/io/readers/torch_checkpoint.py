"""Files written by `torch.save`, both formats, read without PyTorch and without running anything.

The zip format (since 1.6) keeps a pickle in `<root>/data.pkl` and storages in `<root>/data/<key>`.
The stream format before it is five pickles (magic number, version, system, object, storage keys)
followed by the storages, each an int64 element count and its bytes, always little-endian.
"""

import dataclasses
from typing import Any

from dfq_jax.errors import CheckpointError, UnsupportedModelError
from dfq_jax.io.readers.pickle_data import PickleStream, load_pickle
from dfq_jax.io.readers.pickle_policy import listing, show
from dfq_jax.io.readers.pickle_values import Global
from dfq_jax.io.readers.torch_tensors import Storage, TensorReader, parse_storage
from dfq_jax.io.readers.zip_members import ZipMembers

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
MAGIC_BYTES = b"\x8a\x0a" + MAGIC_NUMBER.to_bytes(10, "little")
MAGIC_TEXT = b"L%d" % MAGIC_NUMBER
STREAM_VERSION = 1001
KNOWN_ROOTS = ("torch", "collections", "builtins", "__builtin__", "copyreg", "copy_reg", "_codecs")
RECIPE = (
    "Where its code is at hand, run torch.export.save(torch.export.export(model.eval(), (example,))"
    ', "net.pt2"), or save only the weights: torch.save(model.state_dict(), "net.pth").'
)


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """What a file holds, before anybody decides which part of it is the model.

    Attributes:
      root: the saved object as plain data and descriptions; tensors are `TensorRef`.
      tensors: turns a `TensorRef` into an array.
      classes: dotted names of the classes that were left as descriptions.
    """

    root: Any
    tensors: TensorReader
    classes: tuple[str, ...]


def is_stream(data: bytes) -> bool:
    """Whether the bytes start as the stream format does, in any pickle protocol."""
    return MAGIC_BYTES in data[:32] or data.startswith(MAGIC_TEXT)


def read_zip(archive: ZipMembers) -> TorchFile:
    """Reads the zip format.

    Args:
      archive: the opened file.

    Returns:
      Its content; storages are read when a tensor asks for them.

    Raises:
      UnsupportedModelError: if it is a TorchScript archive.
      CheckpointError: if it is damaged or no file of `torch.save`.
      UnsafeInputError: if it names code.
    """
    root = archive.names[0].split("/", 1)[0] + "/" if archive.names else ""
    scripted = any(
        name.startswith((root + "code/", root + "constants.pkl")) for name in archive.names
    )
    if scripted:
        raise UnsupportedModelError(
            f"{archive.where} is a TorchScript archive: a program, not a checkpoint. {RECIPE}"
        )
    if root + "data.pkl" not in archive:
        raise CheckpointError(
            f"{archive.where} is a zip archive without data.pkl, so torch.save did not write it; "
            f"it holds {listing(list(archive.names[:8]))}."
        )
    value, names = load_pickle(bytes(archive.read(root + "data.pkl")), f"{archive.where}/data.pkl")
    order = bytes(archive.read(root + "byteorder")) if root + "byteorder" in archive else b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(f"{archive.where} is damaged: byte order {show(order)}.")

    def fetch(storage: Storage) -> memoryview:
        return archive.read(f"{root}data/{storage.key}")

    reader = TensorReader(
        fetch, archive.where, file_bytes=archive.file_bytes, big_endian=order == b"big"
    )
    return TorchFile(value, reader, _classes(names))


def read_stream(data: bytes, where: str) -> TorchFile:
    """Reads the stream format.

    Args:
      data: the whole file.
      where: the file, for messages.

    Returns:
      Its content; every storage was found to be complete.

    Raises:
      CheckpointError: if it is damaged.
      UnsafeInputError: if it names code.
    """
    stream = PickleStream(data, where)
    magic, version, _, root, keys = [stream.load() for _ in range(5)]
    stream.refuse_unsafe()
    if magic != MAGIC_NUMBER or version != STREAM_VERSION or type(keys) is not list:
        raise CheckpointError(f"{where} is damaged: not the header of a PyTorch stream file.")
    storages, end = _stream_storages(stream, data, where, keys)
    stream.refuse_unsafe(after=end)
    if end != len(data):
        raise CheckpointError(
            f"{where} is damaged: {len(data) - end} bytes follow the last storage at byte {end}."
        )

    def fetch(storage: Storage) -> memoryview:
        if storage.key not in storages:
            raise CheckpointError(f"{where} is damaged: it lacks storage {show(storage.key)}.")
        return storages[storage.key]

    return TorchFile(
        root, TensorReader(fetch, where, file_bytes=len(data)), _classes(stream.globals)
    )


def _stream_storages(
    stream: PickleStream, data: bytes, where: str, keys: list
) -> tuple[dict[str, memoryview], int]:
    widths: dict[str, int] = {}
    for reference in stream.persistent:
        if type(reference.value) is tuple and reference.value[:1] == ("storage",):
            storage = parse_storage(reference, where)
            widths.setdefault(storage.key, storage.item_bytes)  # the first mention counts
    storages: dict[str, memoryview] = {}
    pos = stream.pos
    for key in keys:
        if type(key) is not str or key not in widths or key in storages:
            raise CheckpointError(f"{where} is damaged: no tensor uses storage {show(key)}.")
        count = int.from_bytes(data[pos : pos + 8], "little", signed=True)
        start, pos = pos + 8, pos + 8 + count * widths[key]
        if not start <= pos <= len(data):
            raise CheckpointError(
                f"{where} is damaged: storage {show(key)} at byte {start} has {count} elements, "
                f"but the file ends at byte {len(data)} (cut short?). Download it again."
            )
        storages[key] = memoryview(data)[start:pos]
    return storages, pos


def _classes(names: tuple[Global, ...]) -> tuple[str, ...]:
    return tuple(str(g) for g in names if g.module.split(".", 1)[0] not in KNOWN_ROOTS)
