import errno
import hashlib
import json
import os
import pickle
import time
import zipfile
from typing import Any

import grain
import numpy as np
import pytest

from dfq_jax.base.files import write_atomically
from dfq_jax.errors import DataError, UsageError
from dfq_jax.synthesis.run.shards import (
    MANIFEST,
    ImageShards,
    ShardSet,
    begin_set,
    finish_set,
    load_shards,
    write_shard,
)
from dfq_jax.types import InputContract

CONTRACT = InputContract(6, 5, (0.5, 0.4, 0.3), (0.5, 0.25, 1.0), resize=8)
FACTS = {"method": "zeroq", "seed": 5, "settings": {"rate": 0.5, "pair": [1, 2]}}
IMAGES = np.random.default_rng(0).normal(size=(12, 6, 5, 3)).astype(np.float32)


def a_set(folder, **changes):
    """Eleven images in shards of four."""
    return ShardSet(**{"folder": folder, "n": 11, "size": 4, "contract": CONTRACT} | changes)


def write_all(shards, process=0):
    for index in range(shards.count):
        write_shard(shards, index, IMAGES[4 * index : 4 * index + 4])


@pytest.fixture
def folder(tmp_path):
    """A finished set."""
    shards = a_set(tmp_path / "set", provenance=FACTS)
    assert not begin_set(shards, tmp_path / "state")
    write_all(shards)
    assert finish_set(shards)
    return shards.folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_set_on_disk(folder):
    names = [f"shard-0000{i}-of-00003.npz" for i in range(3)]
    assert sorted(os.listdir(folder)) == [MANIFEST, *names]
    manifest = json.loads((folder / MANIFEST).read_text())
    shards = manifest.pop("shards")
    assert manifest == {
        "format": "dfq_jax images",
        "version": 1,
        "n": 11,
        "size": 4,
        "provenance": FACTS,
        "contract": {
            "height": 6,
            "width": 5,
            "mean": [0.5, 0.4, 0.3],
            "std": [0.5, 0.25, 1.0],
            "resize": 8,
            "interpolation": "bilinear",
            "assumed": False,
            "layout": "NCHW",
            "names": ["N", "", ""],
        },
    }
    for index, (name, entry) in enumerate(zip(names, shards, strict=True)):
        data = (folder / name).read_bytes()
        wanted = {"file": name, "images": (4, 4, 3)[index], "bytes": len(data)}
        assert entry == wanted | {"sha256": hashlib.sha256(data).hexdigest()}
        with np.load(folder / name) as saved:
            assert saved.files == ["images"]
            assert saved["images"].dtype == np.float32
            np.testing.assert_array_equal(saved["images"], IMAGES[4 * index :][: entry["images"]])


def test_equal_sets_have_equal_bytes_whenever_they_were_made(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(2e9))
    later = a_set(tmp_path / "later", provenance=dict(reversed(FACTS.items())))
    begin_set(later, tmp_path / "later state")
    write_all(later, process=1)
    assert finish_set(later)
    assert contents(later.folder) == contents(folder)
    assert finish_set(later)  # by another process that notices too
    assert contents(later.folder) == contents(folder)


def test_the_manifest_comes_last(tmp_path):
    shards = a_set(tmp_path / "set", provenance=FACTS)
    begin_set(shards, tmp_path / "state")
    for index in (2, 0):
        write_shard(shards, index, IMAGES[4 * index : 4 * index + 4])
        assert not finish_set(shards)
        assert not (shards.folder / MANIFEST).exists()
    with pytest.raises(
        DataError, match=r"set has no manifest\.json: .* run the same command again"
    ):
        ImageShards(shards.folder)
    write_shard(shards, 1, IMAGES[4:8])
    assert finish_set(shards)


