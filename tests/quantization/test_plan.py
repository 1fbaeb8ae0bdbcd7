"""Schemes, layer presets and rules, and the bits and grids they choose."""

import inspect
from typing import Any

import pytest
from plans import W4A3, edge_bits, kernel_bits

from dfq_jax.errors import PlanError
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import Add, Conv2d, Linear, Relu
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.ranges import Lp, MinMax
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.observers import DEFAULT_OBSERVERS
from dfq_jax.quantization.plan import (
    LAYER_PRESETS,
    Rule,
    Scheme,
    Site,
    parse_scheme,
    resolve,
    weight_spec,
)
from dfq_jax.recipes.dfq_trials import observing


@pytest.fixture(scope="module")
def graph(tiny_net):
    return fold_batch_norm(tiny_net).graph


def test_schemes():
    assert parse_scheme(" W4a8\n") == Scheme(4, 8)
    assert str(Scheme(4, 8)) == "w4a8"
    assert parse_scheme(str(Scheme(2, 3))) == Scheme(2, 3)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("w8", Scheme(8, None)),
        ("w4", Scheme(4, None)),
        ("w4g64", Scheme(4, None, 64)),
        ("w4g128a8", Scheme(4, 8, 128)),
        ("w8a16", Scheme(8, 16)),
        ("w8t", Scheme(8, None, "tensor")),
        ("w8ta8", Scheme(8, 8, "tensor")),
    ],
)
def test_schemes_of_weights_alone_of_groups_and_of_tensors(text, scheme):
    assert parse_scheme(text) == scheme
    assert str(scheme) == text


BAD = ["", "w8g0", "w4g", "w8a9", "w16a8", "g64", "a8w8", "w9a8", "w8a1", "w8a8x", "w10a8", "8/8"]


@pytest.mark.parametrize("text", BAD)
def test_bad_schemes(text):
    with pytest.raises(PlanError, match=rf"scheme {text!r} is not w\{{2..8\}}a\{{2..8\}}"):
        parse_scheme(text)


def test_sites_know_their_argument():
    assert Site("a", 1).argument == 1
    assert Site("a").argument is None


PAPERS = {
    "zsq_all_low": {"conv1": 4, "depthwise": 4, "project": 4, "conv2": 4, "fc": 4},
    "qdrop_8bit_ends": {"conv1": 8, "depthwise": 4, "project": 4, "conv2": 4, "fc": 8},
    "brecq_8bit_ends_second": {"conv1": 8, "depthwise": 4, "project": 4, "conv2": 4, "fc": 8},
}
PAPERS["zsq_all_rectified"] = PAPERS["zsq_all_low"]
KERNELS = PAPERS | {f"{name}_shortcuts": PAPERS[name] for name in LAYER_PRESETS[1:3]}
EDGES = {
    "conv1.0": 8,
    "depthwise.0": 3,
    "add.1": 3,  # the tensor that the depthwise layer reads
    "project.0": 3,
    "add.0": 8,
    "maxpool.0": 3,  # the tensor that conv2 reads
    "conv2.0": 3,
    "pool.0": 8,
    "fc.0": 8,
}


@pytest.mark.parametrize("layers", LAYER_PRESETS)
def test_presets_choose_bits(layers, graph):
    plan = resolve(graph, W4A3, layers)
    assert kernel_bits(plan) == KERNELS[layers]
    wanted = {
        "zsq_all_low": {"depthwise.0": 3, "project.0": 3, "conv2.0": 3},
        "zsq_all_rectified": {
            **{"depthwise.0": 3, "add.1": 3, "project.0": 3, "maxpool.0": 3, "conv2.0": 3},
            "pool.0": 3,  # reads a rectified tensor, as the last pooling of a ResNet does
        },
        "qdrop_8bit_ends": EDGES,
        "brecq_8bit_ends_second": EDGES | {"depthwise.0": 8, "add.1": 8},
        "qdrop_8bit_ends_shortcuts": EDGES | {"add.1": 8},
        "brecq_8bit_ends_second_shortcuts": EDGES | {"depthwise.0": 8, "add.1": 8},
    }
    assert edge_bits(plan) == wanted[layers]
    assert (plan.scheme, plan.layers) == (W4A3, layers)


