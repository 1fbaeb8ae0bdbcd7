import errno
import json
import os
import pickle
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import DataError, ResourceError
from dfq_jax.examples import Examples
from dfq_jax.io.artifacts.images import load_images, save_images
from dfq_jax.types import InputContract

CONTRACT = InputContract(4, 6, (0.5,), (0.25,), resize=5, interpolation="bicubic", assumed=True)


@pytest.fixture
def images():
    values = np.random.default_rng(0).normal(size=(3, 4, 6, 1)).astype(np.float32)
    return Examples(
        (jnp.asarray(values),), (CONTRACT,), {"method": "dsg", "losses": [1.5, None], "ü": 1}
    )


def saved(path, **arrays):
    np.savez(path, allow_pickle=True, **arrays)
    return path


def parts(**changes):
    contract = {"height": 4, "width": 6, "mean": [0.5], "std": [0.25]}
    return {
        "images": np.zeros((2, 4, 6, 1), np.float32),
        "contract": np.array(json.dumps(contract)),
        "provenance": np.array("{}"),
    } | changes


def test_images_come_back_bit_by_bit_with_all_that_is_known(images, tmp_path):
    path = tmp_path / "bilder ü 1.npz"
    save_images(path, images)
    found = load_images(path)
    np.testing.assert_array_equal(found.images, images.images)
    assert found.images.dtype == jnp.float32
    assert found.contract == CONTRACT
    assert found.provenance == images.provenance
    assert os.listdir(tmp_path) == [path.name]
    first = path.read_bytes()
    save_images(path, found)
    assert path.read_bytes() == first


def test_others_find_the_images_under_their_name(images, tmp_path):
    save_images(tmp_path / "i.npz", images)
    with np.load(tmp_path / "i.npz", allow_pickle=False) as raw:
        assert set(raw) == {"images", "contract", "provenance"}
        assert (raw["images"].shape, raw["images"].dtype) == ((3, 4, 6, 1), np.float32)


def test_a_full_disk_keeps_the_old_images(images, tmp_path, monkeypatch):
    path = tmp_path / "i.npz"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"i\.npz: No space left"):
        save_images(path, images)
    assert path.read_bytes() == b"old"


def test_cut_at_any_place_is_refused(images, tmp_path):
    path = tmp_path / "i.npz"
    save_images(path, images)
    data = path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(DataError, match=r"i\.npz is not an image set of dfq_jax"):
            load_images(path)


def test_flipped_bits_are_refused_or_harmless(images, tmp_path):
    """The archive has checksums of its contents, not of all its headers."""
    path = tmp_path / "i.npz"
    save_images(path, images)
    data = path.read_bytes()
    for place in range(0, len(data), 11):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        try:
            found = load_images(path)
        except DataError:
            continue
        np.testing.assert_array_equal(found.images, images.images)


class Canary:
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"text", pickle.dumps(Canary()), b"\x93NUMPY\x01\x00"]
)
def test_other_files_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("i.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"i\.npz is not an image set.*dfq synthesize"):
        load_images("i.npz")
    assert os.listdir() == ["i.npz"]


def test_other_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 6, 1), np.float32))
    with pytest.raises(DataError, match=r"a\.npy is not an image set"):
        load_images(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"has no manifest\.json: it is not a finished set"):
        load_images(tmp_path)
    with pytest.raises(DataError, match=r"no image set at .*b\.npz; make one"):
        load_images(tmp_path / "b.npz")


def nan_images():
    values = np.zeros((2, 4, 6, 1), np.float32)
    values[1, 0, 0, 0] = np.nan
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.array([Canary()])}, "is not an image set"),
        ({"images": np.zeros((2, 4, 6, 1))}, r"holds float64 \(2, 4, 6, 1\), its contract says"),
        ({"images": np.zeros((2, 6, 4, 1), np.float32)}, r"float32 \(n, 4, 6, 1\), n >= 1"),
        ({"images": np.zeros((2, 24), np.float32)}, r"holds float32 \(2, 24\)"),
        ({"images": np.zeros((0, 4, 6, 1), np.float32)}, r"holds float32 \(0, 4, 6, 1\)"),
        ({"images": nan_images()}, "NaN or infinite pixels"),
        ({"contract": np.array("{")}, "is not an image set"),
        ({"contract": np.array("[]")}, r"i\.npz is not an image set"),
        ({"contract": np.array('{"height": 4}')}, r"i\.npz .*cannot read the input contract"),
        ({"contract": np.array('{"height": 0, "width": 6}')}, "needs a positive size"),
        ({"provenance": np.array("[1]")}, r"says \[1\] about its making"),
        ({"provenance": np.array("nonsense")}, "is not an image set"),
    ],
)
def test_contents_that_do_not_fit_are_named(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "i.npz", **parts(**change))
    with pytest.raises(DataError, match=message):
        load_images(path)
    assert not Path("canary").exists()


@pytest.mark.parametrize("gone", ["images", "contract", "provenance"])
def test_nothing_may_be_missing(gone, tmp_path):
    arrays = parts()
    del arrays[gone]
    with pytest.raises(DataError, match=f"is not an image set.*{gone}"):
        load_images(saved(tmp_path / "i.npz", **arrays))
