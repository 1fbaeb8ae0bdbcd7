"""Tokenizers of llama2.c, rows of text, and what tokens cost."""

import struct

import numpy as np
import pytest

from dfq_jax.data.text import TextRows, in_rows, nats, read_tokenizer
from dfq_jax.errors import CheckpointError, DataError

PIECES = [
    *((b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)),
    *((b"<0x%02X>" % i, 0.0) for i in range(256)),
    *((b" ", -9.0), (b"a", -8.0), (b"b", -7.0), (b"ab", -2.0), (b" a", -1.0), (b"bb", -3.0)),
]
SPACE, A, B, AB, SPACE_A, BB = range(259, 265)


def file(tmp_path, pieces=PIECES):
    path = tmp_path / "tok.bin"
    parts = [struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces]
    path.write_bytes(struct.pack("<i", 9) + b"".join(parts))
    return path


def test_neighbours_are_joined_best_first(tmp_path):
    tokens = read_tokenizer(file(tmp_path), len(PIECES))
    assert tokens.encode("ab") == [1, SPACE_A, B]
    assert tokens.encode("bab") == [1, SPACE, B, AB]
    assert tokens.encode("bbb") == [1, SPACE, BB, B]
    assert tokens.encode("") == [1]


def test_what_is_no_piece_becomes_bytes(tmp_path):
    tokens = read_tokenizer(file(tmp_path), len(PIECES))
    assert tokens.encode("é") == [1, SPACE, *(3 + byte for byte in "é".encode())]


def test_damaged_tokenizers_are_refused(tmp_path):
    path = file(tmp_path)
    with pytest.raises(CheckpointError, match="265 ids, the network 7"):
        read_tokenizer(path, 7)
    data = path.read_bytes()
    for wrong, told in (
        (data[:-1], "is no tokenizer"),
        (data[:-8], "cut short|is no tokenizer"),
        (data[:8] + struct.pack("<i", -5) + data[12:], "-5 bytes"),
        (data[:8] + struct.pack("<i", 2**31 - 1) + data[12:], "is no tokenizer"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=told):
            read_tokenizer(path, len(PIECES))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tokenizer(tmp_path / "none", 3)


def test_tokens_cost_their_negative_logarithm():
    rows = in_rows([[1, 2, 0], [1, 3]], 4)
    np.testing.assert_array_equal(rows.ids, [[1, 2, 0, 1], [1, 3, 1, 1]])
    scores = np.random.default_rng(0).normal(size=(2, 4, 5)) * 50
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    want = [chances[0, 0, 2], chances[0, 1, 0], chances[1, 0, 3]]
    np.testing.assert_allclose(nats(scores, rows), -np.log(want))
    assert isinstance(rows, TextRows)


@pytest.mark.parametrize("texts", [[], [[1]], [[1, 2, 3, 4, 5]]])
def test_texts_that_are_no_rows_are_refused(texts):
    with pytest.raises(DataError, match="a row has 2 to 4"):
        in_rows(texts, 4)