def test_shortcuts_have_a_grid_of_their_own(graph):
    """Pooling leads to a layer alone, and stays with it."""
    groups = resolve(graph, W4A3, "qdrop_8bit_ends_shortcuts").groups
    shared = dict(resolve(graph, W4A3).groups)
    twice = [sites for tensor, sites in groups if tensor == "relu1"]
    assert twice == [(Site("depthwise", 0),), (Site("add", 1),)]
    assert {t: s for t, s in groups if t != "relu1"} == {
        t: s for t, s in shared.items() if t != "relu1"
    }


def test_kinds_of_grids(graph):
    plan = resolve(graph, W4A3)
    table = plan.table
    assert table[Site("conv1")].grid == Grid(8, symmetric=True, axis=-1)
    assert table[Site("conv2")].grid == Grid(4, axis=-1)
    assert table[Site("conv1", 0)].grid == Grid(8)
    assert table[Site("conv2", 0)].grid == Grid(3)
    assert {spec.observer for _, spec in plan.entries} == {Lp(2.4)}
    assert plan.spec(Site("conv2")) == table[Site("conv2")]
    assert plan.spec(Site("relu1", 0)) is None  # its input is never stored
    assert hash(plan) == hash(resolve(graph, W4A3))


def test_groups_of_the_residual_network(graph):
    assert {k: [f"{s.node}.{s.argument}" for s in v] for k, v in resolve(graph, W4A3).groups} == {
        "images": ["conv1.0"],
        "relu1": ["depthwise.0", "add.1"],
        "relu2": ["project.0"],
        "project": ["add.0"],
        "relu3": ["maxpool.0", "conv2.0"],
        "relu4": ["pool.0"],
        "pool": ["fc.0"],
    }


def test_only_two_layers_have_no_second():
    nodes = (Node("a", Linear(), ("x",)), Node("b", Linear(), ("a",)))
    plan = resolve(Graph(nodes, ("x",), ("b",)), W4A3, "brecq_8bit_ends_second")
    assert edge_bits(plan) == {"a.0": 8, "b.0": 8}


def test_a_shared_tensor_takes_the_largest_bits(graph):
    plan = resolve(graph, W4A3, rules=[Rule("fc", input_bits=5), Rule("conv2", input_bits=6)])
    assert edge_bits(plan) == EDGES | {"fc.0": 5, "conv2.0": 6, "maxpool.0": 6}
    fork = Graph(
        (
            Node("a", Conv2d(), ("x",)),
            Node("r", Relu(), ("a",)),
            Node("b", Conv2d(), ("r",)),
            Node("c", Conv2d(), ("r",)),
            Node("d", Add(), ("b", "c")),
            Node("e", Conv2d(), ("d",)),
        ),
        ("x",),
        ("e",),
    )
    plan = resolve(fork, Scheme(4, 4), rules=[Rule("c", input_bits=7)])
    assert edge_bits(plan)["b.0"] == edge_bits(plan)["c.0"] == 7


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("fc", weight_bits=9), r"^rule 'fc' has weight_bits 9; there are [12] to 8\.$"),
        (Rule("fc", weight_bits=0), r"^rule 'fc' has weight_bits 0; there are [12] to 8\.$"),
        (Rule("fc", input_bits=1), r"^rule 'fc' has input_bits 1; there are [12] to 8\.$"),
        (Rule("fc"), r"^rule 'fc' asks for nothing: give weight_bits, input_bits or keep_float\.$"),
    ],
)
def test_rules_that_are_none(graph, rule, message):
    with pytest.raises(PlanError, match=message):
        resolve(graph, W4A3, rules=[rule])


