"""`read_pt2`: a file of `torch.export.save` as a `Program`, without PyTorch and without pickle."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from dfq_jax.errors import UnsafeInputError, UnsupportedModelError
from dfq_jax.io.frontends.program import Call, Program, Ref
from dfq_jax.io.frontends.pt2_aliases import Aliases, flat, names_in, operator_name
from dfq_jax.io.frontends.pt2_archive import Pt2Archive
from dfq_jax.io.frontends.pt2_arguments import argument, defined
from dfq_jax.io.frontends.pt2_json import check, damaged, get, tagged
from dfq_jax.io.frontends.pt2_signature import EVAL, NO_TENSOR, read_inputs, result_arguments
from dfq_jax.io.readers.pickle_policy import show

# Operators that run a nested graph exactly once: its calls take their place.
WRAPPERS = frozenset(
    f"higher_order.{name}"
    for name in (
        "wrap",
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
        "wrap_activation_checkpoint",
        "tag_activation_checkpoint",
    )
)
AUTOCAST = "higher_order.wrap_with_autocast"
PURE = ("aten.", "_operator.", "math.", "torch.sym_")  # no effects: unread results are dropped
MAX_PATH = 1000  # characters of a module path worth keeping
REUSE = re.compile(r"@\d+(?=\.|$)")
ODD_PATH = re.compile(r"[\[\]()'\"]|^_empty_nn_module_stack")


def read_pt2(data: bytes | memoryview, where: str) -> Program:
    """Reads a network exported by PyTorch 2.9 or newer.

    Nothing in the file is executed, and its pickles are not opened.

    Args:
      data: the whole file; weights are views of it.
      where: what messages call the file.

    Returns:
      The network in the operators of ATen, `aten.conv2d.default` for instance.

    Raises:
      CheckpointError: if the file is damaged.
      UnsupportedModelError: if it is well-formed and of a kind that cannot be read.
      UnsafeInputError: if it holds pickled weights or is built to exhaust the machine.
    """
    if isinstance(data, memoryview):
        whole = isinstance(data.obj, bytes) and data.c_contiguous and data.nbytes == len(data.obj)
        data = data.obj if whole and isinstance(data.obj, bytes) else bytes(data)
    try:
        return _program(Pt2Archive(data, where))
    except RecursionError:
        raise UnsafeInputError(f"{where} is nested too deeply; refused.") from None


def _program(archive: Pt2Archive) -> Program:
    version = get(archive.model, "schema_version", dict, archive.where)
    if get(version, "major", int, archive.where) != 8:
        raise UnsupportedModelError(
            f"{archive.where} follows version {show(version['major'])} of the schema of "
            "torch.export; only version 8 is known. Export it with PyTorch 2.9 to 2.13."
        )
    given = read_inputs(archive)
    tracer = _Tracer(archive.where, [i.name for i in given.inputs], given.arrays)
    module = get(archive.model, "graph_module", dict, archive.where)
    tracer.run(get(module, "graph", dict, archive.where), tracer.scope)
    records, notes = result_arguments(archive)
    outputs, skipped = tracer.results(records)
    return Program(
        tuple(given.inputs),
        given.arrays,
        given.paths,
        tuple(_live(tracer.calls, outputs)),
        tuple(outputs),
        (*given.notes, *tracer.notes, *notes, *skipped),
    )


class _Tracer:
    """Collects the calls of a graph and of the graphs nested in it, under unique names.

    Attributes:
      calls: so far.
      scope: {name in the outermost graph: `Ref` or literal}.
      notes: for the user.
    """

    def __init__(self, where: str, inputs: Iterable[str], weights: Iterable[str]):
        self.calls: list[Call] = []
        self.notes: list[str] = []
        self._where = where
        self.scope: dict[str, Any] = {name: Ref(name) for name in (*inputs, *weights)}
        self._taken = dict.fromkeys(self.scope, 0)
        self._aliases = Aliases(frozenset(weights), self._fresh)

    def run(self, graph: Any, scope: dict[str, Any]) -> None:
        """Adds the calls of one graph, whose names so far are in `scope`."""
        for at, node in enumerate(get(graph, "nodes", list, self._where)):
            place = f"{self._where}: node {at}"
            target = get(node, "target", str, place).removeprefix("torch.ops.")
            name = node.get("name")
            label = show(name) if type(name) is str and name else at
            place = f"{self._where}: node {label} ({show(target)})"
            if target not in WRAPPERS or not self._inline(node, target, scope, place):
                self._call(node, target, scope, place)

    def results(self, records: list[Any]) -> tuple[list[str], list[str]]:
        """Names of the tensors the outermost graph returns, and notes on what is no tensor."""
        place = f"{self._where}: the model's outputs"
        names, notes = [], []
        for at, record in enumerate(records):
            tag, _ = tagged(record, place)
            value = argument(record, lambda n, p: self._lookup(n, self.scope, p), place)
            if tag == "as_tensor" and isinstance(value, Ref):
                names.append(value.name)
            elif tag in NO_TENSOR or tag.startswith("as_sym_"):
                notes.append(f"output {at} is no tensor and was left out")
            else:
                raise UnsupportedModelError(f"{place}: output {at} is {show(tag)}, no tensor.")
        if not names:
            raise UnsupportedModelError(f"{place}: the network returns no tensor.")
        return names, notes

    def _lookup(self, name: str, scope: dict[str, Any], place: str) -> Any:
        if name not in scope:
            raise damaged(place, f"it reads {show(name)!r} before anything defines it")
        value = scope[name]
        return Ref(self._aliases.read(value.name, place)) if isinstance(value, Ref) else value

    def _define(self, name: str, scope: dict[str, Any], place: str, value: Any = None) -> Any:
        if name in scope:
            raise damaged(place, f"{show(name)!r} is defined twice")
        scope[name] = Ref(self._fresh(name)) if value is None else value
        return scope[name]

    def _fresh(self, name: str) -> str:
        free = name
        while free in self._taken:
            self._taken[name] += 1
            free = f"{name}_{self._taken[name]}"
        self._taken[free] = 0
        return free

    def _call(self, node: Any, target: str, scope: dict[str, Any], place: str) -> None:
        args, kwargs = self._arguments(node, scope, place)
        _refuse_training(target, kwargs, place)
        results = [
            None if name is None else self._define(name, scope, place).name
            for name in _names(get(node, "outputs", list, place), place)
        ]
        call = Call(target, args, kwargs, tuple(results), _module_path(node.get("metadata")))
        self.calls += [call, *self._aliases.add(call, place)]

    def _arguments(
        self, node: Any, scope: dict[str, Any], place: str
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = [], {}
        for at, record in enumerate(get(node, "inputs", list, place)):
            name = get(record, "name", str, place)
            name = "x" if at == 0 and name in ("self", "input") else name
            arg = get(record, "arg", dict, place)
            value = argument(arg, lambda n, p: self._lookup(n, scope, p), place)
            if name in kwargs:
                raise damaged(place, f"argument {show(name)!r} is given twice")
            if name:
                kwargs[name] = value
            else:
                args.append(value)
        return tuple(args), kwargs

    def _inline(self, node: Any, target: str, scope: dict[str, Any], place: str) -> bool:
        """Adds the calls of the graph that a wrapper runs; False if it has none."""
        inputs = get(node, "inputs", list, place)
        records = [get(i, "arg", dict, place) for i in inputs if not get(i, "name", str, place)]
        at = next((i for i, record in enumerate(records) if "as_graph" in record), None)
        if at is None:
            return False
        values = [argument(r, lambda n, p: self._lookup(n, scope, p), place) for r in records]
        if target == AUTOCAST and values[2:3] == [True]:
            self.notes.append(
                f"a part of the network runs under autocast to {show(values[1])}; imported as float"
            )
        graph = get(records[at]["as_graph"], "graph", dict, place)
        inner: dict[str, Any] = {}
        names = _names(get(graph, "inputs", list, place), place)
        self._bind(names, values[at + 1 :], inner, place)
        self.run(graph, inner)
        results = [
            argument(record, lambda n, p: self._lookup(n, inner, p), place)
            for record in get(graph, "outputs", list, place)
        ]
        outputs = _names(get(node, "outputs", list, place), place)
        self._bind(outputs, list(flat(results)), scope, place)
        return True

    def _bind(
        self, names: list[str | None], values: list[Any], scope: dict[str, Any], place: str
    ) -> None:
        if len(names) != len(values):
            raise damaged(place, f"a nested graph has {len(names)} names for {len(values)} values")
        for name, value in zip(names, values, strict=True):
            if isinstance(value, tuple) and not isinstance(value, Ref):
                raise damaged(place, f"a list where a nested graph takes {show(name)!r}")
            if name is not None and value is not None:
                self._define(name, scope, place, value)


def _names(records: list[Any], place: str) -> list[str | None]:
    return [name for record in records for name in defined(record, place)]


def _refuse_training(target: str, kwargs: dict[str, Any], place: str) -> None:
    learns = True in (kwargs.get("training"), kwargs.get("use_input_stats"))
    drops = "dropout" in operator_name(target) and kwargs.get("train") is True
    if (learns and isinstance(kwargs.get("running_mean"), Ref)) or (drops and kwargs.get("p") != 0):
        raise UnsupportedModelError(f"{place} runs in training mode. {EVAL}")


def _module_path(metadata: Any) -> str:
    """The innermost module of a call, empty if it is not known."""
    stack = metadata.get("nn_module_stack") if type(metadata) is dict else None
    parts = stack.rpartition(";")[2].split(",") if type(stack) is str else []
    if len(parts) < 3 or ODD_PATH.search(parts[1]):
        return ""
    path = REUSE.sub("", parts[1])
    return check(path, str, "metadata", "a module path") if len(path) <= MAX_PATH else ""


def _live(calls: list[Call], outputs: list[str]) -> list[Call]:
    """The calls that outputs depend on; results that nobody reads become None."""
    read, kept = set(outputs), []
    for call in reversed(calls):
        results = tuple(name if name in read else None for name in call.outputs)
        if call.target.startswith(PURE) and not any(results):
            continue
        read.update(names_in(*call.args, *call.kwargs.values()))
        kept.append(dataclasses.replace(call, outputs=results))
    return kept[::-1]
