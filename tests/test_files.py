import errno
import hashlib
import os

import pytest

from dfq_jax.errors import ResourceError, UsageError
from dfq_jax.files import sha256_of, write_atomically


def test_writes_bytes_and_through_a_function(tmp_path):
    path = tmp_path / "größe 1.bin"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    write_atomically(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == [path.name]


def test_new_files_get_the_usual_permissions(tmp_path):
    write_atomically(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (errno.ENOSPC, ResourceError, "free some space"),
        (errno.EROFS, UsageError, "choose a folder"),
        (errno.EACCES, UsageError, "choose a folder"),
        (errno.EIO, ResourceError, "fault"),
    ],
)
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, number, kind, remedy):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match=rf"out\.bin.*{remedy}"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.bin"]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "out.bin", interrupted)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_and_an_impossible_name_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="folder exists"):
        write_atomically(tmp_path / "absent" / "x", b"")
    with pytest.raises(UsageError, match="too long"):
        write_atomically(tmp_path / ("n" * 300), b"")


def test_sha256_of_reads_in_pieces(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(data).hexdigest()