def test_the_last_matching_rule_wins(graph):
    rules = [
        Rule("*", weight_bits=6, input_bits=7),
        Rule("conv?", weight_bits=5),
        Rule("conv2", input_bits=2),
    ]
    plan = resolve(graph, W4A3, rules=rules)
    assert kernel_bits(plan) == {"conv1": 5, "depthwise": 6, "project": 6, "conv2": 5, "fc": 6}
    edges = edge_bits(plan)
    assert (edges["conv1.0"], edges["depthwise.0"], edges["conv2.0"]) == (7, 7, 2)


def test_a_layer_kept_in_float_reads_floats(graph):
    plan = resolve(
        graph, W4A3, rules=[Rule("fc", keep_float=True), Rule("depth*", keep_float=True)]
    )
    assert set(kernel_bits(plan)) == {"conv1", "project", "conv2"}
    assert edge_bits(plan) == {
        k: v for k, v in EDGES.items() if k not in ("fc.0", "depthwise.0", "add.1")
    }
    assert "pool" not in dict(plan.groups)


def test_a_float_layer_shares_the_grid_of_a_quantized_one(graph):
    nodes = (*graph.nodes, Node("aux", Linear(), ("pool",)))
    forked = Graph(nodes, graph.inputs, ("fc", "aux"))
    plan = resolve(forked, W4A3, rules=[Rule("aux", keep_float=True)])
    assert dict(plan.groups)["pool"] == (Site("fc", 0), Site("aux", 0))


def test_a_later_rule_brings_a_layer_back(graph):
    rules = [Rule("*", keep_float=True), Rule("conv2", weight_bits=3), Rule("conv1", input_bits=8)]
    plan = resolve(graph, W4A3, rules=rules)
    assert kernel_bits(plan) == {"conv1": 8, "conv2": 3}  # in execution order
    assert list(kernel_bits(plan)) == ["conv1", "conv2"]
    assert edge_bits(plan)["conv2.0"] == 3


def test_rules_that_match_nothing_name_the_nearest(graph):
    message = r"rule 'conv3' matches no layer; nearest: conv(1, conv2|2, conv1), "
    with pytest.raises(PlanError, match=message):
        resolve(graph, W4A3, rules=[Rule("conv3", weight_bits=8)])
    with pytest.raises(PlanError, match="rule 'relu1' matches no layer"):
        resolve(graph, W4A3, rules=[Rule("relu1", keep_float=True)])


def test_nothing_left(graph):
    with pytest.raises(PlanError, match="no layer is left to quantize: the rules keep all"):
        resolve(graph, W4A3, rules=[Rule("*", keep_float=True)])


def test_unknown_preset(graph):
    """What callers without a type checker see."""
    unchecked: Any = inspect.unwrap(resolve)
    message = "layer preset 'best' is none of zsq_all_low, qdrop_8bit_ends, brecq_8bit_ends_second"
    with pytest.raises(PlanError, match=message):
        unchecked(graph, W4A3, "best")


def test_observers_of_8_bit_edges(graph):
    plan = observing(resolve(graph, W4A3), MinMax())
    for site, spec in plan.entries:
        edge = site.argument is not None and spec.grid.bits == 8
        assert spec.observer == (MinMax() if edge else Lp(2.4))
    assert plan.groups == resolve(graph, W4A3).groups


@pytest.mark.parametrize("bits", range(2, 9))
def test_products_of_kernels_below_8_bits_do_not_saturate(bits):
    """Two of them with bytes, in 16 bits, wherever the zero point lies; 8 bits do."""
    grid = weight_spec(Conv2d(), bits, DEFAULT_OBSERVERS.weights).grid
    reach = grid.qmax if grid.symmetric else grid.qmax - grid.qmin
    assert (2 * 255 * reach < 2**15) == (bits < 8)
