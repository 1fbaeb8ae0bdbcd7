"""`open_source`: which reader a spec selects, and the development data."""

import io
import zipfile
from pathlib import Path

import PIL.Image
import pytest

from dfq_jax.data.sources import open_source
from dfq_jax.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def shared(name: str) -> str:
    if not (SHARED / name).exists():
        pytest.skip(f"development data {name} is not beside the repository")
    return str(SHARED / name)


def test_folder_and_archive_specs(tmp_path):
    (tmp_path / "set/cat").mkdir(parents=True)
    PIL.Image.new("RGB", (2, 2)).save(tmp_path / "set/cat/1.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.write(tmp_path / "set/cat/1.png", "cat/1.png")
    for name, kind in (("set", "folder"), ("set.zip", "archive")):
        source = open_source(str(tmp_path / name))
        assert (source.kind, source.classes, len(source)) == (kind, ("cat",), 1)
        assert source.name == str(tmp_path / name)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "set/cat").mkdir(parents=True)
    PIL.Image.new("RGB", (2, 2)).save(tmp_path / "set/cat/1.png")
    assert len(open_source("~/set")) == 1


def test_nothing_there():
    with pytest.raises(DataError, match=r"no images at no/such/place: .*\.zip archive, or tfds:"):
        open_source("no/such/place")


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "set.tar"
    path.write_bytes(bytes(100))
    with pytest.raises(DataError, match=r"set\.tar: it is neither a folder nor .* \(100 bytes\)"):
        open_source(str(path))


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="found 0 files"):
        open_source(str(tmp_path))


def test_an_empty_archive(tmp_path):
    zipfile.ZipFile(tmp_path / "set.zip", "w").close()
    with pytest.raises(DataError, match="found 0 files"):
        open_source(str(tmp_path / "set.zip"))


def test_cifar_archive():
    path = shared("cifar10-jpeg-test.zip")
    source = open_source(path)
    assert source.classes == CIFAR
    assert len(source) == 10_000
    image, label = source[2013]
    assert (image.size, image.mode, label) == ((32, 32), "RGB", 2)
    with zipfile.ZipFile(path) as archive:
        expected = PIL.Image.open(io.BytesIO(archive.read("test/bird/0013.jpg")))
        assert image.tobytes() == expected.tobytes()


def test_imagenet_folder():
    source = open_source(shared("imagenet-sample"))
    assert len(source) == len(source.classes) == 1000
    assert list(source.classes) == sorted(source.classes)
    image, label = source[999]
    assert (image.size, label) == ((256, 256), 999)
    assert source.classes[0] == "n01440764"
