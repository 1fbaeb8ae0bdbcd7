"""`read_checkpoint`: any file of weights in, plain NumPy arrays out, whatever its suffix says."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dfq_jax.errors import CheckpointError, ResourceError, UnsupportedModelError
from dfq_jax.io.readers.containers import find_weights, strip_prefixes
from dfq_jax.io.readers.foreign import KERAS_WEIGHTS, from_keras, told_by_content
from dfq_jax.io.readers.pickle_data import hidden_globals
from dfq_jax.io.readers.pickle_policy import listing, means_code, refuse_code, show
from dfq_jax.io.readers.safetensors import looks_like_safetensors, read_safetensors
from dfq_jax.io.readers.torch_checkpoint import TorchFile, is_stream, read_stream, read_zip
from dfq_jax.io.readers.zip_members import ZipMembers

WAY_OUT = (
    'Save the weights with torch.save(model.state_dict(), "net.pth") and name the architecture.'
)
MOST_IGNORED = 12
# What people pass by mistake: first bytes, and what to tell them.
MISTAKES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (b"<!DOCTYPE", "a web page, not the file; the download failed"),
    (b"<html", "a web page, not the file; the download failed"),
    (b"\x93NUMPY", "a single NumPy array; save all weights as .safetensors"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The weights of one network.

    Attributes:
      tensors: read-only arrays by parameter name, in file order.
      notes: what was chosen, stripped and ignored on the way, one short line each.
      source: file name.
      sha256: hash of the whole file, in hex.
    """

    tensors: Mapping[str, np.ndarray]
    notes: tuple[str, ...]
    source: str
    sha256: str


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads weights from a file of `torch.save` (both formats) or safetensors.

    Nothing in the file is executed. The format is recognised by content.

    Args:
      path: the file.

    Returns:
      The tensors of the model, under names without wrappers' prefixes.

    Raises:
      CheckpointError: if the file is missing, damaged, or holds no weights.
      UnsupportedModelError: if it is a model in another form; the message says what to save.
      UnsafeInputError: if it would run code, leave its folder or exhaust the machine.
      ResourceError: if it does not fit into memory.
    """
    path = Path(path)
    data = _read_file(path)
    where = show(path.name)
    if data.startswith(b"PK\x03\x04"):
        tensors, notes = _from_torch(_open_zip(data, where), where)
    elif is_stream(data):
        tensors, notes = _from_torch(read_stream(data, where), where)
    elif looks_like_safetensors(data) or path.suffix == ".safetensors":
        tensors, notes = read_safetensors(data, where), ()
    else:
        raise _refusal(data, path, where)
    if not tensors:
        raise CheckpointError(
            f"{where} holds no weights: it is a safetensors file without tensors."
        )
    tensors, stripped = strip_prefixes(tensors)
    return Checkpoint(tensors, notes + stripped, path.name, hashlib.sha256(data).hexdigest())


def _read_file(path: Path) -> bytes:
    name = show(path, 300)
    try:
        if path.is_dir():
            raise CheckpointError(f"{name} is a directory; name the checkpoint file in it.")
        if not path.exists():
            raise CheckpointError(f"{name} does not exist; check the path.")
        if not path.is_file():
            raise CheckpointError(f"{name} is no regular file; copy the checkpoint to one.")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} cannot be read: {show(error)}; check the path and its permissions."
        ) from error
    except MemoryError as error:
        raise ResourceError(f"{name} does not fit into memory.") from error
    if not data:
        raise CheckpointError(f"{name} is empty; download or save it again.")
    return data


def _open_zip(data: bytes, where: str) -> TorchFile:
    archive = ZipMembers(data, where)
    inner = {name.partition("/")[2] for name in archive.names} | set(archive.names)
    if inner & {"archive_format", "models/model.json", "serialized_exported_program.json"}:
        raise UnsupportedModelError(
            f"{where} is a torch.export program, a network with its graph: rename it to end in "
            ".pt2 and load it without an architecture."
        )
    if KERAS_WEIGHTS in inner:
        raise UnsupportedModelError(f"{where} is a model of Keras. {from_keras(repr(where))}")
    if any(name.endswith(".npy") for name in inner):
        raise CheckpointError(f"{where} is a NumPy .npz archive; save it as .safetensors.")
    return read_zip(archive)


def _from_torch(file: TorchFile, where: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    weights = find_weights(file.root, where)
    notes = []
    if weights.path:
        name = ".".join(show(step) for step in weights.path)
        notes.append(f"took the {len(weights.tensors)} tensors under {name!r}")
    if weights.ignored:
        extra = len(weights.ignored) - MOST_IGNORED
        more = f" and {extra} more" if extra > 0 else ""
        notes.append(f"ignored {', '.join(weights.ignored[:MOST_IGNORED])}{more}")
    if file.classes:
        notes.append(f"left as inert data: {listing(list(file.classes))}")
    tensors = {name: file.tensors.read(name, ref) for name, ref in weights.tensors.items()}
    return tensors, tuple(notes)


def _refusal(data: bytes, path: Path, where: str) -> CheckpointError | UnsupportedModelError:
    """The error for a file that is none of the formats; one that names code is refused here."""
    if foreign := told_by_content(data, path):
        return UnsupportedModelError(foreign)
    code = [g for g in hidden_globals(data) if means_code(g.module, g.name)]
    refuse_code(where, [str(g) for g in code])
    if data[257:262] == b"ustar":
        return UnsupportedModelError(
            f"{where} is a tar checkpoint of PyTorch before 0.1.12, which can only be read by "
            "running its pickles. If you trust it, load it once in PyTorch with "
            f"weights_only=False. {WAY_OUT}"
        )
    if path.suffix == ".onnx" or (data[:1] == b"\x08" and data[2:3] in b"\x12\x1a\x22\x2a\x32\x3a"):
        return UnsupportedModelError(
            f"{where} is an ONNX model, a network with its graph: rename it to end in .onnx and "
            "load it without an architecture."
        )
    for start, meaning in MISTAKES:
        if data.startswith(start):
            return CheckpointError(f"{where} is {meaning}.")
    if data.startswith(b"PK"):
        return CheckpointError(f"{where} is an empty or split zip archive, not a checkpoint.")
    if data[:1] == b"\x80":
        return CheckpointError(f"{where} is a plain pickle, not written by torch.save. {WAY_OUT}")
    return CheckpointError(
        f"{where} is no checkpoint: it starts with {show(data[:8])}. Expected a file of torch.save "
        f"or safetensors. {WAY_OUT}"
    )
