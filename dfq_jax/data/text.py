"""Text as rows of ids: the tokenizers of llama2.c, rows of fixed length, bits a byte."""

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dfq_jax.errors import CheckpointError, DataError

BEGIN = 1
"""The id that stands before every text, in all tokenizers of this kind."""
BYTES_FROM = 3
"""The id of byte 0; those of the others follow."""
SPACE = " "


class Tokenizer(NamedTuple):
    """Pieces of text with their ids and scores (Kudo and Richardson 2018, "SentencePiece").

    Attributes:
      pieces: by id.
      scores: by id; of two neighbours that are a piece together, those of the highest are joined.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]

    def encode(self, text: str) -> list[int]:
        """The ids of a text behind `BEGIN`: characters, joined while neighbours make a piece.

        Characters that are no piece become the ids of their bytes.
        """
        known = {piece: i for i, piece in reversed([*enumerate(self.pieces)])}
        ids = []
        for character in SPACE + text if text else "":
            raw = character.encode()
            ids += [known[raw]] if raw in known else [BYTES_FROM + byte for byte in raw]
        while (found := self.best_pair(ids, known)) is not None:
            at, joined = found
            ids[at : at + 2] = [joined]
        return [BEGIN, *ids]

    def best_pair(self, ids: Sequence[int], known: dict[bytes, int]) -> tuple[int, int] | None:
        """(place of two neighbours that are a piece together, its id), that of highest score."""
        best, found = -math.inf, None
        for at in range(len(ids) - 1):
            joined = known.get(self.pieces[ids[at]] + self.pieces[ids[at + 1]])
            if joined is not None and self.scores[joined] > best:
                best, found = self.scores[joined], (at, joined)
        return found


def read_tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    """The tokenizer of a file of llama2.c: (score, length, bytes) of each id.

    Raises:
      CheckpointError: if the file is damaged, or has other than so many ids.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    pieces, scores, at = [], [], 4
    while at < len(data):
        if at + 8 > len(data):
            raise CheckpointError(f"{path} is cut short at its id {len(pieces)}.")
        score, size = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= size <= len(data) - at or not math.isfinite(score):
            raise CheckpointError(
                f"{path} is no tokenizer of llama2.c: its id {len(pieces)} has {size} bytes and "
                f"score {score:g}, {len(data) - at} bytes are left."
            )
        pieces.append(data[at : at + size])
        scores.append(score)
        at += size
    if len(pieces) != vocabulary:
        raise CheckpointError(f"{path} has {len(pieces)} ids, the network {vocabulary}.")
    return Tokenizer(tuple(pieces), tuple(scores))


class TextRows(NamedTuple):
    """Texts as rows of one length.

    Attributes:
      ids: each text from its beginning, filled up with `BEGIN`.
      counts: tokens of each text, the first included.
    """

    ids: Int[np.ndarray, "n length"]
    counts: Int[np.ndarray, " n"]


def in_rows(texts: Sequence[Sequence[int]], length: int) -> TextRows:
    """Texts of ids as rows.

    Raises:
      DataError: for a text that is longer than a row, or none.
    """
    if not texts or max(map(len, texts)) > length or min(map(len, texts)) < 2:
        sizes = sorted({len(text) for text in texts})
        raise DataError(
            f"texts have {sizes[0] if sizes else 0} to {sizes[-1] if sizes else 0} tokens; a row "
            f"has 2 to {length}: cut them, or read the network with another `size=`."
        )
    ids = np.full((len(texts), length), BEGIN, np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    return TextRows(ids, np.array([len(text) for text in texts]))


def nats(scores: Float[np.ndarray, "n length ids"], rows: TextRows) -> Float[np.ndarray, " tokens"]:
    """What each token that has one before it costs: the negative logarithm of its probability.

    Args:
      scores: of the next token at every place.
      rows: the texts.
    """
    x = np.asarray(scores, np.float64)
    x = x - x.max(-1, keepdims=True)
    logs = x - np.log(np.exp(x).sum(-1, keepdims=True))
    found = np.take_along_axis(logs[:, :-1], rows.ids[:, 1:, None].astype(np.int64), -1)[..., 0]
    counted = np.arange(1, rows.ids.shape[1]) < rows.counts[:, None]
    return -found[counted]
