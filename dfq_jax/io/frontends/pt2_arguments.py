"""Arguments and results in the JSON of torch.export, every one a tagged union, as plain values."""

from collections.abc import Callable, Mapping
from typing import Any

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.frontends.pt2_archive import SCALAR_TYPES
from dfq_jax.io.frontends.pt2_json import check, fail, get, name_of_reference, tagged
from dfq_jax.io.readers.pickle_policy import show

Lookup = Callable[[str, str], Any]
"""`lookup(name, where)`: what a name stands for, a `Ref` or a literal."""
Decode = Callable[[Any, Lookup, str], Any]

# torch.export's `MemoryFormat` and `Layout`.
MEMORY_FORMATS = {
    1: "contiguous_format",
    2: "channels_last",
    3: "channels_last_3d",
    4: "preserve_format",
}
LAYOUTS = {
    1: "sparse_coo",
    2: "sparse_csr",
    3: "sparse_csc",
    4: "sparse_bsr",
    5: "sparse_bsc",
    6: "_mkldnn",
    7: "strided",
}
TYPE_NAMES = {code: name for code, (name, _) in SCALAR_TYPES.items()}
FLOAT_WORDS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def argument(record: Any, lookup: Lookup, where: str) -> Any:
    """One argument of a call.

    Args:
      record: from the JSON.
      lookup: finds names.
      where: the call, for messages.

    Returns:
      A `Ref`, a number, a string, None, or a tuple of these. Types, layouts and devices become
      strings such as `float32`; a nested graph becomes its name.

    Raises:
      CheckpointError: if the record is not as PyTorch writes it, or names an unknown tensor.
      UnsupportedModelError: if it is of a kind unknown here.
    """
    tag, value = tagged(record, where)
    return DECODERS[tag](value, lookup, where) if tag in DECODERS else _unknown(tag, where)


def defined(record: Any, where: str) -> list[str | None]:
    """The names that one result of a call defines.

    Args:
      record: from the JSON.
      where: the call, for messages.

    Returns:
      One name for each tensor or number; None for a result that does not exist.

    Raises:
      CheckpointError: if the record is not as PyTorch writes it.
      UnsupportedModelError: if it is no tensor, tensor list or number.
    """
    tag, value = tagged(record, where)
    match tag:
        case "as_tensor":
            return [name_of_reference(value, where)]
        case "as_tensors":
            return [
                name_of_reference(each, where)
                for each in check(value, list, where, "a tensor list")
            ]
        case "as_sym_int" | "as_sym_float" | "as_sym_bool":
            kind, name = tagged(value, where)
            return [check(name, str, where, "a name")] if kind == "as_name" else [None]
        case "as_optional_tensor":
            return defined(value, where)
        case "as_none" | "as_int" | "as_float" | "as_bool":
            return [None]
        case _:
            raise UnsupportedModelError(f"{where}: a result of the unknown kind {show(tag)}.")


def _plain(kind: type) -> Decode:
    return lambda value, _, where: check(value, kind, where, "an argument")


def _none(value: Any, lookup: Lookup, where: str) -> None:
    check(value, bool, where, "the mark of None")


def _int(value: Any, lookup: Lookup, where: str) -> int:
    number = check(value, int, where, "an argument")
    return number if -(2**63) <= number < 2**63 else fail(where, "an integer of over 64 bits")


def _float(value: Any, lookup: Lookup, where: str) -> float:
    if type(value) is str and value in FLOAT_WORDS:
        return FLOAT_WORDS[value]
    if type(value) is int:
        return float(_int(value, lookup, where))
    return value if type(value) is float else fail(where, f"{show(repr(value))} is no number")


def _tensor(value: Any, lookup: Lookup, where: str) -> Any:
    return lookup(name_of_reference(value, where), where)


def _each(one: Decode) -> Decode:
    def decode(value: Any, lookup: Lookup, where: str) -> tuple[Any, ...]:
        items = check(value, list, where, "a list argument")
        return tuple(one(item, lookup, where) for item in items)

    return decode


def _symbolic(literal: str, one: Decode) -> Decode:
    def decode(value: Any, lookup: Lookup, where: str) -> Any:
        tag, inner = tagged(value, where)
        if tag == "as_name":
            return lookup(check(inner, str, where, "a name"), where)
        return one(inner, lookup, where) if tag == literal else _unknown(tag, where)

    return decode


def _optional(value: Any, lookup: Lookup, where: str) -> Any:
    tag, inner = tagged(value, where)
    if tag == "as_tensor":
        return _tensor(inner, lookup, where)
    return None if tag == "as_none" else _unknown(tag, where)


def _coded(names: Mapping[int, str]) -> Decode:
    def decode(value: Any, lookup: Lookup, where: str) -> str:
        code = check(value, int, where, "a type, layout or memory format")
        return names[code] if code in names else _unknown(f"number {code}", where)

    return decode


def _device(value: Any, lookup: Lookup, where: str) -> str:
    index = check(value, dict, where, "a device").get("index")
    kind = get(value, "type", str, where)
    return kind if index is None else f"{kind}:{check(index, int, where, 'a device number')}"


def _complex(value: Any, lookup: Lookup, where: str) -> complex:
    parts = check(value, dict, where, "a complex number")
    return complex(*(_float(parts.get(part), lookup, where) for part in ("real", "imag")))


def _mapping(value: Any, lookup: Lookup, where: str) -> tuple[tuple[str, Any], ...]:
    items = check(value, dict, where, "a mapping").items()
    return tuple(
        (check(key, str, where, "a key"), argument(each, lookup, where)) for key, each in items
    )


def _custom(value: Any, lookup: Lookup, where: str) -> Any:
    raise UnsupportedModelError(
        f"{where}: it uses a custom object of class {show(get(value, 'class_fqn', str, where))}, "
        "which only PyTorch can run. Write that part with plain tensors."
    )


def _unknown(tag: str, where: str) -> Any:
    raise UnsupportedModelError(f"{where}: an argument of the unknown kind {show(tag)}.")


DECODERS: dict[str, Decode] = {
    "as_none": _none,
    "as_tensor": _tensor,
    "as_tensors": _each(_tensor),
    "as_optional_tensor": _optional,
    "as_optional_tensors": _each(_optional),
    "as_nested_tensors": _each(_each(_tensor)),
    "as_int": _int,
    "as_ints": _each(_int),
    "as_int_lists": _each(_each(_int)),
    "as_float": _float,
    "as_floats": _each(_float),
    "as_float_lists": _each(_each(_float)),
    "as_complex": _complex,
    "as_bool": _plain(bool),
    "as_bools": _each(_plain(bool)),
    "as_string": _plain(str),
    "as_strings": _each(_plain(str)),
    "as_operator": _plain(str),
    "as_sym_int": _symbolic("as_int", _int),
    "as_sym_ints": _each(_symbolic("as_int", _int)),
    "as_sym_float": _symbolic("as_float", _float),
    "as_sym_floats": _each(_symbolic("as_float", _float)),
    "as_sym_bool": _symbolic("as_bool", _plain(bool)),
    "as_sym_bools": _each(_symbolic("as_bool", _plain(bool))),
    "as_scalar_type": _coded(TYPE_NAMES),
    "as_memory_format": _coded(MEMORY_FORMATS),
    "as_layout": _coded(LAYOUTS),
    "as_device": _device,
    "as_graph": lambda value, _, where: name_of_reference(value, where),
    "as_string_to_argument": _mapping,
    "as_custom_obj": _custom,
}
