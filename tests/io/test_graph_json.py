import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfq_jax.errors import DataError
from dfq_jax.graph import ops, token_ops
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    Add,
    AvgPool,
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Pad,
    Relu,
    Slice,
)
from dfq_jax.io.artifacts.graph_json import (
    OPS,
    contract_from_json,
    contract_to_json,
    graph_from_json,
    graph_to_json,
    inputs_from_json,
    inputs_to_json,
    plan_from_json,
    plan_to_json,
)
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.ranges import EmaMinMax, Lp, Percentile
from dfq_jax.quantization.observers import NAMED
from dfq_jax.quantization.plan import LAYER_PRESETS, Plan, Scheme, Site, Spec
from dfq_jax.types import InputContract, Tokens, Values, in_words


class Call(NamedTuple):
    """A value still to be built: the type checks of the dataclasses draw random numbers, which
    strategies must not.
    """

    make: Callable
    args: tuple


def later(make: Callable, *args: st.SearchStrategy) -> st.SearchStrategy:
    return st.builds(Call, st.just(make), st.tuples(*args))


def built(value: Any) -> Any:
    if isinstance(value, Call):
        return value.make(*map(built, value.args))
    return tuple(map(built, value)) if isinstance(value, tuple | list) else value


SIZE = st.integers(1, 9)
PAIR = st.tuples(SIZE, SIZE)
PADS = st.tuples(PAIR, PAIR)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
STEP = st.tuples(st.integers(-5, 5), st.none() | st.integers(-5, 5), st.sampled_from((-2, 1, 3)))
OP = st.one_of(
    later(Conv2d, PAIR, PADS, SIZE, PAIR),
    later(BatchNorm, NUMBER),
    later(Relu, st.none() | NUMBER),
    later(MaxPool, PAIR, PAIR, PADS),
    later(AvgPool, PAIR, PAIR, PADS, st.booleans()),
    later(Slice, st.tuples(STEP, STEP)),
    later(Pad, st.tuples(PAIR, PAIR, PAIR), NUMBER),
    st.sampled_from((Linear(), Add(), GlobalAvgPool(), Flatten())),
)
SITE = later(Site, st.text(), st.sampled_from((None, 0, 1)))
GRID = later(Grid, st.integers(2, 8), st.booleans(), st.none() | st.integers(-1, 3))
OBSERVER = st.one_of(
    st.sampled_from(tuple(NAMED.values())),
    later(Percentile, st.floats(51, 100)),
    later(Lp, NUMBER),
    later(EmaMinMax, st.floats(0, 0.99)),
)
PLAN = later(
    Plan,
    st.lists(st.tuples(SITE, later(Spec, GRID, OBSERVER)), max_size=4),
    st.lists(st.tuples(st.text(), st.lists(SITE, max_size=3)), max_size=3),
    later(Scheme, st.integers(2, 8), st.integers(2, 8)),
    st.sampled_from(LAYER_PRESETS),
)


NODES = st.lists(st.tuples(st.text(), OP, st.integers(0, 99)), max_size=6)


def graph_of(nodes) -> Graph:
    """Nodes of unique names, each reading an earlier one."""
    names, kept = ["images"], []
    for name, op, source in nodes:
        if name not in names:
            kept.append(Node(name, built(op), (names[source % len(names)],)))
            names.append(name)
    return Graph(tuple(kept), ("images",), (names[-1],))


def through_text(data):
    return json.loads(json.dumps(data, allow_nan=False))


@given(NODES)
def test_graphs_survive_a_round_trip(nodes):
    graph = graph_of(nodes)
    assert graph_from_json(through_text(graph_to_json(graph))) == graph


@given(PLAN)
def test_plans_survive_a_round_trip(spec):
    plan = built(spec)
    found = plan_from_json(through_text(plan_to_json(plan)))
    assert found == plan
    assert hash(found) == hash(plan)


@given(SIZE, SIZE, st.none() | SIZE, st.booleans())
def test_contracts_survive_a_round_trip(height, width, resize, assumed):
    contract = InputContract(height, width, (0.1,), (0.3,), resize, "bicubic", assumed)
    data = {**contract_to_json(contract), "layout": "NCHW"}
    assert contract_from_json(through_text(data)) == contract


