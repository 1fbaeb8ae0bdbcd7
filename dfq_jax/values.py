"""Methods as values: functions with arguments that are compared, hashed and told by what they say.

`functools.partial`, lambdas and closures are equal to themselves alone. `bound` makes a function of
arguments equal to any other of the same function and arguments: then two equal methods share their
compiled programs, and what one of them left on disk is known to be, or not to be, the other's.
"""

import dataclasses
import enum
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from collections.abc import Set as AnySet
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.errors import UsageError

Returned = TypeVar("Returned", covariant=True)
PlainData = Any
"""Plain JSON data that says all of a value."""
Unnamed = Callable[[Any, str], PlainData]
"""(what has no name, where it is) -> what to say of it."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bound(Generic[Returned]):
    """A function with its first arguments, and some by name: equal where all of them are.

    Attributes:
      function: what is called; one of a module, so that it has a name.
      args: its first arguments, before those of a call.
      kwargs: others by name, in the order of their names.
    """

    function: Callable[..., Returned]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Returned:
        """Calls the function with the rest of its arguments."""
        return self.function(*self.args, *args, **{**dict(self.kwargs), **kwargs})

    @cached_property
    def key(self) -> tuple[str, tuple[Any, ...]]:
        """What it is compared by."""
        return key_of((self.function, self.args, dict(self.kwargs)))

    @property
    def __name__(self) -> str:
        """That of the function, which compiled programs are called by."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __eq__(self, other: object) -> bool:
        """Whether function and arguments are equal."""
        return isinstance(other, Bound) and (self is other or self.key == other.key)

    def __hash__(self) -> int:
        """Equal for equal functions and arguments."""
        return hash(self.key)

    def __repr__(self) -> str:
        """The call that makes it."""
        named = (f"{k}={v!r}" for k, v in self.kwargs)
        name = getattr(self.function, "__qualname__", repr(self.function))
        return f"bound({', '.join([name, *map(repr, self.args), *named])})"


def bound(function: Callable[..., Returned], *args: Any, **kwargs: Any) -> Bound[Returned]:
    """A function with its first arguments, and some by name, as a value.

    Args:
      function: of a module; what it is called with comes behind `args`.
      *args: numbers, names, arrays, frozen dataclasses, named tuples, functions of modules, or
        other bound ones.
      **kwargs: likewise.
    """
    if isinstance(function, Bound):
        kwargs, args = {**dict(function.kwargs), **kwargs}, function.args + args
        function = function.function
    return Bound(function, args, tuple(sorted(kwargs.items())))


def described(value: Any, place: str = "value") -> PlainData:
    """All that a value says, as plain JSON data: equal for equal values, on any machine.

    Args:
      value: as an argument of `bound`.
      place: what to call it in errors.

    Raises:
      UsageError: for what has no name, e.g. a lambda; says where it is, and what to do.
    """
    return told(value, place, refuse_unnamed)


def fingerprint(value: Any, place: str = "value") -> str:
    """SHA-256 of what a value says.

    Raises:
      UsageError: for what has no name, e.g. a lambda.
    """
    return hashlib.sha256(written(described(value, place)).encode()).hexdigest()


def key_of(value: Any) -> tuple[str, tuple[Any, ...]]:
    """What values are compared by: all they say, and whatever has no name as it is."""
    unnamed: list[Any] = []

    def keep(thing: Any, place: str) -> PlainData:
        del place
        unnamed.append(thing)
        return {"unnamed": len(unnamed)}

    return written(told(value, "value", keep)), tuple(unnamed)


def written(data: PlainData) -> str:
    """JSON, the same for equal data."""
    return json.dumps(data, sort_keys=True)


def told(value: Any, place: str, unnamed: Unnamed) -> PlainData:
    """What a value says; what has no name is said by `unnamed`."""
    match value:
        case enum.Enum():
            return told(type(value), place, unnamed) | {"member": value.name}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": repr(value)}
        case bytes():
            return {"bytes": hashlib.sha256(value).hexdigest()}
        case np.ndarray() | np.generic() | jax.Array():
            return of_array(value)
        case partial():
            return told(bound(value.func, *value.args, **value.keywords), place, unnamed)
        case Bound():
            given = {str(i): v for i, v in enumerate(value.args)} | dict(value.kwargs)
            return told(value.function, place, unnamed) | fields(given, place, unnamed)
        case AnySet():
            return {"set": sorted((told(v, place, unnamed) for v in value), key=written)}
        case Mapping():
            return of_mapping(value, place, unnamed)
        case _:
            return of_structure(value, place, unnamed)


def of_structure(value: Any, place: str, unnamed: Unnamed) -> PlainData:
    """What a sequence, a record or something with a name says."""
    kind = type(value)
    if names := getattr(kind, "_fields", ()) if isinstance(value, tuple) else ():
        return record(kind, dict(zip(names, value, strict=True)), place, unnamed)
    if isinstance(value, (tuple, list)):
        each = [told(v, f"{place}[{i}]", unnamed) for i, v in enumerate(value)]
        return each if isinstance(value, tuple) else {"list": each}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.compare}
        return record(kind, own, place, unnamed)
    name = name_of(value)
    return unnamed(value, place) if name is None else {"is": name}


def record(kind: type, own: Mapping[str, Any], place: str, unnamed: Unnamed) -> PlainData:
    """What a dataclass or named tuple says: its type, and its fields; none is called `is`."""
    return {"is": [told(kind, place, unnamed)]} | fields(own, place, unnamed)


def of_mapping(value: Mapping[Any, Any], place: str, unnamed: Unnamed) -> PlainData:
    """What a mapping says, whatever its order."""
    if all(isinstance(key, str) for key in value):
        return fields(value, place, unnamed)
    pairs = [[told(each, place, unnamed) for each in pair] for pair in value.items()]
    return {"pairs": sorted(pairs, key=written)}


def fields(own: Mapping[str, Any], place: str, unnamed: Unnamed) -> dict[str, PlainData]:
    """What the entries of a mapping say."""
    return {name: told(value, f"{place}.{name}", unnamed) for name, value in own.items()}


def of_array(value: Any) -> PlainData:
    """Shape, type and SHA-256 of an array; of a random key, those of its data."""
    random = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(value) if random else value
    whole = np.ascontiguousarray(np.asarray(data))
    digest = hashlib.sha256(whole.tobytes()).hexdigest()
    return {"array": [str(value.dtype), list(value.shape), digest]}


def name_of(thing: Any) -> str | None:
    """`module:name` of a function or class by which anybody finds it again, or None."""
    module, path = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(path, str):
        return None
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return f"{module}:{path}" if found is thing else None


def refuse_unnamed(thing: Any, place: str) -> PlainData:
    """Raises UsageError: what has no name cannot be told from another."""
    name = getattr(thing, "__qualname__", None) or f"a {type(thing).__name__}"
    raise UsageError(
        f"{place} is {name}, which has no name to find it by, so nobody could tell whether what "
        "is kept on disk was made with it. Write a function at the top of a module, give it its "
        "arguments with dfq_jax.values.bound(function, ...), or keep nothing on disk."
    )
