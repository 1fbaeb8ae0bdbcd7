import dataclasses

import pytest

from dfq_jax.cli.sizes import foretold, size_line, speed_lines, timed
from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.runtime.latency import Latency
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.report.console import Terminal

SLOWER = Latency(1.0, 2.5, 1, 1, 20, "1.32.0", (), ("slower here", "because"))


@pytest.mark.parametrize(
    ("scheme", "store", "told"),
    [
        ("w8a8", "packed", []),
        ("w8a8", "int4", []),
        ("w4a8", "packed", ["not faster"]),
        ("w8a4", "int8", ["not faster"]),
        ("w4a4", "int4", ["not faster"]),
        ("w3a4", "int4", ["not faster", "weights of 3 bits take 4 bits each in the file"]),
        ("w5a8", "int4", ["not faster", "weights of 5 bits take 8 bits each in the file"]),
        ("w2a8", "int8", ["not faster", "weights of 2 bits take 8 bits each in the file"]),
    ],
)
def test_what_few_bits_do_to_a_file_is_said_before(scheme, store, told):
    found = foretold(parse_scheme(scheme), store)
    assert len(found) == len(told)
    assert all(part in line for part, line in zip(told, found, strict=True))


def test_bytes_are_said_and_those_of_an_archive_where_codes_are_bytes(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(1_000_000))
    line = "on disk 4.00 MB -> 1.00 MB (25.0 %)"
    assert size_line(4_000_000, 1_000_000, path, "packed") == line
    assert size_line(4_000_000, 1_000_000, path, "int8") == f"{line}; 0.00 MB zipped"


def test_a_slower_file_is_said_with_the_reason():
    head, why = speed_lines(SLOWER)
    assert "2.50 ms an image against 1.00 ms in float, 2.50x as SLOW" in head
    assert why.strip() == "because"
    (head,) = speed_lines(dataclasses.replace(SLOWER, int_ms=0.5, warnings=()))
    assert "0.50 ms an image against 1.00 ms in float, 2.00x as fast" in head
    assert speed_lines(None) == []


def test_what_cannot_be_timed_is_a_note(capsys):
    def fail():
        raise UnsupportedModelError("too old")

    terminal = Terminal()
    assert timed(fail, terminal) is None
    assert "not timed: too old" in capsys.readouterr().err
    assert timed(lambda: SLOWER, terminal) == SLOWER