def test_every_operator_is_known():
    named = {**vars(ops), **vars(token_ops)}
    defined = {n: k for n, k in named.items() if dataclasses.is_dataclass(k)}
    assert defined == OPS
    for made in (
        ops.Resize((4, 6), (2.0, 1.5), "bilinear", "align_corners"),
        ops.Resize(None, (2.0, 0.5)),
        ops.Pad(((0, 0), (1, 2)), -1.0, "reflect"),
        ops.Reduce("l2", (1, 2), keepdims=True),
        ops.Clip(None, 2.5),
        ops.Reshape((3, 4)),
        ops.ConvTranspose2d((2, 2), ((1, 0), (0, 1)), 2, (1, 1), (1, 0)),
    ):
        graph = Graph((Node("node", made, ("x",)),), ("x",), ("node",))
        assert graph_from_json(through_text(graph_to_json(graph))) == graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "Softmin"}, "'Softmin' is no op; known are Conv2d"),
        ({"fields": {"ceiling": 1.0, "floor": 0}}, "floor"),
        ({"fields": None}, "NoneType"),
        ({"inputs": ["absent"]}, "not defined before it"),
    ],
)
def test_damaged_graphs_are_data_errors(change, message):
    graph = Graph((Node("relu", Relu(), ("x",)),), ("x",), ("relu",))
    data = graph_to_json(graph)
    data["nodes"][0] |= change
    with pytest.raises(DataError, match=message):
        graph_from_json(data)
    with pytest.raises(DataError, match="missing 'nodes'"):
        graph_from_json({})


@pytest.mark.parametrize(
    "inputs",
    [
        (InputContract(4, 6),),
        (Tokens(5, 9, "T"), Tokens(5, symbol="T", mask=True)),
        (InputContract(4, 6, (0.1,), (0.3,)), Values((3, 2), 0.0, 4.0)),
        (Values((7,)),),
    ],
    ids=in_words,
)
def test_inputs_survive_a_round_trip(inputs):
    assert inputs_from_json(through_text(inputs_to_json(inputs))) == inputs


def test_one_image_lies_where_earlier_files_have_it():
    contract = InputContract(4, 6)
    assert inputs_to_json((contract,)) == {"contract": contract_to_json(contract)}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({}, "missing 'contract'"),
        ({"inputs": [{"kind": "sound"}]}, "'sound' is no kind of input"),
        ({"inputs": [{"kind": "tokens", "length": 0}]}, "a length of 1 or more"),
        ({"inputs": [{"kind": "values", "size": [2], "depth": 1}]}, "depth"),
        ({"inputs": 3}, "inputs"),
    ],
)
def test_damaged_inputs_are_data_errors(data, told):
    with pytest.raises(DataError, match=told):
        inputs_from_json(data)


def test_damaged_plans_and_contracts_are_data_errors():
    plan = Plan(((Site("a"), Spec(Grid(4))),), (), Scheme(4, 8), "zsq_all_low")
    data = plan_to_json(plan)
    with pytest.raises(DataError, match="2 <= bits <= 8"):
        plan_from_json({**data, "sites": [{**data["sites"][0], "grid": {"bits": 9}}]})
    with pytest.raises(DataError, match="layer preset"):
        plan_from_json({**data, "layers": "all"})
    with pytest.raises(DataError, match="positive size"):
        contract_from_json({"height": 0, "width": 3})


def test_a_dictionary_where_a_name_or_a_number_belongs_is_a_data_error():
    """Also where nothing looks at it while it is read: what is looked up later must not change."""
    plan = Plan(((Site("a"), Spec(Grid(4))),), (("x", (Site("a"),)),), Scheme(4, 8), "zsq_all_low")
    data, other = plan_to_json(plan), {"as_none": True}
    site = data["sites"][0]
    for wrong in (
        {"sites": [{**site, "node": other}]},
        {"groups": [{"tensor": other, "sites": [["a", "kernel"]]}]},
        {"groups": [{"tensor": "x", "sites": [[other, "kernel"]]}]},
        {"sites": [{**site, "fields": {"order": other}, "observer": "Lp"}]},
        {"scheme": other},
    ):
        with pytest.raises(DataError, match="cannot read the plan"):
            plan_from_json({**data, **wrong})
    graph = graph_to_json(Graph((Node("relu", Relu(), ("x",)),), ("x",), ("relu",)))
    node = graph["nodes"][0]
    for wrong in ({"name": other}, {"inputs": [other]}, {"fields": {"ceiling": other}}):
        with pytest.raises(DataError, match="cannot read the graph"):
            graph_from_json({**graph, "nodes": [{**node, **wrong}]})
    with pytest.raises(DataError, match="cannot read the input contract"):
        contract_from_json({"height": 3, "width": 3, "mean": [other] * 3})
    with pytest.raises(DataError, match="cannot read the inputs"):
        inputs_from_json({"inputs": [{"kind": "tokens", "length": 3, "symbol": other}]})
