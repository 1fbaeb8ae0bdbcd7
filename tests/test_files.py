import datetime
import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import dfq_jax.base.files
from dfq_jax.base.files import born, owned, sha256_of, write_atomically
from dfq_jax.errors import ResourceError, UsageError


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


def test_what_a_kill_left_of_a_file_goes_when_it_is_written_again(tmp_path):
    """Of this file alone, and not what another process still writes."""
    script = (
        "import os, sys\nfrom dfq_jax.base.files import write_atomically\n"
        "write_atomically(sys.argv[1], lambda file: os._exit(9))"
    )
    for name in ("out.bin", "other.bin"):
        ran = subprocess.run([sys.executable, "-c", script, str(tmp_path / name)])
        assert ran.returncode == 9
    assert len(os.listdir(tmp_path)) == 2

    def another_writes(file):
        file.write(b"late")
        write_atomically(tmp_path / "out.bin", b"new")
        assert (tmp_path / "out.bin").read_bytes() == b"new"
        assert len(os.listdir(tmp_path)) == 3  # out.bin, this one and other.bin's

    write_atomically(tmp_path / "out.bin", another_writes)
    assert (tmp_path / "out.bin").read_bytes() == b"late"
    assert len(os.listdir(tmp_path)) == 2


def test_a_temporary_file_that_somebody_removed_is_made_again(tmp_path, monkeypatch):
    hold, taken = dfq_jax.base.files.hold, []

    def robbed(file, **how):
        held = hold(file, **how)
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)
        return held

    monkeypatch.setattr(dfq_jax.base.files, "hold", robbed)
    write_atomically(tmp_path / "out.bin", b"new")
    assert os.listdir(tmp_path) == ["out.bin"]
    assert len(taken) == 1


CHILD = """
import sys, time
from dfq_jax.base.files import owned
with owned(sys.argv[1], "run"):
    print("owner", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that owns `tmp_path`."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(dfq_jax.base.files.__file__).parents[2])},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"owner\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def enter(folder, name="run"):
    with owned(folder, name):
        return json.loads((folder / f"{name}.lock").read_text())


def test_a_folder_is_owned_while_it_is_written(tmp_path):
    folder = tmp_path / "new" / "state"
    mine = enter(folder)
    assert (mine["host"], mine["pid"]) == (socket.gethostname(), os.getpid())
    since = datetime.datetime.fromisoformat(mine["since"])
    assert abs((datetime.datetime.now(datetime.UTC) - since).total_seconds()) < 60
    assert os.listdir(folder) == []
    with pytest.raises(RuntimeError, match="failed inside"), owned(folder, "run"):
        raise RuntimeError("failed inside")
    assert os.listdir(folder) == []


def test_a_living_owner_is_named(tmp_path, owner):
    message = rf"{tmp_path} is being written by process {owner.pid} on \S+ since 2\S+\. .*run\.lock"
    with pytest.raises(UsageError, match=message):
        enter(tmp_path)
    enter(tmp_path, "another")  # has nothing to do with it
    assert os.listdir(tmp_path) == ["run.lock"]
    with owned(tmp_path, "mine"), pytest.raises(UsageError, match=f"process {os.getpid()} on"):
        enter(tmp_path, "mine")  # nor twice in one process


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, owner, reaped):
    """Also while its parent has not yet heard of its death."""
    owner.kill()
    if reaped:
        owner.wait()
    else:
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == owner.pid
    assert enter(tmp_path)["pid"] == os.getpid()


def lock_of(tmp_path, **changes):
    """Leaves a lock of this very process, with some of what it says changed."""
    with owned(tmp_path, "run"):
        text = (tmp_path / "run.lock").read_text()
    (tmp_path / "run.lock").write_text(json.dumps(json.loads(text) | {"held": False} | changes))


def test_a_lock_of_an_earlier_process_of_the_same_number_is_taken_over(tmp_path):
    """As in a container that was started again."""
    lock_of(tmp_path, born="before the last boot 1")
    assert enter(tmp_path)["born"] == born(os.getpid()) != "before the last boot 1"


def test_a_lock_of_another_container_is_taken_over_once_its_owner_is_gone(tmp_path, owner):
    """Hosts have other names there and numbers of processes mean nothing; the hold of it tells."""
    path = tmp_path / "run.lock"
    text = json.loads(path.read_text())
    with path.open("r+") as file:  # the owner keeps it open, so it is written in place
        file.write(json.dumps(text | {"host": "c0ffee", "pid": 1}))
        file.truncate()
    with pytest.raises(UsageError, match=r"process 1 on c0ffee since .* delete \S+run\.lock"):
        enter(tmp_path)
    owner.kill()
    owner.wait()
    assert enter(tmp_path)["pid"] == os.getpid()
    lock_of(tmp_path, host="c0ffee", pid=1, held=True, born="another boot 1")
    with pytest.raises(UsageError, match="process 1 on c0ffee"):  # nobody can know
        enter(tmp_path)


def test_a_lock_of_another_machine_is_respected(tmp_path):
    lock_of(tmp_path, host="elsewhere", pid=1, born=None)
    with pytest.raises(UsageError, match="process 1 on elsewhere since"):
        enter(tmp_path)
    assert (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("content", [b"", b'{"host": "x"', b"[]", b'{"host": "x"}', b"[" * 9999])
def test_a_lock_that_was_never_written_to_its_end_is_taken_over(tmp_path, monkeypatch, content):
    monkeypatch.setattr("dfq_jax.base.files.PATIENCE", 0.05)
    (tmp_path / "run.lock").write_bytes(content)
    assert enter(tmp_path)["pid"] == os.getpid()


def test_a_lock_that_is_being_written_is_waited_for(tmp_path):
    lock_of(tmp_path, host="elsewhere")
    whole = (tmp_path / "run.lock").read_bytes()
    (tmp_path / "run.lock").write_bytes(b"")
    timer = threading.Timer(0.2, (tmp_path / "run.lock").write_bytes, (whole,))
    timer.start()
    with pytest.raises(UsageError, match="on elsewhere"):
        enter(tmp_path)
    timer.join()


def test_only_one_of_many_takes_a_stale_lock_over(tmp_path):
    """Every thread has its own idea of the lock; the one that got it keeps it."""
    lock_of(tmp_path, born="long ago")
    start, release, outcomes = threading.Barrier(8), threading.Event(), []

    def contend():
        start.wait()
        try:
            with owned(tmp_path, "run"):
                outcomes.append("owner")
                release.wait(10)
        except UsageError:
            outcomes.append("refused")

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(outcomes) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    release.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["owner"] + ["refused"] * 7
    assert os.listdir(tmp_path) == []


def test_a_lock_somebody_else_has_taken_is_left_alone(tmp_path):
    with owned(tmp_path, "run"):
        (tmp_path / "run.lock").write_text("not mine any more")
    assert (tmp_path / "run.lock").read_text() == "not mine any more"


def test_a_lock_in_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot write"):
        enter(tmp_path / "file" / "state")
