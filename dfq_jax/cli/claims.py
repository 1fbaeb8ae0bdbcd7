"""Where a verb writes: claimed before its work begins, and never over what is not ours."""

import contextlib
import os
import shutil
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path

from dfq_jax.base.files import owned
from dfq_jax.base.settings import MODEL
from dfq_jax.cli.config import CONFIG, VERBS
from dfq_jax.errors import UsageError
from dfq_jax.io.artifacts.images import is_image_set
from dfq_jax.io.artifacts.output_folder import OWN_FILES
from dfq_jax.report.grid import is_our_picture

KEPT = (
    *("fingerprint.json", "*.lock", "batch_*", "probes", "reconstruction-*", "stage_*"),
    *("training", ".tmp-*"),
)
"""What a folder of states may hold at its top."""
LOCK = "output"
MOST_TOLD = 3


def state_folder(output: Path) -> Path:
    """Where a run keeps what it needs to resume: beside its output."""
    output = output.resolve()
    return output.with_name(f".{output.name}.run")


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[Path]:
    """Keeps an output, and the states beside it, from other processes while this one works.

    Yields:
      The folder of states.

    Raises:
      UsageError: if another process is at work there, or the folder holds files of others.
    """
    state = state_folder(output)
    check_state(state)
    try:
        with owned(state, LOCK):
            yield state
    finally:
        with contextlib.suppress(OSError):
            state.rmdir()  # if there is nothing to resume from


def check_state(folder: Path) -> None:
    """Refuses a folder of states that holds what we do not write.

    Raises:
      UsageError: naming some of it.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder} is where states are kept, but it is no folder: move it away.")
    foreign = sorted(p.name for p in folder.glob("*") if not is_kept(p.name))
    if foreign:
        raise UsageError(
            f"{folder} is where states are kept, but it holds {', '.join(foreign[:MOST_TOLD])}, "
            "not written by dfq_jax. Move it away, or choose another output."
        )


def is_kept(name: str) -> bool:
    """Whether a name at the top of a folder of states is one of ours."""
    return any(fnmatch(name, pattern) for pattern in KEPT)


def remove_state(folder: Path) -> None:
    """Deletes the state of a finished run, and the folder if that was all it held."""
    for path in folder.glob("*"):
        if not is_kept(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_images_file(path: Path) -> None:
    """Refuses to replace a file that is no image set of ours, and settings that are not ours.

    Raises:
      UsageError: naming it.
    """
    check_replaced(path, "-o", is_image_set(path))
    check_settings(path.with_name(f"{path.name}.toml"))


def check_images_folder(path: Path) -> None:
    """Refuses to replace settings that are not ours."""
    check_settings(path / CONFIG)


def check_settings(path: Path) -> None:
    """Refuses to replace a file that does not hold settings of `dfq`."""
    check_replaced(path, "settings beside -o", holds_settings(path))


def check_picture(path: Path, flag: str) -> None:
    """Refuses to write a picture where there is no folder, or over a file that is none of ours.

    Raises:
      UsageError: naming it.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{flag} {path}: its folder does not exist.")
    check_replaced(path, flag, is_our_picture(path))


def check_replaced(path: Path, flag: str, ours: bool) -> None:
    """Refuses a file that others wrote; one that is empty may be replaced."""
    if not os.path.lexists(path) or ours:
        return
    if path.is_file() and path.stat().st_size == 0:
        return
    raise UsageError(
        f"{flag} {path}: there is something else of that name, not written by dfq_jax as it is; "
        "files of others are never replaced. Choose another name, or move it."
    )


def holds_settings(path: Path) -> bool:
    """Whether a file is TOML as `dfq` writes it."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return False
    return "schema_version" in content and set(content) <= {"schema_version", MODEL, *VERBS}


def check_apart(**places: str | Path | None) -> None:
    """Refuses options that name one file twice, or an input that an output folder replaces.

    Args:
      places: {option: its path}; inputs first, of which MODEL may also be the name of a network.

    Raises:
      UsageError: naming two of them.
    """
    paths = {name: Path(path) for name, path in places.items() if path is not None}
    given = [(name, path) for name, path in paths.items() if name != "MODEL" or path.is_file()]
    for (name, path), (other, place) in combinations(given, 2):
        if is_same(path, place):
            raise UsageError(f"{name} and {other} are both {place}: give them names apart.")
        if place.is_dir() and is_same(path.parent, place) and path.name in OWN_FILES:
            raise UsageError(
                f"{name} {path} lies in {other} {place}, whose files are replaced: choose another "
                "output."
            )


def is_same(a: Path, b: Path) -> bool:
    """Whether two paths mean one file."""
    with contextlib.suppress(OSError):
        return a.samefile(b)
    return a.absolute() == b.absolute() or a.resolve() == b.resolve()
