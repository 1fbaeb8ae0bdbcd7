import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest

import dfq_jax
from dfq_jax.base.machine import SEEN, cache_folder, count_cpu_as, is_whole, keep_programs

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def settings(monkeypatch):
    """What would be set, noted instead."""
    noted = {}
    monkeypatch.setattr(jax.config, "update", noted.__setitem__)
    return noted


def test_the_cpu_counts_as_many(settings):
    count_cpu_as(1)
    assert settings == {}
    count_cpu_as(6)
    assert settings == {"jax_num_cpu_devices": 6}


def test_once_jax_has_devices_they_stay():
    assert jax.local_device_count() == 8
    count_cpu_as(3)
    assert jax.local_device_count() == 8


def test_in_a_process_of_its_own():
    program = (
        "from dfq_jax.base.machine import count_cpu_as; count_cpu_as(5);"
        "import jax; print(jax.local_device_count())"
    )
    place = {"PYTHONPATH": str(Path(dfq_jax.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | place,
    )
    assert found.stdout == "5\n"


def test_programs_that_are_half_written_are_removed(settings, monkeypatch, tmp_path):
    """Once; what was looked at before is not read again."""
    monkeypatch.setenv("DFQ_CACHE", str(tmp_path))
    whole, folder = zlib.compress(os.urandom(5000)), tmp_path / "xla"
    folder.mkdir()
    contents = {
        "a": whole,
        "b": whole[:-1],
        "c": b"",
        "d": bytes(99),
        "e": b"of a later JAX",
        "f": whole[:1],
    }
    for name, content in contents.items():
        (folder / f"jit_{name}-cache").write_bytes(content)
    kept = lambda: sorted(p.name[4] for p in folder.glob("*-cache"))
    keep_programs()
    assert kept() == ["a", "e"]
    for name in "gh":
        (folder / f"jit_{name}-cache").write_bytes(whole[:9])
    os.utime(folder / "jit_g-cache", (1, 1))
    keep_programs()
    assert kept() == ["a", "e", "g"]
    (folder / SEEN).unlink()
    keep_programs()
    assert kept() == ["a", "e"]
    monkeypatch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError))
    keep_programs()  # never stops a run


def test_what_jax_writes_is_whole(tmp_path):
    """And what is cut of it is not."""
    from jax._src import compilation_cache

    packed = compilation_cache.compress_executable(os.urandom(9000))
    assert is_whole(packed)
    assert not any(is_whole(packed[:size]) for size in range(0, len(packed), 97))


def test_programs_are_kept_where_the_user_says(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("DFQ_CACHE", str(tmp_path / "a" / "cache"))
    keep_programs()
    assert settings == dict(
        zip(SETTINGS, (str(tmp_path / "a" / "cache" / "xla"), 0.05), strict=True)
    )
    assert (tmp_path / "a" / "cache" / "xla").is_dir()


@pytest.mark.parametrize("case", ["a file", "read-only"])
def test_where_nothing_can_be_kept_nothing_is(case, settings, monkeypatch, tmp_path):
    monkeypatch.setenv("DFQ_CACHE", str(tmp_path / "cache"))
    if case == "a file":
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    keep_programs()
    assert settings == {}


@pytest.mark.parametrize(
    ("platform", "variable", "end"),
    [
        ("linux", "XDG_CACHE_HOME", "dfq_jax"),
        ("linux", None, ".cache/dfq_jax"),
        ("darwin", None, "Library/Caches/dfq_jax"),
        ("win32", "LOCALAPPDATA", "dfq_jax"),
    ],
)
def test_the_folder_of_a_system(platform, variable, end, monkeypatch, tmp_path):
    for name in ("DFQ_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv(variable or "HOME", str(tmp_path))
    assert cache_folder() == tmp_path / end


def test_the_library_keeps_nothing():
    """In a process of its own: programs of tests are kept."""
    script = f"import dfq_jax, jax; dfq_jax.quantize; print(jax.config.{SETTINGS[0]})"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=clean
    )
    assert ran.stdout == "None\n"
