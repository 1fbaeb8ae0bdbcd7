"""Which files are read as networks of tokens, and by what."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.io.language.bert import bert, is_bert, read_bert
from dfq_jax.io.language.llama import is_llama, llama, read_llama
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.io.zoo.catalog import Size

USUAL_LENGTH = 256
"""Tokens of a row, unless the user says otherwise or there are positions for fewer."""


class TokenFile(NamedTuple):
    """A network of tokens read from a file.

    Attributes:
      model: the network.
      architecture: what it is called.
      notes: one line for each thing the user should know.
      sha256: of the file.
    """

    model: Model
    architecture: str
    notes: tuple[str, ...]
    sha256: str


TokenReader = Callable[[Path, Size | None], TokenFile]
"""(file, tokens of a row or None) -> the network."""


def reader_of(path: Path) -> TokenReader | None:
    """What reads a file as a network of tokens; None if that is none."""
    if is_llama(path):
        return of_llama
    return of_bert if is_bert(path) else None


def of_llama(path: Path, size: Size | None) -> TokenFile:
    """A Llama network of llama2.c; see `read_llama` and `length_of`."""
    file = read_llama(path)
    length = length_of(size, file.sizes.seq, show(path.name))
    return TokenFile(llama(file, length), "llama2.c", (told(length, file.sizes.seq),), file.sha256)


def of_bert(path: Path, size: Size | None) -> TokenFile:
    """A BERT encoder of Hugging Face; see `read_bert` and `length_of`."""
    file = read_bert(path)
    length = length_of(size, file.facts.positions, show(path.name))
    notes = (*file.notes, told(length, file.facts.positions))
    return TokenFile(bert(file, length), "bert", notes, file.sha256)


def length_of(size: Size | None, longest: int, where: str) -> int:
    """Tokens of a row.

    Raises:
      UsageError: for a size of images, and for more tokens than there are positions.
    """
    if size is None:
        return min(USUAL_LENGTH, longest)
    if not isinstance(size, int) or not 1 <= size <= longest:
        raise UsageError(
            f"{where} reads rows of 1 to {longest} tokens, got `size=` {size}: say how many."
        )
    return size


def told(length: int, longest: int) -> str:
    """A note on how long rows are."""
    return f"rows have {length} tokens, of at most {longest}; say `size=` for others"
