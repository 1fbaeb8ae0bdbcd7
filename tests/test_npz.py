"""`.npz` files that are cut, foreign, or lie about their size."""

import io
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from dfq_jax.base.npz import SLACK, read_npz
from dfq_jax.errors import UnsafeInputError


def packed(compress=False, **arrays):
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("compress", [False, True])
def test_arrays_come_back(tmp_path, compress):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 4, 5)).astype(np.float32),
        "b": np.asfortranarray(rng.integers(0, 9, (4, 6))),
        "c": np.array("text"),
        "d": np.zeros((0, 3), np.uint8),
    }
    data = packed(compress, **arrays)
    (tmp_path / "x.npz").write_bytes(data)
    for source in (data, tmp_path / "x.npz"):
        found = read_npz(source, ("a", "b", "c"), optional=("d", "e"))
        assert set(found) == set("abcd")
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


def test_what_is_cut_or_changed_is_a_value_error():
    data = packed(a=np.arange(200, dtype=np.float32), b=np.array("text"))
    rng, whole = np.random.default_rng(0), 0
    for _ in range(400):
        bad = bytearray(data)
        if rng.random() < 0.4:
            del bad[rng.integers(len(bad)) :]
        for _ in range(rng.integers(1, 4)):
            if bad:
                bad[rng.integers(len(bad))] = rng.integers(256)
        try:
            found = read_npz(bytes(bad), ("a", "b"))
        except (ValueError, UnsafeInputError):
            continue
        whole += 1
        assert found["a"].shape == (200,)
    assert whole < 200


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "not a zip file"),
        (packed(x=np.zeros(2), y=np.zeros(2)), "it has no array 'a', but 'x', 'y'"),
        (packed(a=np.array([{}], object)), "holds Python objects"),
    ],
)
def test_foreign_ones_say_what_they_are(data, told):
    with pytest.raises(ValueError, match=told):
        read_npz(data, ("a",))


def header(shape):
    """A member that says how large it is, and is not."""
    buffer = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 20, 1 << 20, 3), (-4, -4), (9,)])
def test_a_header_that_lies_reserves_nothing(shape):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", header(shape) + bytes(8))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.npy says float32 .* bytes in all"):
        read_npz(buffer.getvalue(), ("a",))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_bombs_are_refused_and_members_that_hide_them_are_cut():
    zeros = np.zeros((SLACK >> 2) + (1 << 20), np.float32)
    bomb = packed(compress=True, a=zeros)
    with pytest.raises(UnsafeInputError, match=r"bytes claim to unpack to 71,\d\d\d,\d\d\d"):
        read_npz(bomb, ("a",))
    size, small = struct.pack("<L", zeros.nbytes + 128), struct.pack("<L", 128 + 40)
    assert bomb.count(size) == 2
    lying = bomb.replace(size, small)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.npy"):
        read_npz(lying, ("a",))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises((ValueError, OSError)):
            read_npz(path, ("a",))
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="no regular file"):
        read_npz(tmp_path / "zero", ("a",))
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "none", ("a",))
