"""How well a language model predicts text that users bring."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dfq_jax.data.text import TextRows, in_rows, nats, read_tokenizer
from dfq_jax.errors import DataError, UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate as run_graph
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import predicts_tokens
from dfq_jax.io.artifacts.artifact import load_artifact
from dfq_jax.io.artifacts.images import load_bare
from dfq_jax.io.runtime.session import feed, input_of, open_session, unreadable_as_data
from dfq_jax.types import Input, Tokens

AT_ONCE = 8
"""Rows that are judged together."""

Scores = Callable[[Int[np.ndarray, "n length"]], Float[np.ndarray, "n length ids"]]


@dataclasses.dataclass(frozen=True)
class TextScore:
    """What the tokens of some text cost.

    Attributes:
      perplexity: exp of the mean cost of a token.
      nats: that mean, the negative logarithm of its probability.
      bits_per_byte: of the text; None for rows of ids, whose bytes nobody knows.
      tokens: that were predicted.
    """

    perplexity: float
    nats: float
    bits_per_byte: float | None
    tokens: int


class Text(NamedTuple):
    """Rows of ids, and the bytes of the text that they are; None where nobody knows."""

    rows: TextRows
    bytes: int | None


def evaluate_text(
    model: Model | str | Path,
    data: str | Path,
    *,
    tokenizer: str | Path | None = None,
    limit: int | None = None,
) -> TextScore:
    """Perplexity of a language model: a Model runs in JAX, a file or folder in ONNX Runtime.

    Args:
      model: a network that predicts the next token, an output folder, or an `.onnx` file of ours.
      data: a file of text, or an `.npy` of rows of ids.
      tokenizer: a file of llama2.c's (`tokenizer.bin`), which text needs.
      limit: judge only so many rows.

    Raises:
      UsageError: for text without a tokenizer, a `limit` below 1, and for rows that are none of
        this network.
      UnsupportedModelError: for a network that predicts no tokens.
      DataError: for files that cannot be read.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"`limit=` is a number of rows from 1, got {limit}.")
    read, run = runner_of(model)
    text = text_of(Path(data), read, tokenizer)
    ids, counts = (part[:limit] for part in text.rows)
    costs = [
        nats(
            run(ids[at : at + AT_ONCE]), TextRows(ids[at : at + AT_ONCE], counts[at : at + AT_ONCE])
        )
        for at in range(0, len(ids), AT_ONCE)
    ]
    all_costs = np.concatenate(costs)
    mean, whole = float(all_costs.mean()), len(ids) == len(text.rows.ids)
    known = text.bytes is not None and whole
    bits = float(all_costs.sum()) / math.log(2) / (text.bytes or 1) if known else None
    return TextScore(float(np.exp(mean)), mean, bits, len(all_costs))


def runner_of(model: Model | str | Path) -> tuple[Tokens, Scores]:
    """What a language model reads, and its scores of rows.

    Raises:
      UnsupportedModelError: if it predicts no tokens.
    """
    if isinstance(model, Model):
        if not predicts_tokens(model):
            raise refusal(model.inputs[0])
        return rows_read(model.inputs[0]), lambda ids: np.asarray(
            run_graph(model, jnp.asarray(ids))[0][0]
        )
    path = Path(model)
    file = load_artifact(path).onnx_path if path.is_dir() else path
    read = rows_read(input_of(file))
    session = open_session(file, optimize=True)
    name = session.get_outputs()[0].name

    def run(ids: Int[np.ndarray, "n length"]) -> Float[np.ndarray, "n length ids"]:
        with unreadable_as_data():
            scores = session.run([name], feed(session, ids))[0]
        if scores.shape[1:] != (ids.shape[1], read.vocabulary):
            raise refusal(read)
        return scores

    return read, run


def rows_read(read: Input | None) -> Tokens:
    """One row of ids.

    Raises:
      UnsupportedModelError: for anything else.
    """
    if not isinstance(read, Tokens) or read.mask:
        raise refusal(read)
    return read


def refusal(read: Input | None) -> UnsupportedModelError:
    """What to say of a network whose text cannot be judged."""
    what = "what its file does not say" if read is None else str(read)
    return UnsupportedModelError(
        f"only networks that predict the next token of one row of ids are judged on text; this one "
        f"reads {what}. Run its .onnx file on your own data instead."
    )


def text_of(path: Path, read: Tokens, tokenizer: str | Path | None) -> Text:
    """The rows of a file: of text, paragraph by paragraph, or of ids.

    Raises:
      UsageError: for text without a tokenizer, and for ids that are none.
      DataError: for a file that cannot be read.
    """
    if path.suffix.lower() == ".npy":
        return Text(rows_of_ids(path, read), None)
    if tokenizer is None:
        raise UsageError(
            f"{path}: text needs the tokenizer of the network: `tokenizer=` is that of "
            "llama2.c. With another one, give rows of ids as an .npy."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    known = read_tokenizer(Path(tokenizer), read.vocabulary)
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    pieces = [p for part in parts for p in cut_in_rows(known.encode(part), read.length)]
    if not pieces:
        raise DataError(f"{path} holds no text.")
    return Text(in_rows(pieces, read.length), sum(len(part.encode()) for part in parts))


def cut_in_rows(ids: list[int], length: int) -> list[list[int]]:
    """A text behind its first id as rows of at most `length`, each behind that id."""
    step = length - 1
    return [[ids[0], *ids[at : at + step]] for at in range(1, len(ids), step)]


def rows_of_ids(path: Path, read: Tokens) -> TextRows:
    """The rows of an `.npy` file.

    Raises:
      UsageError: for other than rows of ids of this network.
      DataError: for a file that cannot be read.
    """
    bare = load_bare(path, "rows")
    found = np.zeros(0) if bare is None else bare.values
    longest = found.shape[-1] if found.ndim == 2 and found.size else 0
    fits = longest > 1 and found.dtype.kind in "iu"
    if not fits or (longest != read.length and not read.symbol):
        raise UsageError(f"{path} has shape {found.shape} of {found.dtype}; rows are {read}.")
    if found.min() < 0 or found.max() >= read.vocabulary:
        raise UsageError(
            f"{path} has ids from {found.min()} to {found.max()}; they are 0 to "
            f"{read.vocabulary - 1}."
        )
    return TextRows(found.astype(np.int32), np.full(len(found), longest))
