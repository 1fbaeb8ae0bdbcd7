"""Networks that read tokens: their ids, masks and kinds as columns of one array of rows.

An input that looks rows of a table up holds ids; any other says of each token whether it counts,
and is taken as such numbers, 1 or 0, from the beginning.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Graph
from dfq_jax.graph.query import keeps_values
from dfq_jax.graph.token_ops import Column, Embed, Present
from dfq_jax.io.frontends.ends import references
from dfq_jax.io.frontends.program import Call, Program, Ref
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.engine import OperatorTable, lower_all, returned, short
from dfq_jax.io.importing.one_hot import counted
from dfq_jax.io.importing.tidy import tidy
from dfq_jax.io.importing.values import Atom, Value, new_dim
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.types import NHWC

IDS, ROWS = "input_ids", "rows"
"""What graphs call rows of ids, and those of several numbers for each token."""
PASSING = frozenset(
    (
        *("alias", "cast", "clone", "contiguous", "detach", "expand", "flatten", "gather"),
        *("identity", "split", "chunk", "unbind"),
        *("permute", "reshape", "select", "slice", "squeeze", "to", "to_copy", "transpose"),
        *("unsqueeze", "view"),
    )
)
"""Operators that pass ids on."""
COUNTING = ("arange", "range")
"""Operators that make 0, 1, 2, ..."""


class ImportedRows(NamedTuple):
    """A graph of tokens, its parameters, and what it is fed.

    Attributes:
      graph: it reads (length,) numbers of a row, or (length, columns).
      params: by node and slot.
      vocabularies: how many ids each input has, by the tables they look up, the smallest first;
        nothing for masks.
    """

    graph: Graph
    params: dict[str, dict[str, np.ndarray]]
    vocabularies: tuple[tuple[int, ...], ...]


def reads_tokens(program: Program) -> bool:
    """Whether all inputs of a program are whole numbers."""
    return bool(program.inputs) and all(x.whole for x in program.inputs)


def import_rows(program: Program, table: OperatorTable, length: int) -> ImportedRows:
    """The graph of a program that reads tokens, for rows of so many.

    Raises:
      UnsupportedOpError: listing every operator that is not in the table.
      UnsupportedModelError: naming the call that cannot be expressed, or an input that holds no
        rows of tokens.
    """
    check_rows_read(program)
    batch = program.inputs[0].shape[0] or 1
    b = Builder(None if batch == 1 else Atom(batch))
    fed = IDS if len(program.inputs) == 1 else ROWS
    b.unique(fed)
    b.ids.add(fed)
    row = new_dim(length)
    env: dict[str, Any] = dict(program.arrays)
    masks = [not looks_up(program, x.name) for x in program.inputs]
    for at, (x, mask) in enumerate(zip(program.inputs, masks, strict=True)):
        stored = fed
        if len(program.inputs) > 1:
            stored = b.add(Column(at), (fed,), name=x.name)
            b.ids.add(stored)
        if mask:
            stored = b.add(Present(), (stored,), name=f"{x.name}.counts")
        lead = () if b.batch is None else (b.batch,)
        env[x.name] = Value(stored, (row,), (lead, row) if len(x.shape) > 1 else (lead,))
    lower_all(b, program, table, env)
    outputs = tuple(returned(b, env[name], name, NHWC) for name in program.outputs)
    graph, params = tidy(Graph(tuple(b.nodes), (fed,), outputs), b.params)
    return ImportedRows(graph, params, vocabularies(graph, params, program, masks))


def check_rows_read(program: Program) -> None:
    """Refuses what is no (batch, length) or one number for each of a batch, and both at once.

    Raises:
      UnsupportedModelError: naming the inputs.
    """
    shapes = {x.shape for x in program.inputs}
    if len(shapes) > 1 or any(len(shape) not in (1, 2) for shape in shapes):
        told = ", ".join(f"{show(x.name)} {x.shape}" for x in program.inputs)
        raise UnsupportedModelError(
            f"its inputs are whole numbers of shapes {told}; tokens are read as (batch, length) or "
            "(batch,), all inputs alike. Wrap the network so that others are constants."
        )


def looks_up(program: Program, name: str) -> bool:
    """Whether rows of a table are looked up by the numbers of an input."""
    ids = {name}
    for call in program.calls:
        kind = short(call.target)
        if indices(call) in ids or compares_with_all(program, call, ids):
            return True
        first = next(references(call), None)
        if kind in PASSING and first in ids:
            ids.update(filter(None, call.outputs))
    return False


def indices(call: Call) -> str | None:
    """The tensor by whose numbers a call looks up rows of a table; None for other calls."""
    match short(call.target):
        case "gather" if len(call.args) > 1:
            found = call.args[1]
        case "one_hot" | "onehot":
            return next(references(call), None)
        case "embedding":
            found = call.kwargs.get("indices", call.args[1] if len(call.args) > 1 else None)
        case _:
            return None
    return found.name if isinstance(found, Ref) else None


def compares_with_all(program: Program, call: Call, ids: Collection[str]) -> bool:
    """Whether a call asks of each id which of 0, 1, 2, ... it is."""
    read = [*references(call)]
    if short(call.target) not in ("equal", "eq") or not any(name in ids for name in read):
        return False
    makers = {output: made for made in program.calls for output in made.outputs}
    for name in read:
        while (made := makers.get(name)) is not None and short(made.target) in PASSING:
            name = next(references(made), "")
        counts = made is not None and short(made.target) in COUNTING
        if counts or (name in program.arrays and counted(program.arrays[name]) is not None):
            return True
    return False


def vocabularies(
    graph: Graph,
    params: dict[str, dict[str, np.ndarray]],
    program: Program,
    masks: list[bool],
) -> tuple[tuple[int, ...], ...]:
    """How many rows the tables have that each input looks up, smallest first; none for masks."""
    rows: dict[int, list[int]] = {at: [] for at in range(len(masks))}
    for node in graph.nodes:
        if isinstance(node.op, Embed):
            at = column_of(graph, node.inputs[0])
            rows[at].append(params[node.name]["table"].shape[0])
    found = []
    for at, mask in enumerate(masks):
        if not mask and not rows[at]:
            name = show(program.inputs[at].name)
            raise UnsupportedModelError(f"input {name} looks up no row of a table that is used.")
        found.append(() if mask else tuple(sorted(set(rows[at]))))
    return tuple(found)


def column_of(graph: Graph, tensor: str) -> int:
    """Which input's numbers a tensor holds."""
    while (node := graph.by_name.get(tensor)) is not None:
        if isinstance(node.op, Column):
            return node.op.index
        if not keeps_values(node.op):
            raise UnsupportedModelError(f"{node.name!r} looks a table up by computed numbers.")
        tensor = node.inputs[0]
    return 0
