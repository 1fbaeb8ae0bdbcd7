import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import dfq_jax
from dfq_jax.machine import cache_folder, count_cpu_as, keep_programs

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
        "from dfq_jax.machine import count_cpu_as; count_cpu_as(5);"
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


def test_programs_are_kept_where_the_user_says(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("DFQ_CACHE", str(tmp_path / "a" / "cache"))
    keep_programs()
    assert settings == dict(
        zip(SETTINGS, (str(tmp_path / "a" / "cache" / "xla"), 0.5), strict=True)
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
