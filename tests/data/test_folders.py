"""Class folders on disk and in archives: order, labels, and everything that is refused."""

import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import PIL.Image
import pytest

from dfq_jax.data import folders
from dfq_jax.data.folders import arrange, open_folder, open_zip
from dfq_jax.data.sources import open_source
from dfq_jax.errors import DataError, UnsafeInputError

PATHS = ("dog/10.png", "dog/2.png", "cat/1.png", "cat/sub/0.png", "ant/x.PNG")
ORDER = (
    ("ant/x.PNG", 0),
    ("cat/1.png", 1),
    ("cat/sub/0.png", 1),
    ("dog/2.png", 2),
    ("dog/10.png", 2),
)


def encoded(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root: Path, paths: tuple[str, ...]) -> Path:
    """Writes one image per path; its red value is the path's position."""
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(i))
    return root


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def red_and_label(source) -> list[tuple[int, int]]:
    return [(image.getpixel((0, 0))[0], label) for image, label in source]


@pytest.mark.parametrize("top", ["", "test/"])
def test_order_does_not_depend_on_how_paths_arrive(top):
    expected = [(top + path, label) for path, label in ORDER]
    for paths in (PATHS, PATHS[::-1]):
        classes, members = arrange([top + path for path in paths], "here")
        assert classes == ("ant", "cat", "dog")
        assert members == expected


def test_numbers_sort_by_value_and_ties_stay_fixed():
    names = ["a/10.png", "a/9.png", "a/009.png", "a/b.png", f"a/{'7' * 5000}.png"]
    _, members = arrange(names, "here")
    order = [path for path, _ in members]
    assert order == ["a/009.png", "a/9.png", "a/10.png", f"a/{'7' * 5000}.png", "a/b.png"]


def test_files_that_are_no_images_are_left_out():
    paths = ["a/1.jpg", "a/notes.txt", "README", ".DS_Store", "__MACOSX/a/1.jpg", "a/.2.jpg"]
    assert arrange(paths, "here") == (("a",), [("a/1.jpg", 0)])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], r"no images in here: found 0 files.*expected <class>/<image>"),
        (["a/x.txt", "b/y.npy"], "found 2 files, none an image"),
        (["1.jpg", "2.jpg"], r"2 of 2 images in here lie outside any class folder, e\.g\. 1\.jpg"),
        (["a/1.jpg", "stray.jpg"], r"1 of 2 images .* e\.g\. stray\.jpg"),
        (["train/a/1.jpg", "test/a/1.jpg"], "splits test, train instead of classes"),
    ],
)
def test_wrong_layouts_say_what_was_found(paths, message):
    with pytest.raises(DataError, match=message):
        arrange(paths, "here")


def test_folder_and_archive_read_alike(tmp_path):
    folder = open_folder(fill(tmp_path / "set", PATHS))
    members = {f"top/{path}": encoded(i) for i, path in enumerate(PATHS)}
    archive = open_zip(pack(tmp_path / "set.zip", {**members, "top/labels.csv": b"1,2"}))
    expected = [(4, 0), (2, 1), (3, 1), (1, 2), (0, 2)]
    assert red_and_label(folder) == red_and_label(archive) == expected
    assert folder.classes == archive.classes == ("ant", "cat", "dog")
    assert (folder.kind, archive.kind) == ("folder", "archive")
    assert getattr(folder[0][0], "filename", "").endswith("ant/x.PNG")
    assert getattr(archive[0][0], "filename", "").startswith("top/ant/x.PNG in ")


def test_links_are_followed_and_cycles_are_cut(tmp_path):
    store = fill(tmp_path / "store", ("x/1.png",))
    root = fill(tmp_path / "set", ("a/1.png",))
    (root / "b").symlink_to(store / "x", target_is_directory=True)
    (root / "b" / "loop").symlink_to(store, target_is_directory=True)
    (root / "a" / "up").symlink_to(root, target_is_directory=True)
    source = open_folder(root)
    assert source.classes == ("a", "b")
    assert len(source) == 2


