"""What a network with its graph reads, where that is rows of tokens."""

import dataclasses
from collections.abc import Mapping

from dfq_jax.errors import DataError, UnsupportedModelError, UsageError
from dfq_jax.io.frontends.contracts import ImportedNetwork, ToldInput, input_in
from dfq_jax.io.frontends.program import Program
from dfq_jax.io.importing.engine import OperatorTable
from dfq_jax.io.importing.free_length import MOST_TOKENS, Loosened, of_any_length, tried
from dfq_jax.io.importing.token_rows import ImportedRows, check_rows_read, import_rows
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.types import Input, TokenColumns, Tokens

USUAL_LENGTHS = (128, 64, 32, 16, 8)
"""Tokens of a row where neither file nor user says: the first that there are places for."""
LARGEST_RANK = 8
"""Axes of a shape."""


ONE_EACH = "its inputs have one number for each example: exported files read them as (batch, 1)"


def imported_tokens(program: Program, table: OperatorTable, told: ToldInput) -> ImportedNetwork:
    """The graph of a program whose inputs are whole numbers, and what it is fed.

    Raises:
      UnsupportedModelError: if it cannot be imported.
      UsageError: for what is said of images, or another length than it was exported for.
    """
    check_rows_read(program)
    if told.layout is not None or told.normalised:
        wrong = "layout" if told.layout is not None else "mean"
        raise UsageError(f"the network reads tokens, no images: leave out `{wrong}=`.")
    alone = len(program.inputs[0].shape) == 1
    exported, free = 1 if alone else program.inputs[0].shape[1], not alone and is_free(program)
    length = wanted_length(told, None if free else exported)
    found = None
    if length is None and exported is None:
        length, found = first_that_fits(program, table)
    length = length or exported or 1
    found = found or import_rows(program, table, length)
    loose = of_any_length(program, table, found, length) if free else None
    symbol = (symbol_of(program) or "sequence") if loose is not None else ""
    read = as_stated(read_by(program, found, length, symbol), program.facts)
    notes = length_notes(length, loose) if free else (ONE_EACH,) if alone else ()
    notes = (*notes, *table_notes(program, found))
    found = found if loose is None else loose.rows
    return ImportedNetwork(found.graph, found.params, read, notes)


def is_free(program: Program) -> bool:
    """Whether rows may have any length."""
    return any(x.shape[1] is None or x.names[1:2] not in ((), ("",)) for x in program.inputs)


def symbol_of(program: Program) -> str:
    """What the source calls a free length; empty where it has no name."""
    return next((x.names[1] for x in program.inputs if x.names[1:2] not in ((), ("",))), "")


def wanted_length(told: ToldInput, fixed: int | None) -> int | None:
    """The length that the user says; None if nothing is said.

    Raises:
      UsageError: for a size of images, or another length than the file's only one.
    """
    if told.size is None:
        return None
    if told.size[0] != told.size[1]:
        raise UsageError(f"`size=` is the length of rows of tokens here, got {told.size}.")
    if fixed not in (None, told.size[0]):
        raise UsageError(
            f"the network was exported for rows of {fixed} tokens, not {told.size[0]}; export it "
            "again with that length, or with a free one."
        )
    return told.size[0]


def first_that_fits(program: Program, table: OperatorTable) -> tuple[int, ImportedRows]:
    """The first of the usual lengths that there are places for, and the network of that.

    Files say of rows that they may have any length, and reshape them to the one they were traced
    with: then that is taken. What is refused at all lengths alike has nothing to do with them.

    Raises:
      UnsupportedModelError: if none fits.
    """
    refused: list[UnsupportedModelError] = []
    for length in USUAL_LENGTHS:
        try:
            return length, import_rows(program, table, length)
        except UnsupportedModelError as error:
            refused.append(error)
    for length in traced_lengths(program) if len({*map(str, refused)}) > 1 else ():
        if (found := tried(program, table, length)) is not None:
            return length, found
    raise refused[-1]


def traced_lengths(program: Program) -> list[int]:
    """What a network's shapes are made of, one of which is the length it was traced with."""
    shapes = (a for a in program.arrays.values() if a.dtype.kind == "i" and a.size <= LARGEST_RANK)
    sizes = {int(n) for shape in shapes for n in shape.flat if 1 < n <= MOST_TOKENS}
    return sorted(sizes - {*USUAL_LENGTHS})


def read_by(program: Program, found: ImportedRows, length: int, symbol: str) -> Input:
    """What the inputs of a program hold."""
    columns = tuple(
        Tokens(length, n[0], symbol) if n else Tokens(length, symbol=symbol, mask=True)
        for n in found.vocabularies
    )
    names = tuple(x.name for x in program.inputs)
    return columns[0] if len(columns) == 1 else TokenColumns(names, columns)


def as_stated(read: Input, facts: Mapping[str, str]) -> Input:
    """What a network reads, with the id that texts begin with where its file, one of ours, says."""
    try:
        stated = input_in(facts, "")
    except DataError:
        return read
    if not isinstance(read, Tokens) or not isinstance(stated, Tokens):
        return read
    if (read.vocabulary, read.mask) != (stated.vocabulary, stated.mask):
        return read
    return dataclasses.replace(read, begin=stated.begin)


def table_notes(program: Program, found: ImportedRows) -> tuple[str, ...]:
    """What is worth telling of inputs that look up tables of several sizes."""
    pairs = zip(program.inputs, found.vocabularies, strict=True)
    return tuple(
        f"{show(x.name)} looks up tables of {', '.join(map(str, rows))} rows: examples have ids "
        f"below {rows[0]} only, which is what ranges come from"
        for x, rows in pairs
        if len(rows) > 1
    )


def length_notes(length: int, loose: Loosened | None) -> tuple[str, ...]:
    """What is worth telling about rows of free length."""
    if loose is None:
        note = f"exported files read rows of {length} tokens only: at other lengths the network's "
        return (f"{note}operators are others",)
    most = "any number" if loose.longest is None else f"up to {loose.longest}"
    return (f"examples have {length} tokens, exported files read {most}; say `size=` for others",)
