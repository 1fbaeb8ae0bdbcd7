"""What a network with its graph is fed, as its file says, its user, or its operators."""

import dataclasses
import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dfq_jax.errors import DataError, DfqError, UnsupportedModelError, UsageError
from dfq_jax.graph.graph import Graph
from dfq_jax.io.artifacts.graph_json import contract_from_json, inputs_from_json
from dfq_jax.io.frontends.program import Program
from dfq_jax.io.importing.engine import Imported, OperatorTable, import_program, pixel_axes
from dfq_jax.io.importing.free_sizes import loosened, same
from dfq_jax.io.importing.layout import layout_of
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.io.zoo.catalog import with_size
from dfq_jax.normalisation import listed
from dfq_jax.types import NHWC, Input, InputContract, plain_contract

CONTRACT, INPUTS, SCHEME = "dfq.contract", "dfq.inputs", "dfq.scheme"
"""Under which keys our own files say what they read, one image or anything else, and that their
weights are integers."""
INTEGERS = frozenset(
    f"onnx.{kind}"
    for kind in (
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
        *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"),
    )
)
OTHERS = ((64, 96), (33, 47))
"""Pixels added to find out whether a network takes images of any size; the first keep it even."""

Sides = tuple[int, int]
Free = tuple[bool, bool]
"""Whether height and width can be any."""


class ToldInput(NamedTuple):
    """What the user says of a network's images.

    Attributes:
      size: (height, width), None for what the file says.
      layout: `NCHW` or `NHWC`, None to find it.
      normalised: whether mean and deviation are given, so that the file's do not matter.
    """

    size: Sides | None = None
    layout: str | None = None
    normalised: bool = False


class ImportedNetwork(NamedTuple):
    """A network that reads other things than images, as it was imported.

    Attributes:
      graph: its graph.
      params: by node and slot.
      read: what it reads.
      notes: for the user.
    """

    graph: Graph
    params: dict[str, dict[str, np.ndarray]]
    read: Input
    notes: tuple[str, ...]


def imported(
    program: Program, table: OperatorTable, where: str, told: ToldInput
) -> tuple[Imported, InputContract, tuple[str, ...]]:
    """The graph of a program and what it is fed, with notes; the user's word counts most.

    Raises:
      UnsupportedModelError: if it cannot be imported.
      DataError: if the contract that its file carries is unusable, and nothing replaces it.
      UsageError: for a layout that its input cannot have.
    """
    try:
        stated, notes = contract_in(program.facts, where), ()
    except DataError:
        if not told.normalised:
            raise
        stated, notes = None, (f"{where} carries an unusable {CONTRACT}, which is not read",)
    layout, more = settled_layout(program, stated, told.layout)
    size = told.size or missing_size(program, stated, layout)
    found = import_program(program, table, size=size, layout=layout)
    if stated is not None and stated.channels != found.shape[2]:
        ignored = f"{where} carries a {CONTRACT} for {stated.channels} channels, which is not read"
        stated, notes = None, (*notes, ignored)
    contract, said = of_shape(stated, found.shape, where)
    graph, free = found.graph, (False, False)
    if is_free(program, layout):
        graph, free = of_any_size(program, table, layout, found)
    names, fixed = names_of(program, layout, found.shape, free)
    axes = len(program.inputs[0].shape)
    contract = dataclasses.replace(contract, layout=layout, names=names, axes=axes)
    found = found._replace(graph=graph)
    return found, contract, (*notes, *more, *said, *fixed)


def contract_in(facts: Mapping[str, str], where: str) -> InputContract | None:
    """The input contract a file carries, None if it carries none.

    Raises:
      DataError: if it is damaged, or no images fit it.
    """
    if CONTRACT not in facts:
        return None
    try:
        data = json.loads(facts[CONTRACT])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} has a damaged `{CONTRACT}`: {show(error)}") from error
    try:
        return contract_from_json(data)
    except DataError as error:
        raise DataError(
            f"{where} carries an unusable `{CONTRACT}`: {error} State `mean=` and `std=` instead."
        ) from error


def input_in(facts: Mapping[str, str], where: str) -> Input | None:
    """What a file says that it reads, None if it says nothing.

    Raises:
      DataError: if that is damaged.
    """
    if INPUTS not in facts:
        return contract_in(facts, where)
    try:
        data = json.loads(facts[INPUTS])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} has a damaged `{INPUTS}`: {show(error)}") from error
    (read,) = inputs_from_json(data)
    return read


def settled_layout(
    program: Program, stated: InputContract | None, asked: str | None
) -> tuple[str, tuple[str, ...]]:
    """The layout of a network's images, and a note where it was found or is contradicted.

    Raises:
      UsageError: for channels last of what is no image.
    """
    shape = program.inputs[0].shape if program.inputs else ()
    if asked == NHWC and len(shape) not in (3, 4):
        raise UsageError(
            f'`layout="nhwc"` is for images and lines; the input has shape {tuple(shape)}.'
        )
    if len(program.inputs) != 1:
        return asked or "NCHW", ()  # refused when it is imported
    found = stated.layout if stated is not None else layout_of(program)
    if asked is not None:
        says = "its file says" if stated is not None else "its operators say"
        return asked, () if asked == found else (f"read as {asked}; {says} {found}",)
    if found == NHWC and stated is None:
        lines = len(shape) == 3
        return found, (
            f"its {'lines' if lines else 'images'} have their channels last ({NHWC}), input "
            f'{shape}; exported files read them so too; say `layout="nchw"` if that is wrong',
        )
    return found, ()


