"""The readers on files that are damaged, or made to do harm: typed errors, soon, and no harm."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forged
import hostile_graphs
import mutations
import pytest
import reading
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent


CORPUS = hostile_graphs.CORPUS
MOST_SECONDS = 2.0
STARTS = {
    "pth": (b"", b"PK\3\4", b"\x80\2", b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\2M\xe9\3."),
    "safetensors": (b"", b"\x10\0\0\0\0\0\0\0{"),
    "pt2": (b"", b"PK\3\4", b"PK\5\6" + bytes(18)),
    "onnx": (b"", b"\x08\x08", b"\x08\x08\x3a\x10"),
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # weights that overflow a cast


@pytest.fixture(autouse=True)
def no_harm() -> Iterator[None]:
    """No test may take 4 GiB more than there is, or leave the canary's file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    reading.limit_memory(4 << 30)
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert not mutations.CANARY.exists()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """{title, or reader: how it ended}: the corpus and mutated files, in a process of its own."""
    words = (sys.executable, "-W", "ignore", str(HERE / "reading.py"), "all", "1500")
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*words, str(tmp_path_factory.mktemp("corpus"))],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return {line["title"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("title", CORPUS)
def test_hostile_files_are_refused_and_do_no_harm(title, ends):
    case, end = CORPUS[title], ends[title]
    assert end["kind"] == case.error.__name__, end["text"]
    assert re.search(case.match, end["text"])
    assert end["text"].startswith("net.")
    assert end["events"] == []
    assert end["seconds"] < MOST_SECONDS
    assert end["grown"] < 64 * end["bytes"] + 200 * 2**20


def test_every_reader_has_hostile_files():
    count = {reader: 0 for reader in mutations.READERS}
    for case in CORPUS.values():
        count[case.reader] += 1
    assert min(count.values()) >= 10


@pytest.mark.parametrize("reader", mutations.READERS)
def test_healthy_files_are_read(reader, tmp_path):
    folder = forged.folder_for_onnx(tmp_path)
    for data in forged.seeds()[reader]:
        assert reading.ended(reader, data, folder).kind == "accepted"


@pytest.mark.torch
@pytest.mark.parametrize("reader", ["pth", "pt2", "onnx"])
def test_forged_files_are_like_those_of_pytorch(reader, tmp_path):
    pytest.importorskip("torch")
    for data in forged.torch_seeds()[reader]:
        assert reading.ended(reader, data, tmp_path).kind == "accepted"


@pytest.mark.parametrize("reader", mutations.READERS)
def test_a_number_stands_for_one_file(reader):
    files = [mutations.mutated(reader, number) for number in range(100)]
    assert files == [mutations.mutated(reader, number) for number in range(100)]
    assert len(set(files)) > 90
    assert files != [mutations.mutated(reader, number, seed=1) for number in range(100)]


@pytest.mark.parametrize("reader", mutations.READERS)
def test_mutated_files_are_read_or_refused(reader, ends):
    found = ends[reader]
    assert found["failures"] == []
    assert found["events"] == []
    assert found["count"] == 1500
    assert found["kinds"]["accepted"] > 15
    assert len(found["kinds"]) > 2


@pytest.mark.parametrize("reader", mutations.READERS)
def test_mutated_files_meet_the_annotations(reader, tmp_path):
    found = reading.survey(reader, range(5000, 5060), 0, forged.folder_for_onnx(tmp_path))
    assert found["failures"] == []


@pytest.mark.parametrize("reader", mutations.READERS)
def test_any_bytes_are_read_or_refused(reader, tmp_path):
    folder = forged.folder_for_onnx(tmp_path)

    @settings(max_examples=40, deadline=None, database=None)
    @given(start=st.sampled_from(STARTS[reader]), rest=st.binary(max_size=200))
    def run(start: bytes, rest: bytes) -> None:
        end = reading.ended(reader, start + rest, folder)
        assert end.fine, end

    run()


@pytest.mark.slow
def test_mutated_files_for_a_minute(tmp_path):
    folder = forged.folder_for_onnx(tmp_path)
    start, first = time.monotonic(), 0
    while time.monotonic() - start < 60:
        for reader in mutations.READERS:
            found = reading.survey(reader, range(first, first + 50), 1, folder)
            assert found["failures"] == [], reader
        first += 50
    assert first > 0
