"""Graphs, plans and input contracts as plain JSON data, and back.

Reading trusts nothing: every operator, field and number is checked by the dataclass it becomes.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from dfq_jax.base.words import Store
from dfq_jax.errors import DataError, GraphError
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import Op
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.levels import Levels
from dfq_jax.numerics.ranges import Observer
from dfq_jax.quantization.plan import LAYER_PRESETS, STORES, Plan, Scheme, Site, Spec
from dfq_jax.types import Input, InputContract, SourceNames, TokenColumns, Tokens, Values

OPS = {kind.__name__: kind for kind in get_args(Op)}
LEVELS = {kind.__name__: kind for kind in get_args(Levels)}
OBSERVERS = {kind.__name__: kind for kind in get_args(Observer)}
T = TypeVar("T")


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """A graph as `{"inputs", "outputs", "nodes": [{"name", "op", "fields", "inputs"}]}`."""
    nodes = [{"name": n.name, "inputs": list(n.inputs), **tagged("op", n.op)} for n in graph.nodes]
    return {"inputs": list(graph.inputs), "outputs": list(graph.outputs), "nodes": nodes}


def graph_from_json(data: Mapping[str, Any]) -> Graph:
    """The graph that `graph_to_json` wrote.

    Raises:
      DataError: on an unknown operator, a missing field or a graph that is none.
    """

    def read() -> Graph:
        nodes = (Node(n["name"], untagged("op", n, OPS), tuple(n["inputs"])) for n in data["nodes"])
        return unchanging(Graph(tuple(nodes), tuple(data["inputs"]), tuple(data["outputs"])))

    return checked("graph", read)


UNTOLD: Store = "int4"
"""How kernels lie in the files of plans that do not say: there was no other form."""


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """A plan as `{"scheme", "layers", "sites": [...], "groups": [...]}`."""
    sites = [
        {
            "node": site.node,
            "slot": site.slot,
            **levels_to_json(spec.levels),
            **tagged("observer", spec.observer),
        }
        for site, spec in plan.entries
    ]
    groups = [
        {"tensor": tensor, "sites": [[site.node, site.slot] for site in members]}
        for tensor, members in plan.groups
    ]
    scheme = dataclasses.asdict(plan.scheme)
    how = {"scheme": scheme, "layers": plan.layers, "store": plan.store}
    return {**how, "sites": sites, "groups": groups}


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    """The plan that `plan_to_json` wrote.

    Raises:
      DataError: on anything else.
    """

    def read() -> Plan:
        if data["layers"] not in LAYER_PRESETS:
            raise ValueError(f"layer preset {data['layers']!r} is none of {LAYER_PRESETS}")
        if (store := data.get("store", UNTOLD)) not in STORES:
            raise ValueError(f"form of kernels {store!r} is none of {STORES}")
        entries = (
            (
                known_site(e["node"], e["slot"]),
                Spec(levels_from_json(e), untagged("observer", e, OBSERVERS)),
            )
            for e in data["sites"]
        )
        groups = (
            (g["tensor"], tuple(known_site(node, slot) for node, slot in g["sites"]))
            for g in data["groups"]
        )
        known = tuple(entries), tuple(groups), Scheme(**data["scheme"]), data["layers"]
        return unchanging(Plan(*known, store))

    return checked("plan", read)


def levels_to_json(levels: Levels) -> dict[str, Any]:
    """Levels as `{"grid": fields}`, or `{"levels": {"kind", "fields"}}` where they are no grid."""
    if isinstance(levels, Grid):
        return {"grid": dataclasses.asdict(levels)}
    return {"levels": tagged("kind", levels)}


def levels_from_json(data: Mapping[str, Any]) -> Levels:
    """The levels that `levels_to_json` wrote."""
    if "grid" in data:
        return Grid(**data["grid"])
    return untagged("kind", data["levels"], LEVELS)


def known_site(node: str, slot: str) -> Site:
    """The site that a file calls so.

    Raises:
      ValueError: if its slot is none, or the node no name.
    """
    if not isinstance(node, str):
        raise ValueError(f"{node!r} is no name of a node")
    if not re.fullmatch(r"kernel|input\d{1,6}", slot):
        raise ValueError(f"{slot!r} of {node!r} is no slot that is quantized")
    return Site(node, None if slot == "kernel" else int(slot.removeprefix("input")))


def contract_to_json(contract: InputContract) -> dict[str, Any]:
    """An input contract as a dict of its fields; without the usual prior of photographs."""
    return as_lists(contract.to_dict())


def contract_from_json(data: Mapping[str, Any]) -> InputContract:
    """The contract whose fields `data` holds; other keys are comments.

    Raises:
      DataError: if they make no contract.
    """

    def read() -> InputContract:
        names = [f.name for f in dataclasses.fields(InputContract)]
        return unchanging(InputContract(**{n: as_tuples(data[n]) for n in names if n in data}))

    return checked("input contract", read)


KINDS = {"tokens": Tokens, "columns": TokenColumns, "values": Values}
"""{what a file calls it: an input that is no image}."""


def inputs_to_json(inputs: Sequence[Input]) -> dict[str, Any]:
    """`{"contract"}` of a network that reads one image, else `{"inputs": [{"kind", ...}]}`."""
    if len(inputs) == 1 and isinstance(inputs[0], InputContract):
        return {"contract": contract_to_json(inputs[0])}
    names = {kind: name for name, kind in KINDS.items()} | {InputContract: "image"}
    facts = [{"kind": names[type(x)], **as_lists(dataclasses.asdict(x))} for x in inputs]
    return {"inputs": facts}


def inputs_from_json(data: Mapping[str, Any]) -> tuple[Input, ...]:
    """What `inputs_to_json` wrote, among other keys.

    Raises:
      DataError: if it makes no inputs.
    """
    if "inputs" not in data:
        return (contract_from_json(checked("input contract", lambda: data["contract"])),)
    read = lambda: [unchanging(input_from_json(each)) for each in data["inputs"]]
    return tuple(checked("inputs", read))


def input_from_json(data: Mapping[str, Any]) -> Input:
    """One input of several, or one that is no image."""
    if data["kind"] == "image":
        return contract_from_json(data)
    if data["kind"] == "columns":
        columns = tuple(Tokens(**column) for column in data["columns"])
        return TokenColumns(as_tuples(data["names"]), columns)
    if data["kind"] not in KINDS:
        told = ", ".join(KINDS)
        raise ValueError(f"{data['kind']!r} is no kind of input; known are image, {told}")
    return KINDS[data["kind"]](**{k: as_tuples(v) for k, v in data.items() if k != "kind"})


def names_to_json(names: SourceNames) -> dict[str, Any]:
    """What files call the ends of a network as `{"input", "outputs"}`."""
    return as_lists(names._asdict())


def names_from_json(data: Mapping[str, Any]) -> SourceNames:
    """What `names_to_json` wrote; nothing said where a file is of before there were any.

    Raises:
      DataError: unless all are words.
    """

    def read() -> SourceNames:
        names = SourceNames(data.get("input", ""), tuple(data.get("outputs", ())))
        if wrong := [name for name in (names.input, *names.outputs) if not isinstance(name, str)]:
            raise ValueError(f"{wrong[0]!r} is no name of an input or output")
        return names

    return checked("names", read)


def tagged(tag: str, value: Any) -> dict[str, Any]:
    """A frozen dataclass as its class name under `tag`, and its values under `fields`."""
    fields = {f.name: as_lists(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {tag: type(value).__name__, "fields": fields}


def untagged(tag: str, data: Mapping[str, Any], kinds: Mapping[str, Callable[..., T]]) -> T:
    """The dataclass that `tagged` wrote."""
    if data[tag] not in kinds:
        raise ValueError(f"{data[tag]!r} is no {tag}; known are {', '.join(kinds)}")
    return kinds[data[tag]](**{k: as_tuples(v) for k, v in data["fields"].items()})


def unchanging(value: T) -> T:
    """The value, if all that it is made of is: a dictionary where a name belongs is none.

    Raises:
      TypeError: if something in it can be changed.
    """
    hash(value)
    return value


def as_lists(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {k: as_lists(v) for k, v in value.items()}
    return [as_lists(v) for v in value] if isinstance(value, tuple | list) else value


def as_tuples(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value


BROKEN = (
    *(KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError),
    GraphError,
)
"""What damaged data raises while it is read."""


def checked(what: str, read: Callable[[], T]) -> T:
    """`read()`, with whatever the data breaks turned into a DataError."""
    try:
        return read()
    except BROKEN as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise DataError(
            f"cannot read the {what}: {reason}. The file is damaged, or was written by another "
            f"version of dfq_jax."
        ) from error