def missing_size(program: Program, stated: InputContract | None, layout: str) -> Sides | None:
    """(height, width) that the file's contract says where its graph leaves them free."""
    shape = program.inputs[0].shape if program.inputs else ()
    if stated is None or len(shape) != 4 or None not in shape[pixel_axes(layout)]:
        return None
    height, width = shape[pixel_axes(layout)]
    return height or stated.height, width or stated.width


def of_shape(
    stated: InputContract | None, shape: tuple[int, int, int], where: str
) -> tuple[InputContract, tuple[str, ...]]:
    """The contract of a network of this shape, as its file says or else assumed, and a note."""
    if stated is None:
        return plain_contract(shape), ()
    if stated.shape != shape:
        stated = with_size(stated, shape[:2])
    if stated.assumed:
        return stated, ()
    if not stated.is_picture:
        return stated, (f"{where} says what it reads: {stated.normalised}",)
    told = f"mean {listed(stated.mean)}, std {listed(stated.std)}"
    return stated, (f"{where} says how images are normalised: {told}",)


def is_free(program: Program, layout: str) -> bool:
    """Whether height or width of the input is free."""
    shape = program.inputs[0].shape
    return len(shape) == 4 and None in shape[pixel_axes(layout)]


def names_of(
    program: Program, layout: str, shape: tuple[int, int, int], free: Free
) -> tuple[tuple[str, str, str], tuple[str, ...]]:
    """Names of batch, height and width in exported files, and a note where a size has to be fixed.

    Args:
      program: as its source has it.
      layout: of its images.
      shape: (height, width, channels) of one.
      free: whether height and width can be free in the file.
    """
    image = program.inputs[0]
    names = image.names or ("",) * len(image.shape)
    batch = names[0] or "N"
    if not is_free(program, layout):
        return (batch, "", ""), ()
    sizes = zip(image.shape[pixel_axes(layout)], names[pixel_axes(layout)], free, strict=True)
    height, width = (
        (name or usual) if size is None and stays else ""
        for (size, name, stays), usual in zip(sizes, ("height", "width"), strict=True)
    )
    missing = tuple(
        size is None and not stays
        for size, stays in zip(image.shape[pixel_axes(layout)], free, strict=True)
    )
    if not any(missing):
        return (batch, height, width), ()
    read = f"{shape[0]}x{shape[1]}"
    if not all(missing):
        read = f"a height of {shape[0]}" if missing[0] else f"a width of {shape[1]}"
    note = f"exported files read {read} only: at other sizes the network's operators are others"
    return (batch, height, width), (note,)


def of_any_size(
    program: Program, table: OperatorTable, layout: str, found: Imported
) -> tuple[Graph, Free]:
    """The graph that serves images of other sizes as well, and which of its sides are free.

    Of sides that are free in the source both are tried, then the width, then the height.
    """
    height, width = (side is None for side in program.inputs[0].shape[pixel_axes(layout)])
    for free in ((True, True), (False, True), (True, False)):
        if free[0] <= height and free[1] <= width and any(free):
            graph = of_other_sizes(program, table, layout, found, free)
            if graph is not None:
                return graph, free
    return found.graph, (False, False)


def of_other_sizes(
    program: Program, table: OperatorTable, layout: str, found: Imported, free: Free
) -> Graph | None:
    """The graph that serves images whose free sides differ, None if there is none.

    The network is imported for other sizes, and has to come out the same. Only a reshape may keep
    one axis open, and a resize its size.
    """
    graph = found.graph
    for index, more in enumerate(OTHERS):
        height, width = (
            have + extra * stays
            for have, extra, stays in zip(found.shape, more, free, strict=False)
        )
        try:
            other = import_program(program, table, size=(height, width), layout=layout)
        except DfqError:
            if index == 0:
                return None
            continue  # networks that halve and join images refuse odd sizes themselves
        loose = loosened(graph, other.graph)
        if loose is None or not same(other.params, found.params):
            return None
        graph = loose
    return graph


def refuse_integers(program: Program, where: str) -> None:
    """Refuses a network whose weights are integers already.

    Raises:
      UnsupportedModelError: saying what it is, and what to give instead.
    """
    count = sum(call.target in INTEGERS for call in program.calls)
    if SCHEME in program.facts:
        raise UnsupportedModelError(
            f"{where} is an integer network already ({show(program.facts[SCHEME])}, made by "
            "dfq_jax): its weights are rounded, its batch norms gone. Give the network it came "
            "from, or the float.onnx beside it; `dfq evaluate` takes the file as it is."
        )
    if count:
        raise UnsupportedModelError(
            f"{where} is quantized already: {count} of its {len(program.calls)} nodes work with "
            "integers. Give the float network it came from."
        )
