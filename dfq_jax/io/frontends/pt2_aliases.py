"""Which tensors of a traced network share memory, so that in-place operators keep their meaning.

torch.export keeps `relu_` and its kind. A program has no memory, only names: after an in-place
operator, the name of what it changed must mean the result, and so must the tensor that was sliced
to get it; other views of the same memory are stale.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.frontends.program import Call, Ref
from dfq_jax.io.frontends.pt2_archive import RESAVE
from dfq_jax.io.readers.pickle_policy import show

FUNCTIONAL = (
    "torch.export.save(torch.export.export(model.eval(), (example,)).run_decompositions({}), "
    "'net.pt2')"
)

# Operators of ATen whose result may share memory with their first argument.
VIEW_NAMES = """
adjoint alias alpha_dropout as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors
broadcast_to channel_shuffle chunk conj contiguous data detach diagonal dropout dsplit expand
expand_as feature_alpha_dropout feature_dropout flatten hsplit imag lift_fresh matrix_H mH mT
meshgrid moveaxis movedim narrow numpy_T permute positive ravel real reshape reshape_as
resolve_conj resolve_neg select slice split split_with_sizes squeeze sum_to_size swapaxes swapdims
t tensor_split to transpose type_as unbind unflatten unfold unsafe_chunk unsafe_split
unsafe_split_with_sizes unsqueeze view view_as view_as_complex view_as_real vsplit _reshape_alias
_unsafe_view
"""
VIEWS = frozenset(VIEW_NAMES.split())
# In-place operators that change no value, only how memory is seen.
VIEWS_IN_PLACE = frozenset(
    ("detach_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_")
)
MOST_SLICES = 8
# Operators that write a changed part back.
SCATTER = {
    "aten.slice.Tensor": "aten.slice_scatter.default",
    "aten.select.int": "aten.select_scatter.default",
}


def operator_name(target: str) -> str:
    """`relu_` of `aten.relu_.default`; empty for operators that are not ATen's."""
    parts = target.split(".")
    return parts[1] if len(parts) == 3 and parts[0] == "aten" else ""


def is_in_place(target: str) -> bool:
    """Whether an operator changes its first argument."""
    name = operator_name(target)
    return name.endswith("_") if not name.startswith("__") else name.startswith("__i")


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and those inside tuples, in order."""
    for value in values:
        if isinstance(value, tuple) and not isinstance(value, Ref):
            yield from flat(value)
        else:
            yield value


def names_in(*values: Any) -> list[str]:
    """The names that arguments read."""
    return [value.name for value in flat(values) if isinstance(value, Ref)]


class Aliases:
    """What every name means at one point of the program."""

    def __init__(self, fixed: Collection[str], fresh: Callable[[str], str]):
        """Starts before the first call.

        Args:
          fixed: names of weights, which never change.
          fresh: gives a new name like the one it is given.
        """
        self._fixed, self._fresh = fixed, fresh
        self._newest: dict[str, str] = {}
        self._stale: dict[str, str] = {}
        self._group: dict[str, set[str]] = {}
        self._part: dict[str, Call] = {}

    def read(self, name: str, place: str) -> str:
        """The name that now holds what `name` held when it was defined.

        Args:
          name: of a tensor.
          place: who reads it, for messages.

        Returns:
          The name itself, or the result of the last operator that changed it in place.

        Raises:
          UnsupportedModelError: if it was changed through another view of the same memory.
        """
        older = []
        newest = name
        while newest in self._newest:
            older.append(newest)
            newest = self._newest[newest]
        self._newest.update(dict.fromkeys(older, newest))  # the next reader takes one step
        if newest in self._stale:
            raise UnsupportedModelError(
                f"{place} reads {show(name)!r} after {show(self._stale[newest])} changed it in "
                "place through a view of the same memory. Write that part of the network without "
                f"the in-place operator, or export with {FUNCTIONAL}."
            )
        return newest

    def add(self, call: Call, place: str) -> list[Call]:
        """Records one call.

        Args:
          call: with the newest names in its arguments, and its own results.
          place: the call, for messages.

        Returns:
          Calls to add after it: they write a changed part back into the whole.

        Raises:
          UnsupportedModelError: if it changes a weight.
        """
        first = names_in(next(iter((*call.args, *call.kwargs.values())), None))
        made = [name for name in call.outputs if name is not None]
        if operator_name(call.target) in VIEWS_IN_PLACE:
            self._join([*first, *made])
            self._newest.update(zip(first, made, strict=False))
        elif is_in_place(call.target):
            return [extra for name in first for extra in self._change(call, name, made, place)]
        elif operator_name(call.target) in VIEWS:
            self._join([*first, *made])
        if call.target in SCATTER and len(made) == 1:
            self._part[made[0]] = call
        return []

    def _join(self, names: Sequence[str]) -> None:
        groups = [self._group.setdefault(name, {name}) for name in names]
        largest = max(groups, key=len, default=set())
        for group in groups:
            if group is not largest:
                largest |= group
                self._group.update(dict.fromkeys(group, largest))

    def _change(self, call: Call, changed: str, made: list[str], place: str) -> list[Call]:
        group = self._group.pop(changed, {changed})
        weights = sorted(group.intersection(self._fixed))
        if weights:
            raise UnsupportedModelError(
                f"{place} changes the buffer or parameter {show(weights[0])!r} when it runs, as "
                f"networks in training mode do. Call model.eval() before exporting: {RESAVE}."
            )
        self._stale.update(dict.fromkeys(group, call.target))
        if not made:
            return []
        self._replace(changed, made[0])
        return self._write_back(changed, made[0], call.path, place)

    def _write_back(self, changed: str, new: str, path: str, place: str) -> list[Call]:
        """Calls that put a new part into the tensor it was sliced from, and that into its own."""
        extra: list[Call] = []
        while changed in self._part:
            if len(extra) == MOST_SLICES:
                raise UnsupportedModelError(
                    f"{place} changes a slice of over {MOST_SLICES} slices in place. Write that "
                    "part of the network without the in-place operator."
                )
            part = self._part[changed]
            whole = part.kwargs["x"].name
            options = {name: value for name, value in part.kwargs.items() if name != "x"}
            written = self._fresh(whole)
            arguments = {"x": Ref(whole), "src": Ref(new), **options}
            extra.append(Call(SCATTER[part.target], (), arguments, (written,), path))
            view = {"x": Ref(written), **options}
            self._part[new] = Call(part.target, (), view, (new,), part.path)
            self._join([written, new])
            self._replace(whole, written)
            changed, new = whole, written
        return extra

    def _replace(self, old: str, new: str) -> None:
        self._stale.pop(old, None)
        self._newest[old] = new
