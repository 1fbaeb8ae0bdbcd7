"""What may be written into an output folder, and how a new artifact replaces an old one.

Files are staged in a sub-folder. Once all of them are on the disk it gets the name `WHOLE`, and
from then on the new artifact counts: its files are moved into place, the manifest last. Whoever
finds such a folder later, reader or writer, ends what a kill interrupted, so none of them sees a
mixture of old and new. Nothing that is not listed in our own manifest is ever removed.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dfq_jax.base.files import (
    disk_errors,
    owned,
    read_regular,
    refuse_living,
    sync_folder,
    write_atomically,
)
from dfq_jax.errors import DataError, UsageError

FORMAT = "dfq_jax artifact"
SCHEMA_VERSION = 1
MANIFEST, MODEL, FAILED = "manifest.json", "model.onnx", "model.failed.onnx"
FLOAT, TENSORS, RUN = "float.onnx", "model.safetensors", "run.py"
OWN_FILES = {MANIFEST, MODEL, FAILED, FLOAT, TENSORS, RUN}
PARTIAL = ".partial-"
WHOLE, LOCK = f"{PARTIAL}whole", f"{PARTIAL}save"
LARGEST_MANIFEST = 64 << 20


def check_output_folder(
    folder: str | Path, force: bool = False, names: tuple[str, ...] = ()
) -> None:
    """Whether an artifact may be saved there; to be asked before the long work starts.

    Args:
      folder: absent, empty or with an artifact in it; anything else with `force` only.
      force: accept other files beside ours.
      names: files that will be written beside our own.

    Raises:
      UsageError: naming what is in the way, or who is writing there.
    """
    folder = Path(folder)
    if reserved := OWN_FILES & set(names):
        raise UsageError(f"extra files may not be called {sorted(reserved)}.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose a folder to write to.")
    existing = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to {folder}: {existing} is read-only for you.")
    if not folder.is_dir():
        return
    settle(folder)
    refuse_owner(folder)
    ours = {MANIFEST, *listed(folder)} if is_artifact(folder) else set()
    foreign = sorted(
        p.name for p in folder.iterdir() if p.name not in ours and not p.name.startswith(PARTIAL)
    )
    if clash := sorted((OWN_FILES | set(names)) & set(foreign)):
        raise UsageError(
            f"{folder} holds {', '.join(clash)}, not written by dfq_jax as they are; files of "
            f"others are never replaced. Choose another folder, or move them."
        )
    if foreign and not ours and not force:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise UsageError(
            f"{folder} is not empty and holds no artifact, but {', '.join(foreign[:5])}{more}. "
            f"Choose another folder, or pass `force=True` to write beside them."
        )


def refuse_owner(folder: Path) -> None:
    """Refuses a folder that another process is writing to; what a dead one left is removed."""
    lock = folder / f"{LOCK}.lock"
    if lock.exists():
        refuse_living(lock)


def is_artifact(folder: Path) -> bool:
    """Whether the folder holds a manifest of ours, in whatever state its other files are."""
    try:
        return read_manifest(folder)["format"] == FORMAT
    except DataError:
        return False


def listed(folder: Path) -> tuple[str, ...]:
    """Plain file names that the folder's manifest lists."""
    return tuple(name for name in read_manifest(folder)["files"] if is_plain(name))


def is_plain(name: str) -> bool:
    """Whether a name can only mean a file directly in the folder."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def replace_all(folder: Path, content: Mapping[str, bytes]) -> None:
    """Stages every file, then moves them into place, and removes those of ours that are outdated.

    Raises:
      UsageError: if another process is writing there, or a name is no plain one.
      ResourceError: if the disk is full.
    """
    if bad := [name for name in content if not is_plain(name)]:
        raise UsageError(f"artifact files need plain names, got {bad}.")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with owned(folder, LOCK), staging(folder) as stage:
        for name, data in content.items():
            write_atomically(stage / name, data)
        with disk_errors(folder):
            os.replace(stage, folder / WHOLE)
            sync_folder(folder)
            move_into_place(folder)


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, gone afterwards; what killed runs left is settled first."""
    with disk_errors(folder):
        move_into_place(folder)
    for stale in folder.glob(f"{PARTIAL}*"):
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
    stage = folder / f"{PARTIAL}{secrets.token_hex(8)}"
    with disk_errors(stage):
        stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def settle(folder: Path) -> None:
    """Ends the replacement of an artifact that was interrupted when all of it was there.

    Raises:
      UsageError: if another process is writing there, or the folder is read-only.
    """
    if (folder / WHOLE).is_dir():
        with owned(folder, LOCK), disk_errors(folder):
            move_into_place(folder)


def move_into_place(folder: Path) -> None:
    """Moves what `WHOLE` holds into the folder, if it is there; the manifest comes last."""
    whole = folder / WHOLE
    if not is_artifact(whole):  # nothing, or only the manifest was left to move, and it was
        shutil.rmtree(whole, ignore_errors=True)
        return
    outdated = set(listed(folder)) - set(listed(whole)) if is_artifact(folder) else set()
    for name in listed(whole):
        if (whole / name).is_file():
            os.replace(whole / name, folder / name)
    for name in outdated:
        (folder / name).unlink(missing_ok=True)
    os.replace(whole / MANIFEST, folder / MANIFEST)
    sync_folder(folder)
    shutil.rmtree(whole, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
      DataError: if there is none, or not one of ours.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_regular(path, LARGEST_MANIFEST))
    except OSError as error:
        raise DataError(
            f"{folder} holds no artifact: cannot read {MANIFEST} ({error.strerror}). "
            f"Folders written by `dfq quantize` have one."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not the manifest of a dfq_jax artifact.")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {manifest.get('schema_version')!r}, this version reads "
            f"{SCHEMA_VERSION}. Quantize again, or install the version that wrote it."
        )
    needed = {"files": dict, "graph": dict, "plan": dict, "report": dict}
    needed |= {"status": str, "scheme": str}
    needed |= {"inputs": list} if "inputs" in manifest else {"contract": dict}
    if wrong := [k for k, kind in needed.items() if not isinstance(manifest.get(k), kind)]:
        raise DataError(f"{path} is damaged: {', '.join(wrong)} missing or of a wrong type.")
    return manifest
