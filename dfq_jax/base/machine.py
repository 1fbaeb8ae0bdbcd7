"""How the command line uses the machine it runs on: devices, memory, kept programs.

The library leaves all of JAX's settings alone; here a program of its own sets them, before JAX
looks for devices. Nothing here imports it before it is needed: help takes none.
"""

import contextlib
import dataclasses
import importlib
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dfq_jax.base.words import Precision

WORTH_KEEPING = 0.05
"""Seconds of compilation from which on a program is kept for the next run: reading one takes
hundredths."""
SEEN = "looked-at"
"""A file beside kept programs, as old as the last look for halves."""
ZLIB, ZSTD = 0x78, b"\x28\xb5\x2f\xfd"
"""How programs begin that are packed so."""


@dataclasses.dataclass(frozen=True)
class MachineOptions:
    """What to use of the machine.

    Attributes:
      devices: Devices to use; a CPU counts as any number.
      together: Devices share every batch, instead of each making its own.
      memory: Memory a step may take on a device, e.g. 4GiB; splits batches.
      dtype: Precision of weights and activations.
      remat: Compute activations again instead of keeping them.
      process: Index of this process among those that fill one folder.
      processes: How many processes fill the folder.
    """

    devices: int = 1
    together: bool = False
    memory: str | None = None
    dtype: Precision = "float32"
    remat: bool = False
    process: Annotated[int | None, Parameter(env_var="DFQ_PROCESS")] = None
    processes: Annotated[int | None, Parameter(env_var="DFQ_PROCESSES")] = None


def count_cpu_as(devices: int) -> None:
    """Lets the CPU count as so many devices, where it is what JAX will use.

    Of no effect on accelerators, nor once JAX has looked for devices.
    """
    if devices > 1:
        import jax

        with contextlib.suppress(RuntimeError):  # it has
            jax.config.update("jax_num_cpu_devices", devices)


def keep_programs() -> None:
    """Keeps compiled programs for the next run, in `$DFQ_CACHE` or the user's cache folder.

    Where that cannot be written to, nothing is kept.
    """
    import jax

    folder = cache_folder() / "xla"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            remove_halves(folder)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def remove_halves(folder: Path) -> None:
    """Removes programs that a kill or a full disk left half written.

    JAX writes them in place, cannot read what is cut, and never replaces it: it would warn and
    compile anew at every run. Only what came since the last look is looked at.
    """
    seen, now = folder / SEEN, time.time()
    last = seen.stat().st_mtime if seen.exists() else 0.0
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= last and not is_whole(path.read_bytes()):
                path.unlink()
    seen.touch()
    os.utime(seen, (now, now))


def is_whole(data: bytes) -> bool:
    """Whether a kept program can be unpacked to its end, as far as can be told from here."""
    if not any(data[:8]):
        return False
    try:
        if data[0] == ZLIB:
            zlib.decompress(data)
        elif data.startswith(ZSTD):
            importlib.import_module("zstandard").ZstdDecompressor().decompress(data)
    except ImportError:
        return True
    except Exception:  # each packer has errors of its own
        return False
    return True


def cache_folder() -> Path:
    """Where this system keeps what can be made again; `$DFQ_CACHE` overrules it."""
    if named := os.environ.get("DFQ_CACHE"):
        return Path(named)
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "dfq_jax"
