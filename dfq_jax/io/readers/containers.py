"""Finds the model's weights among everything else a training script saved."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dfq_jax.errors import CheckpointError, UnsupportedModelError
from dfq_jax.io.readers.pickle_policy import listing, show
from dfq_jax.io.readers.pickle_values import Boxed, Object, TensorRef
from dfq_jax.io.readers.torch_checkpoint import RECIPE
from dfq_jax.io.readers.torch_tensors import kind_shown

NAMED = (
    *("state_dict", "model_state_dict", "net_state_dict", "model_state", "model_weights"),
    *("model", "net", "network"),
    *("module", "weights", "params"),
)
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema")
NEVER = ("optim", "sched", "scaler", "amp", "grad", "loss", "criterion", "rng", "random", "state")
PREFIXES = ("module", "_orig_mod", "_forward_module", "model", "net", "network", "state_dict")
COUNTERS = ("n_averaged",)  # torch.optim.swa_utils keeps it beside `module.*`
MAX_DEPTH = 4
MAX_WRAPPERS = 16

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class FoundWeights:
    """The mapping that was taken for the model.

    Attributes:
      path: keys that lead to it, empty for the saved object itself.
      tensors: its tensors by name.
      ignored: what was left aside, as `key (kind)`.
    """

    path: tuple[str, ...]
    tensors: Mapping[str, TensorRef]
    ignored: tuple[str, ...]


def find_weights(root: Any, where: str) -> FoundWeights:
    """Finds the state_dict in a saved object.

    Args:
      root: the object as the data-only reader gives it.
      where: the file, for messages.

    Returns:
      The mapping from names to tensors that is the model: under a usual name, else the saved
      object itself, else the only one there is, else averaged weights.

    Raises:
      UnsupportedModelError: if there is no state_dict but a whole pickled model.
      CheckpointError: if there are no tensors, or several mappings that could be meant.
    """
    found = _Search(where).locate(root, ())
    if (found is None or not set(found) & {*NAMED, *AVERAGED}) and _holds_module(root):
        raise UnsupportedModelError(
            f"{where} holds a whole pickled model, which cannot be rebuilt without running its "
            f"code. {RECIPE}"
        )
    if found is None:
        raise CheckpointError(
            f"{where} holds no weights: {_summary(root)}. Expected a state_dict, that is a "
            'mapping from names to tensors: torch.save(model.state_dict(), "net.pth").'
        )
    ignored: list[str] = []
    level = root
    for step in (*found, None):
        items = _items(level)
        ignored += [
            f"{_key(key)} ({kind_shown(value)})"
            for key, value in items.items()
            if key != step and (step is not None or not _is_tensor(key, value))
        ]
        level = items.get(step)
    return FoundWeights(found, _tensors(_walk(root, found)), tuple(ignored))


def strip_prefixes(tensors: Mapping[str, T]) -> tuple[dict[str, T], tuple[str, ...]]:
    """Removes wrappers' prefixes that all names share, again and again.

    Args:
      tensors: anything by name.

    Returns:
      The same values under shorter names, and one note per removal.
    """
    result, notes = dict(tensors), []
    for _ in range(MAX_WRAPPERS):
        prefix = _shared_prefix(name for name in result if name not in COUNTERS)
        if prefix is None:
            break
        counters = [name for name in COUNTERS if name in result]
        notes += [f"ignored {name} (a counter)" for name in counters]
        result = {k.removeprefix(prefix): v for k, v in result.items() if k not in counters}
        notes.append(f"stripped the prefix {prefix!r} from all names")
    return result, tuple(notes)


def _shared_prefix(names: Iterable[str]) -> str | None:
    parts = [name.partition(".") for name in names]
    heads = {head if rest else "" for head, _, rest in parts}
    head = heads.pop() if len(heads) == 1 else ""
    return head + "." if head in PREFIXES else None


def _items(value: Any) -> dict[Any, Any]:
    items = value.items if type(value) is Object else value
    return items if type(items) is dict else {}


def _is_tensor(key: Any, value: Any) -> bool:
    return type(key) is str and type(value) is TensorRef


def _tensors(value: Any) -> dict[str, TensorRef]:
    return {k: v for k, v in _items(value).items() if _is_tensor(k, v)}


def _walk(root: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        root = _items(root)[step]
    return root


class _Search:
    """A walk down nested mappings that enters each of them once."""

    def __init__(self, where: str):
        self._where = where
        self._sizes: dict[int, int] = {}  # tensors in a mapping, by its identity, once entered

    def locate(self, value: Any, path: tuple[str, ...]) -> tuple[str, ...] | None:
        """Path of the best mapping of tensors at or under `value`."""
        items = _items(value)
        if not items or id(items) in self._sizes or len(path) > MAX_DEPTH:
            return None
        own = self._sizes[id(items)] = len(_tensors(value))
        named = self._first(items, path, NAMED)
        if named and named[1] >= own:
            return named[0]
        others = self._others(items, path)
        if own and all(own >= count for _, count in others):
            return path
        if others:
            return self._only(others)
        averaged = self._first(items, path, AVERAGED)
        return averaged[0] if averaged else None

    def _under(self, items: dict, path: tuple[str, ...], key: str) -> list[tuple[tuple, int]]:
        found = self.locate(items[key], (*path, key))
        if found is None:
            return []
        return [(found, len(_tensors(_walk(items, found[len(path) :]))))]

    def _first(self, items: dict, path: tuple[str, ...], names: Iterable[str]) -> Any:
        hits = (hit for name in names if name in items for hit in self._under(items, path, name))
        return next(hits, None)

    def _others(self, items: dict, path: tuple[str, ...]) -> list[tuple[tuple, int]]:
        keys = [k for k in items if type(k) is str and k not in NAMED and k not in AVERAGED]
        keys = [k for k in keys if not any(word in k.lower() for word in NEVER)]
        return [hit for key in keys for hit in self._under(items, path, key)]

    def _only(self, found: list[tuple[tuple, int]]) -> tuple[str, ...]:
        if len(found) > 1:
            names = [f"{'.'.join(path)} ({count} tensors)" for path, count in found]
            raise CheckpointError(
                f"{self._where} holds several sets of weights: {listing(names)}. Save the one you "
                'mean alone: torch.save(checkpoint[NAME], "net.pth").'
            )
        return found[0][0]


def _holds_module(root: Any) -> bool:
    values = [root]
    seen: set[int] = set()
    for _ in range(MAX_DEPTH):
        values = [v for v in values if id(v) not in seen]
        seen.update(map(id, values))
        if any(_is_module(value) for value in values):
            return True
        values = list({id(v): v for value in values for v in _children(value)}.values())
    return False


def _children(value: Any) -> list[Any]:
    return value if type(value) is list else list(_items(value).values())


def _is_module(value: Any) -> bool:
    state = value.state if type(value) is Object else None
    parts = state if type(state) is tuple else (state,)
    return any(
        type(part) is dict and ("_modules" in part or "_parameters" in part) for part in parts
    )


def _key(key: Any) -> str:
    return show(key.key if type(key) is Boxed and type(key.key) in (int, float) else key)


def _summary(root: Any) -> str:
    items = _items(root)
    if not items:
        return f"it is one {kind_shown(root)}" + (", empty" if root in ({}, []) else "")
    return "it holds " + listing([f"{_key(k)} ({kind_shown(v)})" for k, v in items.items()])