def test_a_full_disk_leaves_neither_half_a_shard_nor_half_a_manifest(tmp_path, monkeypatch):
    shards = a_set(tmp_path / "set", provenance=FACTS)
    begin_set(shards, tmp_path / "state")
    write_all(shards)

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(Exception, match="free some space"):
            write_shard(shards, 0, IMAGES[4:8])
        with pytest.raises(Exception, match="free some space"):
            finish_set(shards)
    assert len(os.listdir(shards.folder)) == 3
    assert finish_set(shards)
    np.testing.assert_array_equal(load_shards(shards.folder).images, IMAGES[:11])


def test_random_access(folder):
    source = ImageShards(folder)
    assert len(source) == 11
    for index in (0, 10, 3, 4, 7, 8, -1, -11, np.int64(5)):
        item = source[index]
        assert list(item) == ["image"]
        np.testing.assert_array_equal(item["image"], IMAGES[:11][index])
        assert item["image"].dtype == np.float32
        item["image"][:] = 0  # a copy of what is on disk
    np.testing.assert_array_equal(source[0]["image"], IMAGES[0])
    for index in (11, -12):
        with pytest.raises(IndexError, match=f"has 11 images, asked for number {index}"):
            source[index]
    assert (source.contract, source.provenance) == (CONTRACT, FACTS)


def test_grain_reads_it(folder):
    data: Any = grain.MapDataset.source(ImageShards(folder)).shuffle(seed=3).batch(4)
    batches = [data[i]["image"] for i in range(len(data))]
    assert [b.shape for b in batches] == [(4, 6, 5, 3), (4, 6, 5, 3), (3, 6, 5, 3)]
    order = lambda images: sorted(map(bytes, images))
    seen = np.concatenate(batches)
    assert order(seen) == order(IMAGES[:11])
    assert not np.array_equal(seen, IMAGES[:11])
    ordered = grain.MapDataset.source(ImageShards(folder)).to_iter_dataset()
    np.testing.assert_array_equal(np.stack([item["image"] for item in ordered]), IMAGES[:11])


def test_pickled_as_its_folder(folder):
    source = ImageShards(folder)
    assert source[5]["image"].shape == (6, 5, 3)
    data = pickle.dumps(source)
    assert len(data) < 500
    np.testing.assert_array_equal(pickle.loads(data)[5]["image"], IMAGES[5])
    assert repr(source) == f"ImageShards({str(folder)!r})"


def test_all_images_at_once(folder):
    images = load_shards(folder)
    np.testing.assert_array_equal(images.images, IMAGES[:11])
    assert (images.contract, images.provenance) == (CONTRACT, FACTS)


def damage(path, at, value=b"x"):
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 30, 80, -400, -5], ids=str)
def test_a_damaged_shard_is_named_when_it_is_looked_at(folder, at):
    path = folder / "shard-00001-of-00003.npz"
    damage(path, at if at >= 0 else path.stat().st_size + at)
    source = ImageShards(folder)
    np.testing.assert_array_equal(source[0]["image"], IMAGES[0])
    message = r"shard-00001-of-00003\.npz .*delete it, then run the command that made the set again"
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            source[4]
    with pytest.raises(DataError, match=message):
        load_shards(folder)


def test_a_shard_of_other_images_is_named(folder):
    """Of the right size, so that only the hash can tell."""
    path = folder / "shard-00001-of-00003.npz"
    with open(path, "wb") as file:
        np.savez(file, images=IMAGES[:4])
    with pytest.raises(DataError, match=r"00001-of-00003\.npz has the SHA-256 .* not that of"):
        ImageShards(folder)[4]


def test_a_shard_that_is_missing_or_cut_is_named_at_once(folder):
    path = folder / "shard-00002-of-00003.npz"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"00002-of-00003\.npz has {len(data) - 1} bytes, not"):
        ImageShards(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"00002-of-00003\.npz is missing\. Run the command"):
        ImageShards(folder)


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"images": IMAGES[:3]}, r"float32 \(3, 6, 5, 3\), expected float32 \(4, 6, 5, 3\)"),
        ({"images": IMAGES[:4].astype(np.float64)}, r"float64 \(4, 6, 5, 3\)"),
        ({"images": np.asfortranarray(IMAGES[:4])}, r"holds float32"),
        ({"pixels": IMAGES[:4]}, "cannot be read"),
    ],
    ids=["rows", "dtype", "order", "name"],
)
def test_a_set_is_not_finished_with_shards_of_something_else(tmp_path, arrays, found):
    shards = a_set(tmp_path / "set", provenance=FACTS)
    begin_set(shards, tmp_path / "state")
    write_all(shards)
    np.savez(shards.path(1), **arrays)
    with pytest.raises(DataError, match=rf"shard-00001-of-00003\.npz .*{found}"):
        finish_set(shards)
    np.savez_compressed(shards.path(1), images=IMAGES[:4])
    with pytest.raises(DataError, match=r"shard-00001-of-00003\.npz"):
        finish_set(shards)


