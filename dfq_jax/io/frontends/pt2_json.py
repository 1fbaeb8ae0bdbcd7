"""JSON from strangers: parsed within bounds, and read with every type checked."""

import json
from typing import Any, NoReturn, TypeVar

from dfq_jax.errors import CheckpointError, UnsafeInputError
from dfq_jax.io.readers.pickle_policy import show

T = TypeVar("T")
MAX_JSON_BYTES = 64 << 20  # some 25,000 operations with their stack traces
MAX_JSON_VALUES = 2_000_000  # objects and lists; each takes up to 250 bytes of memory
KIND_NAMES = {dict: "an object", list: "a list", str: "text", int: "an integer", bool: "a boolean"}


def damaged(where: str, detail: str) -> CheckpointError:
    """The error for content that PyTorch would never have written."""
    return CheckpointError(f"{where} is damaged: {detail}. Download or export the file again.")


def parse_json(data: memoryview, where: str) -> dict[str, Any]:
    """Parses a member that must hold one JSON object.

    Args:
      data: the member.
      where: file and member, for messages.

    Returns:
      The object.

    Raises:
      CheckpointError: if it is no JSON object, or one with repeated keys.
      UnsafeInputError: if it is absurdly large or deep.
    """
    if len(data) > MAX_JSON_BYTES:
        raise UnsafeInputError(
            f"{where} holds {len(data)} bytes of JSON, more than {MAX_JSON_BYTES}; refused."
        )

    content = bytes(data)
    count = content.count(b"{") + content.count(b"[")
    if count > MAX_JSON_VALUES:
        raise UnsafeInputError(f"{where} has over {MAX_JSON_VALUES:,} objects and lists; refused.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a repeated key")
        return found

    try:
        value = json.loads(content.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise UnsafeInputError(f"{where} is nested too deeply; refused.") from None
    except ValueError as error:
        raise damaged(where, f"no valid JSON, {show(error)}") from error
    if type(value) is not dict:
        raise damaged(where, "no JSON object")
    return value


def check(value: Any, kind: type[T], where: str, what: str) -> T:
    """A parsed value, if it has exactly the type it must have.

    Args:
      value: from the JSON.
      kind: dict, list, str, int or bool.
      where: the place, for messages.
      what: what the value is, for messages.

    Returns:
      The value.

    Raises:
      CheckpointError: if it is of another type, or text that no encoding can write.
    """
    if type(value) is not kind:
        shown = show(repr(value) if isinstance(value, str) else value)
        raise damaged(where, f"{what} is {shown}, not {KIND_NAMES[kind]}")
    if kind is str:
        _check_text(str(value), where, what)
    return value


def get(record: Any, key: str, kind: type[T], where: str) -> T:
    """A required field of a parsed object.

    Args:
      record: from the JSON; must be an object.
      key: of the field.
      kind: dict, list, str, int or bool.
      where: the place, for messages.

    Returns:
      The field's value.

    Raises:
      CheckpointError: if the record is no object, or its field is missing or of another type.
    """
    fields = check(record, dict, where, "a record")
    if key not in fields:
        raise damaged(where, f"{key!r} is missing")
    return check(fields[key], kind, where, repr(key))


def tagged(record: Any, where: str) -> tuple[str, Any]:
    """Takes a tagged union apart, which PyTorch writes as an object of one field.

    Args:
      record: from the JSON.
      where: the place, for messages.

    Returns:
      The tag and the value.

    Raises:
      CheckpointError: if it is anything else.
    """
    fields = check(record, dict, where, "a tagged value")
    if len(fields) != 1:
        raise damaged(where, f"a tagged value has {len(fields)} tags instead of one")
    return next(iter(fields.items()))


def name_of_reference(record: Any, where: str) -> str:
    """The `name` of a reference record.

    Args:
      record: from the JSON.
      where: the place, for messages.

    Returns:
      The name.

    Raises:
      CheckpointError: if there is none.
    """
    name = get(record, "name", str, where)
    if not name:
        raise damaged(where, "an empty name")
    return name


def _check_text(text: str, where: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise damaged(where, f"{what} is no valid text") from None


def fail(where: str, detail: str) -> NoReturn:
    """Raises the error of `damaged`, for use in expressions."""
    raise damaged(where, detail)
