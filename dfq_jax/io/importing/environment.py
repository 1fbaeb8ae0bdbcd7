"""Names and what they stand for, through in-place operators and views."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.importing.values import Value
from dfq_jax.io.pickle_policy import show
from dfq_jax.io.program import Call, Ref


class Stale(NamedTuple):
    """Stands for a view of something that was changed in place: unknown from then on."""

    changed_by: str


class Environment:
    """What each name of a program stands for at this point of it.

    PyTorch programs change tensors in place (`aten.relu_`) and may go on reading the old name, or
    a view of it. Values never change here: the names are rebound instead, and a view of a value
    that was changed must not be read any more.
    """

    def __init__(self, known: Mapping[str, Any], is_view: Callable[[str], bool]) -> None:
        """Starts with the weights and inputs; `is_view` tells whose results share memory."""
        self._bound: dict[str, Any] = dict(known)
        self._is_view = is_view
        self._root: dict[str, str] = {}

    def __getitem__(self, name: str) -> Any:
        """What `name` stands for.

        Raises:
          UnsupportedModelError: if nothing does, or if it is a view of something since changed.
        """
        if name not in self._bound:
            raise UnsupportedModelError(f"it reads {show(name)!r}, which nothing defines.")
        found = self._bound[name]
        if isinstance(found, Stale):
            raise UnsupportedModelError(
                f"it reads {show(name)!r}, a view of a tensor that {found.changed_by} changed in "
                "place; write that line without the trailing underscore, or clone() the view."
            )
        return found

    def resolved(self, argument: Any) -> Any:
        """An argument with its references looked up."""
        if isinstance(argument, Ref):
            return self[argument.name]
        if isinstance(argument, tuple):
            return tuple(self.resolved(a) for a in argument)
        return argument

    def bind(self, call: Call, results: tuple[Any, ...]) -> None:
        """Takes note of what a call made, and of what it changed."""
        source = self._first(call)
        in_place = call.target.split(".")[:1] == ["aten"] and call.target.split(".")[1][-1:] == "_"
        if in_place and source is not None and isinstance(self._bound[source], Value):
            self._change(source, results[0], call.target)
        for name, result in zip(call.outputs, results, strict=False):
            if name is None:
                continue
            self._bound[name] = result
            if source is not None and (in_place or self._is_view(call.target)):
                self._root[name] = self._root.get(source, source)

    def _first(self, call: Call) -> str | None:
        arguments = (*call.args, *call.kwargs.values())
        refs = (a.name for a in arguments if isinstance(a, Ref))
        return next(refs, None)

    def _change(self, source: str, result: Any, target: str) -> None:
        root, old = self._root.get(source, source), self._bound[source]
        for name in [root, *(n for n, r in self._root.items() if r == root)]:
            self._bound[name] = result if self._bound[name] is old else Stale(target)
