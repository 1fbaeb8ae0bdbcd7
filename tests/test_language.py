"""Language models judged on text and on rows of ids."""

import struct

import numpy as np
import pytest
from llamas import bert_folder, llama_file, llama_scores

import dfq_jax as dfq
from dfq_jax.api.language import evaluate_text
from dfq_jax.cli.app import main
from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.io.load import load

IDS = np.random.default_rng(0).integers(3, 32, (3, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network, its tokenizer of letters, rows of ids, and what became of it."""
    at = tmp_path_factory.mktemp("language")
    llama_file(at / "net.bin")
    letters = [b"<s>", b"", b"</s>", b" ", *(bytes([97 + i]) for i in range(26)), b"ab", b"\n"]
    parts = (struct.pack("<fi", float(i), len(piece)) + piece for i, piece in enumerate(letters))
    (at / "tokenizer.bin").write_bytes(struct.pack("<i", 4) + b"".join(parts))
    np.save(at / "ids.npy", IDS)
    made = dfq.quantize(load(at / "net.bin", size=8).model, n=8)
    made.save(at / "out", verification=made.verify())
    return at


def costs(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """What the tokens behind the first cost, in nats."""
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return -np.take_along_axis(logs[:, :-1], ids[:, 1:, None], -1)[..., 0]


def test_perplexity_of_rows_is_that_of_the_scores(folder):
    found = evaluate_text(load(folder / "net.bin", size=8).model, folder / "ids.npy")
    scores = llama_scores(folder / "net.bin", IDS)
    wanted = costs(scores, IDS)
    assert found.nats == pytest.approx(wanted.mean(), rel=1e-4)
    assert found.perplexity == pytest.approx(np.exp(wanted.mean()), rel=1e-4)
    assert (found.tokens, found.bits_per_byte) == (21, None)


def test_a_text_is_cut_into_rows_that_begin_alike(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("cdcdcdcdcd\n\nef\n")
    found = evaluate_text(folder / "out", text, tokenizer=folder / "tokenizer.bin")
    assert found.tokens == 11 + 3  # a space before each, and what was joined as one row
    assert found.bits_per_byte == pytest.approx(found.nats * found.tokens / np.log(2) / 12)
    line = ("evaluate", folder / "out", "--data", text, "--tokenizer", folder / "tokenizer.bin")
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in line])
    assert caught.value.code == 0
    assert f"perplexity {found.perplexity:.3f}" in capsys.readouterr().out


def test_what_cannot_be_judged_is_refused(folder, tmp_path):
    (tmp_path / "text.txt").write_text("abc")
    with pytest.raises(UsageError, match="`tokenizer=`"):
        evaluate_text(folder / "out", tmp_path / "text.txt")
    np.save(tmp_path / "ids.npy", IDS + 10)
    with pytest.raises(UsageError, match="they are 0 to 31"):
        evaluate_text(folder / "out", tmp_path / "ids.npy")
    np.save(tmp_path / "ids.npy", IDS[:, :5])
    with pytest.raises(UsageError, match="rows are 8 tokens of 32"):
        evaluate_text(folder / "out", tmp_path / "ids.npy")
    with pytest.raises(UsageError, match="`limit=` is a number of rows from 1, got 0"):
        evaluate_text(folder / "out", folder / "ids.npy", limit=0)
    encoder = load(bert_folder(tmp_path / "bert"), size=6).model
    with pytest.raises(UnsupportedModelError, match="predict the next token"):
        evaluate_text(encoder, folder / "ids.npy")