def test_a_damaged_image_is_named_when_read(tmp_path):
    root = fill(tmp_path, ("a/1.png", "a/2.png"))
    (root / "a/1.png").write_bytes(b"broken")
    source = open_folder(root)
    with pytest.raises(DataError, match=r"cannot decode .*a/1\.png"):
        source[0]
    (root / "a/2.png").unlink()
    with pytest.raises(DataError, match=r"cannot read image .*a/2\.png"):
        source[1]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot list .*missing"):
        open_folder(tmp_path / "missing")


@pytest.mark.parametrize(
    "name", ["../a/1.png", "a/../../1.png", "/a/1.png", "C:/a/1.png", "a\\..\\1.png", "../x.txt"]
)
def test_archives_that_point_outside_are_refused(tmp_path, name):
    path = pack(tmp_path / "evil.zip", {"a/0.png": encoded(), name: encoded()})
    with pytest.raises(UnsafeInputError, match="points outside the archive"):
        open_zip(path)


def test_a_member_that_unpacks_too_large_is_refused_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MAX_MEMBER_BYTES", 1000)
    bomb = {"a/0.png": encoded(), "a/1.png": bytes(100_000)}
    with pytest.raises(UnsafeInputError, match=r"a/1\.png unpacks from \d+ to 100000 bytes"):
        open_zip(pack(tmp_path / "bomb.zip", bomb))
    harmless = {"a/0.png": encoded(), "weights.npy": bytes(100_000)}
    assert len(open_zip(pack(tmp_path / "fine.zip", harmless))) == 1


def test_a_member_that_lies_about_its_size_is_not_unpacked(tmp_path):
    """The declared size bounds what is read; the checksum then fails."""
    path = pack(tmp_path / "lie.zip", {"a/1.png": bytes(100_000)})
    data = bytearray(path.read_bytes())
    header = data.index(b"PK\x01\x02")
    data[header + 24 : header + 28] = (50).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot unpack a/1\.png in .*lie\.zip"):
        open_zip(path)[0]


def test_encrypted_and_damaged_archives_say_so(tmp_path):
    path = pack(tmp_path / "set.zip", {"a/1.png": encoded()})
    intact = path.read_bytes()
    locked = bytearray(intact)
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(magic) + offset] |= 1
    path.write_bytes(locked)
    with pytest.raises(DataError, match=r"a/1\.png in .* encrypted"):
        open_zip(path)
    path.write_bytes(intact[:-30])
    with pytest.raises(DataError, match=r"cannot open .*set\.zip as a zip archive"):
        open_zip(path)
    flipped = bytearray(intact)
    flipped[flipped.index(b"a/1.png") + 20] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(DataError, match=r"cannot (unpack|decode) a/1\.png in"):
        open_zip(path)[0]


def test_a_member_that_unpacks_to_more_than_it_claims_takes_no_memory(tmp_path):
    path = pack(tmp_path / "lie.zip", {"a/1.png": bytes(40 << 20)})
    data = bytearray(path.read_bytes())
    header = data.index(b"PK\x01\x02")
    data[header + 24 : header + 28] = (50).to_bytes(4, "little")
    path.write_bytes(data)
    source = open_zip(path)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"cannot unpack a/1\.png"):
        source[0]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_pipes_and_devices_are_not_read(tmp_path):
    """Which never end."""
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").symlink_to("/dev/zero")
    source = open_folder(tmp_path)
    for index in range(2):
        with pytest.raises(DataError, match=r"cannot read image .*no regular file"):
            source[index]
    os.mkfifo(tmp_path / "data.zip")
    for place in (tmp_path / "data.zip", "/dev/zero"):
        with pytest.raises(DataError, match="neither a folder nor a readable zip"):
            open_source(str(place))


def test_a_file_larger_than_any_picture_is_not_read_to_its_end(tmp_path, monkeypatch):
    fill(tmp_path, ("a/1.png",))
    with (tmp_path / "a" / "1.png").open("r+b") as file:
        file.truncate(5000)
    monkeypatch.setattr(folders, "MAX_MEMBER_BYTES", 1000)
    with pytest.raises(DataError, match="it has 5,000 bytes, allowed are 1,000"):
        open_folder(tmp_path)[0]
