"""Files of llama2.c against the network written out in NumPy, and files that are none."""

import struct

import jax.numpy as jnp
import numpy as np
import pytest
from llamas import LLAMA, llama_file, llama_scores

from dfq_jax.errors import CheckpointError, DfqError, UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.tasks import LanguageModel, task_of
from dfq_jax.io.load import load
from dfq_jax.types import Tokens

IDS = np.random.default_rng(0).integers(0, LLAMA[5], (2, 9)).astype(np.int32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keys", [4, 2, 1])
def test_the_network_of_a_file_computes_what_it_says(tmp_path, tied, keys):
    path = llama_file(tmp_path / "net.bin", (*LLAMA[:4], keys, *LLAMA[5:]), tied=tied)
    found = load(path, size=9)
    assert found.model.inputs == (Tokens(9, LLAMA[5], begin=1),)
    assert task_of(found.model) == LanguageModel()
    scores = evaluate(found.model, jnp.asarray(IDS))[0][0]
    want = llama_scores(path, IDS)
    np.testing.assert_allclose(scores, want, atol=2e-5 * np.abs(want).max())


def test_no_token_looks_at_later_ones(tmp_path):
    model = load(llama_file(tmp_path / "net.bin"), size=9).model
    other = IDS.copy()
    other[:, 5:] = (other[:, 5:] + 1) % LLAMA[5]
    a, b = (np.asarray(evaluate(model, jnp.asarray(x))[0][0]) for x in (IDS, other))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-3


def test_rows_are_as_long_as_there_are_positions(tmp_path):
    path = llama_file(tmp_path / "net.bin")
    assert load(path).model.input.shape == (20,)
    for wrong in (21, 0, (4, 4)):
        with pytest.raises(UsageError, match="rows of 1 to 20 tokens"):
            load(path, size=wrong)
    with pytest.raises(UsageError, match="reads tokens, no images"):
        load(path, mean=(0.5,), std=(0.5,))


def damaged(data: bytes, what: str) -> bytes:
    """A file with one fault."""
    head = list(struct.unpack("<7i", data[:28]))
    match what:
        case "short":
            return data[:-4]
        case "long":
            return data + bytes(4)
        case "header":
            return data[:20]
        case "empty":
            return b""
        case "huge":
            head[0] = 2**31 - 1
        case "negative":
            head[2] = -3
        case "heads":
            head[3] = 3
        case _:  # nan
            return data[:40] + b"\xff\xff\xff\x7f" + data[44:]
    return struct.pack("<7i", *head) + data[28:]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("short", "bytes, the sizes in its header ask for"),
        ("long", "bytes, the sizes in its header ask for"),
        ("header", "too few"),
        ("empty", "too few"),
        ("huge", "no file of llama2.c"),
        ("negative", "no file of llama2.c"),
        ("heads", "no file of llama2.c"),
        ("nan", "tok_embeddings"),
    ],
)
def test_damaged_files_are_refused(tmp_path, what, told):
    path = llama_file(tmp_path / "net.bin")
    path.write_bytes(damaged(path.read_bytes(), what))
    with pytest.raises(CheckpointError, match=told):
        load(path)


def test_later_versions_are_refused(tmp_path):
    path = tmp_path / "net.bin"
    path.write_bytes(b"24ka" + bytes(300))
    with pytest.raises(UnsupportedModelError, match="later version"):
        load(path)


def test_no_header_makes_the_reader_take_memory_or_time(tmp_path):
    """Whatever stands in a header: a typed error, or a network of exactly these bytes."""
    path, rng = llama_file(tmp_path / "net.bin"), np.random.default_rng(1)
    data = path.read_bytes()
    edges = (-1, 0, 1, 2, 3, 7, 2**15, 2**24, 2**31 - 1, -(2**31))
    for _ in range(200):
        head = list(struct.unpack("<7i", data[:28]))
        for place in rng.integers(0, 7, rng.integers(1, 4)):
            head[place] = int(rng.choice(edges))
        path.write_bytes(struct.pack("<7i", *head) + data[28:])
        if tuple(head) != struct.unpack("<7i", data[:28]):
            with pytest.raises(DfqError):
                load(path)
