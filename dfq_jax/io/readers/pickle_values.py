"""What a pickle turns into when nothing is executed: inert descriptions and plain data."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A name the pickle refers to, `module.name`; never resolved."""

    module: str
    name: str

    def __str__(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Object:
    """Something the pickle wanted to construct, kept as a description.

    Attributes:
      cls: what was to be called, usually a `Global`.
      args: the arguments it was to get.
      state: what was to be put into it afterwards.
      items: the items set on it, for subclasses of dict.
    """

    cls: Any
    args: Any = ()
    state: Any = None
    items: dict[Any, Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class PersistentId:
    """A reference to something outside the pickle, e.g. the storage of a tensor."""

    value: Any


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class TensorRef:
    """A PyTorch tensor as the pickle describes it; nothing in it has been checked yet.

    Attributes:
      storage: a `PersistentId` in a healthy file.
      offset: first element within the storage.
      size: shape.
      stride: in elements.
      dtype: the `Global` of the dtype when the storage is untyped.
      metadata: lazy conjugation or negation flags, rarely set.
    """

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: Any = None
    metadata: Any = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Boxed:
    """A dict key compared by identity: hashing an untrusted tuple or number may take for ever."""

    key: Any


def put_item(target: Any, key: Any, value: Any) -> None:
    """Sets one item on a dict, or on the description of a dict subclass.

    Args:
      target: dict or `Object`.
      key: any unpickled value; strings and small numbers stay plain, the rest is boxed.
      value: any unpickled value.

    Raises:
      TypeError: if the target holds no items.
    """
    if type(target) is Object:
        target.items = {} if target.items is None else target.items
        target = target.items
    if type(target) is not dict:
        raise TypeError(f"items set on {type(target).__name__}")
    plain = type(key) is str or (type(key) is int and 0 <= key < 1 << 31)
    target[key if plain else Boxed(key)] = value


def construct(cls: Any, args: Any) -> Any:
    """What calling `cls(*args)` stands for, without calling it.

    Args:
      cls: what the pickle wants to call.
      args: its positional arguments.

    Returns:
      Plain data for the known constructors, otherwise an inert `Object`.

    Raises:
      TypeError: if a known constructor is given arguments it cannot have.
    """
    if type(cls) is not Global or type(args) is not tuple:
        return Object(cls, args)
    make = KNOWN.get(str(cls))
    return Object(cls, args) if make is None else make(*args)


def _dict(pairs: Any = (), /) -> dict[Any, Any]:
    if type(pairs) is dict:
        return pairs
    result: dict[Any, Any] = {}
    if type(pairs) is list:
        for key, value in pairs:
            put_item(result, key, value)
        pairs.clear()  # taken over: a hostile file could ask for the same long copy many times
    return result


def _same(items: Any = (), /) -> Any:
    return items  # shared, not copied, for the same reason


def _tensor_v2(storage, offset, size, stride, grad=None, hooks=None, metadata=None, /):
    return TensorRef(storage, offset, size, stride, None, metadata)


def _tensor_v3(storage, offset, size, stride, grad, hooks, dtype, metadata=None, /):
    return TensorRef(storage, offset, size, stride, dtype, metadata)


def _from_type(make: Any, cls: Any, args: Any, state: Any, /) -> Any:
    plain = type(make) is Global and make.module == "torch._utils"
    return construct(make, args) if plain else Object(make, args, state)


KNOWN = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda factory=None, items=(), /: _dict(items),
    "collections.Counter": _dict,
    "collections.deque": lambda items=(), limit=None, /: _same(items),
    "copyreg._reconstructor": lambda cls, base, state, /: Object(cls, (state,)),
    "copy_reg._reconstructor": lambda cls, base, state, /: Object(cls, (state,)),
    "torch.Size": _same,
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._tensor._rebuild_from_type_v2": _from_type,
} | {
    f"{module}.{name}": make
    for module in ("builtins", "__builtin__")
    for name, make in {
        "dict": _dict,
        "list": _same,
        "set": _same,
        "frozenset": _same,
        "tuple": _same,
    }.items()
}