def edited(folder, change):
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "not the manifest of an image set of version 1"),
        (lambda m: m.update(format="png"), "not the manifest of an image set"),
        (lambda m: m.update(n=12), "not the manifest of an image set"),
        (lambda m: m["shards"][0].update(file="../x.npz"), "not the manifest of an image set"),
        (lambda m: m["shards"][0].update(images=-4), "not the manifest of an image set"),
        (lambda m: m.pop("provenance"), "not the manifest of an image set"),
        (lambda m: m.pop("shards"), "is damaged"),
        (lambda m: m["shards"][0].pop("sha256"), "is damaged"),
        (lambda m: m["contract"].update(height=-1), "is damaged"),
        (lambda m: m["contract"].update(depth=1), "is damaged"),
        (lambda m: m.update(contract=3), "is damaged"),
    ],
)
def test_a_manifest_that_cannot_be(folder, change, message):
    edited(folder, change)
    with pytest.raises(DataError, match=rf"manifest\.json {message}|manifest\.json is {message}"):
        ImageShards(folder)


def test_a_manifest_that_is_no_json(folder):
    (folder / MANIFEST).write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged .*make the images anew"):
        ImageShards(folder)


def test_other_sets_in_the_folder_are_refused(folder, tmp_path):
    state = tmp_path / "new state"
    assert begin_set(a_set(folder, provenance=FACTS), tmp_path / "state")  # the same
    with pytest.raises(UsageError, match=r"different run:\n  seed: saved 5, now 6"):
        begin_set(a_set(folder, provenance=FACTS | {"seed": 6}), state)
    with pytest.raises(UsageError, match=r"different run:\n  n: saved 11, now 7"):
        begin_set(a_set(folder, provenance=FACTS, n=7), state)
    (folder / MANIFEST).unlink()
    message = r"holds 3 shards of an unknown run, e\.g\. shard-00000-of-00003\.npz; choose an empty"
    with pytest.raises(UsageError, match=message):
        begin_set(a_set(folder, provenance=FACTS), state)
    assert not state.exists()
    with pytest.raises(UsageError, match=r"state holds .* different run:\n  n: saved 11, now 7"):
        begin_set(a_set(folder, provenance=FACTS, n=7), tmp_path / "state")
    assert not begin_set(a_set(folder, provenance=FACTS), tmp_path / "state")  # its own


def test_what_a_kill_left_is_removed_and_what_somebody_writes_is_not(tmp_path):
    shards = a_set(tmp_path / "set", provenance=FACTS)
    begin_set(shards, tmp_path / "state")
    (shards.folder / ".tmp-1-2").write_bytes(b"half")

    def another_begins(file):
        file.write(b"half")
        begin_set(shards, tmp_path / "state")
        assert not (shards.folder / ".tmp-1-2").exists()

    write_atomically(shards.path(0), another_begins)
    assert os.listdir(shards.folder) == [shards.path(0).name]


def test_shards_are_stored_so_that_they_can_be_mapped(folder):
    """Read page by page: no copy of a shard is made until an image is."""
    source = ImageShards(folder)
    assert isinstance(source.shard(0), np.memmap)
    assert source.shard(0) is source.shard(0)
    with zipfile.ZipFile(folder / "shard-00000-of-00003.npz") as archive:
        (info,) = archive.infolist()
    assert (info.compress_type, info.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
