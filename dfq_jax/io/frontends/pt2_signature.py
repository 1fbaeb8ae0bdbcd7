"""The inputs and outputs of an exported model: what is a weight, and what the user passes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.frontends.program import ProgramInput
from dfq_jax.io.frontends.pt2_archive import RESAVE, Pt2Archive
from dfq_jax.io.frontends.pt2_json import check, damaged, get, name_of_reference, tagged
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.io.readers.torch_tensors import is_count

NO_TENSOR = ("as_none", "as_int", "as_float", "as_bool", "as_string")
WHOLE = (1, 2, 3, 4, 5, 12)
"""Whole numbers and truths among the types of the schema of torch.export."""
SEQUENCE = "sequence"
"""What an axis of free size is called; its own symbol says nothing."""
EVAL = f"Call model.eval() before exporting: {RESAVE}."


class Preamble(NamedTuple):
    """What a model has before its first operation; see `Program` for the other fields.

    Attributes:
      names: of all inputs and arrays.
    """

    names: set[str]
    inputs: list[ProgramInput]
    arrays: dict[str, np.ndarray]
    paths: dict[str, str]
    notes: list[str]


def read_inputs(archive: Pt2Archive) -> Preamble:
    """All inputs of the exported graph, weights read.

    Args:
      archive: the file.

    Returns:
      User inputs, weights, and where these belong.

    Raises:
      CheckpointError: if the signature is damaged or does not fit the weights.
      UnsupportedModelError: if the model takes anything but tensors.
      UnsafeInputError: if a weight is pickled or would be far larger than the file.
    """
    where = f"{archive.where}: the model's inputs"
    module = get(archive.model, "graph_module", dict, archive.where)
    values = get(get(module, "graph", dict, where), "tensor_values", dict, where)
    given = Preamble(set(), [], {}, {}, [])
    for spec in get(get(module, "signature", dict, where), "input_specs", list, where):
        kind, fields = tagged(spec, where)
        if kind in ("parameter", "buffer", "tensor_constant"):
            _add_array(given, archive, kind, fields, where)
        elif kind == "user_input":
            _add_input(given, get(fields, "arg", dict, where), values, where)
        elif kind == "constant_input":
            value = tagged(get(fields, "value", dict, where), where)[1]
            _add_note(given, get(fields, "name", str, where), value)
        else:
            raise UnsupportedModelError(
                f"{where} include a {show(kind)}, which only PyTorch can provide. Write that part "
                "of the network with plain tensors."
            )
    return given


def _add_array(given: Preamble, archive: Pt2Archive, kind: str, fields: Any, where: str) -> None:
    name = _new(given, get(fields, "arg", dict, where), where)
    path = get(fields, f"{kind}_name", str, where)
    weight = kind == "parameter" or (kind == "buffer" and get(fields, "persistent", bool, where))
    given.arrays[name] = archive.weight(path) if weight else archive.constant(path)
    if kind != "tensor_constant":
        given.paths[name] = path


def _add_input(given: Preamble, argument: Any, values: Mapping[str, Any], where: str) -> None:
    tag, value = tagged(argument, where)
    if tag in NO_TENSOR:
        _add_note(given, f"number {len(given.inputs) + 1}", None if tag == "as_none" else value)
        return
    if tag != "as_tensor":
        raise UnsupportedModelError(
            f"{where} include {show(tag.removeprefix('as_'))}; only tensors are supported. Make it "
            "a constant of the network."
        )
    name = _new(given, value, where)
    record = get(values, name, dict, where)
    sizes = get(record, "sizes", list, where)
    shape = tuple(_size(size, at, where) for at, size in enumerate(sizes))
    free = tuple(SEQUENCE if at and "as_expr" in size else "" for at, size in enumerate(sizes))
    whole = record.get("dtype") in WHOLE
    given.inputs.append(ProgramInput(name, shape, free if any(free) else (), whole))


def _add_note(given: Preamble, name: str, value: Any) -> None:
    given.notes.append(f"input {show(name)} is fixed to {show(value)}, as exported")


def _new(given: Preamble, record: Any, where: str) -> str:
    name = name_of_reference(record, where)
    if name in given.names:
        raise damaged(where, f"{show(name)} is defined twice")
    given.names.add(name)
    return name


def _size(record: Any, at: int, where: str) -> int | None:
    tag, value = tagged(record, where)
    if tag == "as_expr":
        hint = check(value, dict, where, "a size").get("hint")
        if at == 0:
            return 1
        if hint is None:
            return None
        tag, value = tagged(hint, where)
    if tag != "as_int" or not is_count(value):
        raise damaged(where, f"a size is {show(value)}")
    return value


def result_arguments(archive: Pt2Archive) -> tuple[list[Any], list[str]]:
    """What the exported graph returns to the user.

    Args:
      archive: the file.

    Returns:
      The records of the returned arguments, and notes.

    Raises:
      CheckpointError: if the signature is damaged.
      UnsupportedModelError: if running the model changes it, or it computes gradients.
    """
    where = f"{archive.where}: the model's outputs"
    module = get(archive.model, "graph_module", dict, archive.where)
    results, notes = [], []
    for spec in get(get(module, "signature", dict, where), "output_specs", list, where):
        kind, fields = tagged(spec, where)
        match kind:
            case "user_output":
                results.append(get(fields, "arg", dict, where))
            case "user_input_mutation":
                name = show(get(fields, "user_input_name", str, where))
                notes.append(f"the network writes into its input {name}; the imported one does not")
            case "buffer_mutation" | "parameter_mutation":
                name = show(get(fields, kind.replace("mutation", "name"), str, where))
                raise UnsupportedModelError(
                    f"{where}: running the network changes {name}, as in training mode. {EVAL}"
                )
            case _:
                raise UnsupportedModelError(
                    f"{where} include a {show(kind)}; export the network itself, not its training "
                    f"step. {EVAL}"
                )
    return results, notes
