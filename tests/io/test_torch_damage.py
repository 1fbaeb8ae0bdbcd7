"""Checkpoints of `torch.save` that are damaged, or made to do harm."""

import contextlib
import io
import itertools
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_files import (
    FORMATS,
    RAW,
    Rebuilt,
    dump,
    floats,
    forged_zip,
    load,
    mixed_tensors,
    rewrite,
    saved,
)

from dfq_jax.errors import CheckpointError, DfqError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.readers.checkpoint import read_checkpoint
from dfq_jax.io.readers.torch_checkpoint import MAGIC_NUMBER
from dfq_jax.io.readers.zip_members import ZipMembers

pytestmark = pytest.mark.torch


class Canary:
    """Creates a file when unpickled by a careless reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def canary_files(canary: Path) -> dict[str, bytes]:
    tensors = mixed_tensors()
    evil = pickle.dumps(Canary(canary), 2)
    inst = b"(S'touch " + str(canary).encode() + b"'\niposix\nsystem\n."
    plain = saved(tensors)
    inner = zipfile.ZipFile(io.BytesIO(plain))
    pkl = inner.read(f"{inner.namelist()[0].split('/')[0]}/data.pkl")
    files = {}
    for form, protocol in itertools.product(FORMATS, (2, 4)):
        files[f"{form} {protocol} alone"] = saved(Canary(canary), form, protocol)
        files[f"{form} {protocol} after"] = saved({**tensors, "x": Canary(canary)}, form, protocol)
        beside = {"state_dict": tensors, "args": [Canary(canary)]}
        files[f"{form} {protocol} beside"] = saved(beside, form, protocol)
    files["zip trailing"] = rewrite(plain, {"data.pkl": pkl + evil})
    files["zip trailing broken"] = rewrite(plain, {"data.pkl": pkl + b"\xff\xff" + evil})
    files["zip broken"] = rewrite(plain, {"data.pkl": evil[:-1] + b"\xff"})
    files["zip inst"] = rewrite(plain, {"data.pkl": inst})
    files["zip protocol 0"] = rewrite(plain, {"data.pkl": pickle.dumps(Canary(canary), 0)})
    stream = saved(tensors, "stream")
    files["stream trailing"] = stream + evil
    files["stream trailing broken"] = stream + b"\x00\xff." + evil
    files["stream trailing inst"] = stream + inst
    files["stream system info"] = dump(MAGIC_NUMBER) + dump(1001) + evil + stream
    keys = stream.rindex(b"\x80\x02]")  # the list of storage keys
    files["stream keys"] = stream[:keys] + evil
    for protocol in (0, 2, 4):
        files[f"plain pickle {protocol}"] = pickle.dumps(Canary(canary), protocol)
    files["plain inst"] = inst
    return files


def test_code_is_refused_and_never_runs(tmp_path):
    canary = tmp_path / "canary"
    for name, data in canary_files(canary).items():
        with pytest.raises(UnsafeInputError, match=r"posix\.system") as caught:
            load(data, tmp_path)
        assert caught.value.exit_code == 6, name
        assert not canary.exists(), name


def two_tensors(form: str) -> bytes:
    torch.manual_seed(0)
    return saved({"state_dict": {"w": torch.randn(30, 10), "b": torch.randn(3)}, "epoch": 3}, form)


@pytest.mark.parametrize("form", FORMATS)
def test_every_truncation_is_a_typed_error(form, tmp_path):
    data = two_tensors(form)
    for percent in range(100):
        with pytest.raises(CheckpointError, match=r"net\.pth"):
            load(data[: len(data) * percent // 100], tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_trailing_bytes(form, tmp_path):
    if form == "stream":
        with pytest.raises(CheckpointError, match="9 bytes follow the last storage"):
            load(two_tensors(form) + b"some junk", tmp_path)
    else:
        pkl = dump({"w": Rebuilt(floats(), 0, (6,), (1,))}) + b"junk"
        data = rewrite(forged_zip({}, {"0": RAW}), {"data.pkl": pkl})
        with pytest.raises(CheckpointError, match=r"net\.pth/data\.pkl is damaged.*4 bytes follow"):
            load(data, tmp_path)


def test_changed_bytes_fail_the_checksum(tmp_path):
    data = saved({"w": torch.arange(100.0)})
    at = data.index(np.float32(50).tobytes() + np.float32(51).tobytes())
    broken = data[:at] + b"\x01" + data[at + 1 :]
    with pytest.raises(CheckpointError, match=r"member \w+/data/0 at byte \d+: wrong checksum"):
        load(broken, tmp_path)


def archive_of(names: list[str], content: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in names:
            target.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "C:/x", "a/..", "..\\x", "a\\..\\x", "a\x1bb", "~/x"],
)
def test_names_that_leave_the_folder(name, tmp_path):
    with pytest.raises(UnsafeInputError, match="outside its folder"):
        load(archive_of(["a/data.pkl", name]), tmp_path)


def test_repeated_names(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        data = archive_of(["a/data.pkl", "a/data/0", "a/data.pkl"])
    with pytest.raises(UnsafeInputError, match="same name"):
        load(data, tmp_path)


def test_too_many_members(tmp_path):
    head = archive_of(["a/data.pkl"])
    start = head.index(b"PK\x01\x02")
    entry, end = head[start : head.index(b"PK\x05\x06")], head[head.index(b"PK\x05\x06") :]
    count = 1_000_000
    end = end[:8] + struct.pack("<HHLL", 0xFFFF, 0xFFFF, count * len(entry), start) + b"\0\0"
    data = head[:start] + entry * count + end
    begin = time.perf_counter()
    with pytest.raises(UnsafeInputError, match="more than 100,000 members"):
        load(data, tmp_path)
    assert time.perf_counter() - begin < 3


def deflated(content: bytes) -> bytes:
    return rewrite(forged_zip({}, {}), {"data/0": content}, zipfile.ZIP_DEFLATED)


def test_declared_bomb(tmp_path):
    begin = time.perf_counter()
    with pytest.raises(UnsafeInputError, match="zip bomb"):
        load(deflated(bytes(100_000_000)), tmp_path)
    assert time.perf_counter() - begin < 5


def test_bomb_that_lies_about_its_size():
    data = bytearray(deflated(bytes(100_000_000)))
    at = data.rindex(b"PK\x01\x02")  # the last member
    data[at + 24 : at + 28] = struct.pack("<L", 1000)
    archive = ZipMembers(bytes(data), "net.pth")
    begin = time.perf_counter()
    with pytest.raises(UnsafeInputError, match="more than the 1000 bytes it claims"):
        archive.read(archive.names[-1])
    assert time.perf_counter() - begin < 1


def read_first_member(data: bytes) -> None:
    archive = ZipMembers(data, "net.pth")
    archive.read(archive.names[0])


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, struct.pack("<H", 1), "encrypted"),
        (10, struct.pack("<H", 12), "compression method 12"),
        (24, struct.pack("<L", 5), "two different sizes"),
        (42, struct.pack("<L", 3), "no local header"),
        (46, b"X", "another name"),
    ],
)
def test_strange_directory_entries(at, value, message, tmp_path):
    data = bytearray(archive_of(["a/data.pkl"]))
    start = data.index(b"PK\x01\x02") + at
    data[start : start + len(value)] = value
    with pytest.raises(CheckpointError, match=message):
        read_first_member(bytes(data))


def test_a_zip_of_something_else(tmp_path):
    with pytest.raises(CheckpointError, match=r"without data\.pkl.*it holds a/readme, a/photo"):
        load(archive_of(["a/readme", "a/photo"]), tmp_path)
    with pytest.raises(CheckpointError, match="empty or split zip"):
        load(archive_of([]), tmp_path)


def test_torchscript_is_refused_with_the_recipe(tmp_path):
    path = tmp_path / "net.pt"
    names = ["net/data.pkl", "net/code/__torch__/net.py", "net/constants.pkl", "net/version"]
    path.write_bytes(archive_of(names))
    with pytest.raises(UnsupportedModelError, match=r"TorchScript.*torch\.export\.save"):
        read_checkpoint(path)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 3}, lambda m: [m]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whole_modules_are_refused_with_the_recipe(form, wrap, tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    with pytest.raises(UnsupportedModelError, match=r"whole pickled model.*model\.state_dict\(\)"):
        load(saved(wrap(net), form), tmp_path)


def mutate(data: st.DataObject, form: str) -> bytes:
    blob = bytearray(two_tensors(form))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(blob) - 1))
        blob[start : start + data.draw(st.integers(1, 3))] = data.draw(st.binary(max_size=4))
    return bytes(blob)


def check_mutation(data: st.DataObject, form: str, folder: Path) -> None:
    blob = mutate(data, form)
    begin = time.perf_counter()
    with contextlib.suppress(DfqError):
        load(blob, folder)
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("form", FORMATS)
def test_mutated_files_end_in_tensors_or_a_typed_error(form, tmp_path):
    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def run(data):
        check_mutation(data, form, tmp_path)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_many_mutated_files_end_in_tensors_or_a_typed_error(form, tmp_path):
    @settings(max_examples=10_000, deadline=None)
    @given(st.data())
    def run(data):
        check_mutation(data, form, tmp_path)

    run()
