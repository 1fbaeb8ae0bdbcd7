import inspect
from typing import Any

import pytest

from dfq_jax.errors import PlanError
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    Activation,
    Add,
    BatchNorm,
    Clip,
    Conv2d,
    ConvTranspose2d,
    LayerNorm,
    LeakyRelu,
    Linear,
    MatMul,
    MaxPool,
    Mul,
    Pad,
    Power,
    PRelu,
    Relu,
    Reshape,
    Resize,
    Softmax,
    Sub,
    Transpose,
)
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.ranges import Lp, MinMax
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantize.plan import (
    LAYER_PRESETS,
    Rule,
    Scheme,
    Site,
    float_layers,
    observing,
    parse_scheme,
    resolve,
)
from dfq_jax.quantize.sites import (
    LONE_NORM,
    NO_FORM,
    STREAM,
    float_operators,
    leading_to,
    origins,
    tensor_groups,
)

W4A3 = Scheme(4, 3)


@pytest.fixture(scope="module")
def graph(tiny_net):
    return fold_batch_norm(tiny_net).graph


def kernel_bits(plan):
    return {s.node: spec.grid.bits for s, spec in plan.entries if s.slot == "kernel"}


def edge_bits(plan):
    return {f"{s.node}.{s.argument}": e.grid.bits for s, e in plan.entries if s.slot != "kernel"}


def test_schemes():
    assert parse_scheme(" W4a8\n") == Scheme(4, 8)
    assert str(Scheme(4, 8)) == "w4a8"
    assert parse_scheme(str(Scheme(2, 3))) == Scheme(2, 3)


@pytest.mark.parametrize("text", ["", "w8", "a8w8", "w9a8", "w8a1", "w8a8x", "w10a8", "8/8"])
def test_bad_schemes(text):
    with pytest.raises(PlanError, match=rf"scheme {text!r} is not w\{{2..8\}}a\{{2..8\}}"):
        parse_scheme(text)


def test_sites_know_their_argument():
    assert Site("a", "input1").argument == 1
    assert Site("a", "kernel").argument is None


PAPERS = {
    "zsq_all_low": {"conv1": 4, "depthwise": 4, "project": 4, "conv2": 4, "fc": 4},
    "qdrop_8bit_ends": {"conv1": 8, "depthwise": 4, "project": 4, "conv2": 4, "fc": 8},
    "brecq_8bit_ends_second": {"conv1": 8, "depthwise": 4, "project": 4, "conv2": 4, "fc": 8},
}
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
    assert twice == [(Site("depthwise", "input0"),), (Site("add", "input1"),)]
    assert {t: s for t, s in groups if t != "relu1"} == {
        t: s for t, s in shared.items() if t != "relu1"
    }


def test_what_only_moves_values_goes_with_its_readers():
    """A chain to a layer; one to a sum; one to both."""
    pool = MaxPool((2, 2), (2, 2))
    nodes = (
        Node("a", pool, ("images",)),
        Node("b", pool, ("a",)),
        Node("layer", Linear(), ("b",)),
        Node("c", pool, ("images",)),
        Node("d", pool, ("c",)),
        Node("both", pool, ("images",)),
        Node("layer2", Linear(), ("both",)),
        Node("sum", Add(), ("d", "layer2")),
        Node("sum2", Add(), ("both", "sum")),
        Node("last", pool, ("sum2",)),
        Node("layer3", Linear(), ("last",)),
    )
    graph = Graph(nodes, ("images",), ("layer", "layer3", "last"))
    assert leading_to(graph, {"layer", "layer2", "layer3"}) == {"a", "b"}


def test_kinds_of_grids(graph):
    plan = resolve(graph, W4A3)
    table = plan.table
    assert table[Site("conv1", "kernel")].grid == Grid(8, symmetric=True, axis=-1)
    assert table[Site("conv2", "kernel")].grid == Grid(4, axis=-1)
    assert table[Site("conv1", "input0")].grid == Grid(8)
    assert table[Site("conv2", "input0")].grid == Grid(3)
    assert {spec.observer for _, spec in plan.entries} == {Lp(2.4)}
    assert plan.spec(Site("conv2", "kernel")) == table[Site("conv2", "kernel")]
    assert plan.spec(Site("relu1", "input0")) is None  # its input is never stored
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


def test_groups_through_operators_that_make_no_values(mixed_net):
    groups = {k: [s.node for s in v] for k, v in tensor_groups(mixed_net.graph).items()}
    assert groups == {
        "images": ["conv1"],
        "lone": ["conv2"],
        "conv2": ["avg1"],
        "avg1": ["avg2"],
        "avg2": ["max", "cut", "pad", "mix"],
        "relu2": ["flat", "fc"],
    }


def test_padding_with_another_value_makes_a_tensor():
    nodes = (
        Node("pad", Pad(((0, 0), (1, 1)), 0.5), ("x",)),
        Node("norm", BatchNorm(), ("x",)),
        Node("both", Add(), ("pad", "norm")),
        Node("twice", Add(), ("x", "x")),
    )
    groups = tensor_groups(Graph(nodes, ("x",), ("both", "twice")))
    assert groups == {
        "x": [Site("pad", "input0"), Site("twice", "input0"), Site("twice", "input1")],
        "pad": [Site("both", "input0")],
        "norm": [Site("both", "input1")],
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
    assert dict(plan.groups)["pool"] == (Site("fc", "input0"), Site("aux", "input0"))


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


def written(graph, scheme=W4A3, **how):
    """{tensor: (bits, edges that read it)} as text."""
    plan = resolve(graph, scheme, **how)
    return {
        tensor: f"{plan.table[sites[0]].grid.bits}: "
        + " ".join(f"{s.node}.{s.argument}" for s in sites)
        for tensor, sites in plan.groups
    }


def test_the_plan_of_a_transformer(nets):
    graph = nets.vit().graph
    moved = ("heads", "order", "q.cut", "q", "k.cut", "k", "v.cut", "v", "scaled")
    wanted = {
        "images": "8: patches.0",
        "patches": "8: tokens.0 joined.1",
        "token": "8: joined.0",
    }
    for i in range(2):
        at = f"attention{i}"
        qkv = [*(f"{at}.{m}.0" for m in moved), f"{at}.scores.1", f"{at}.values.1"]
        wanted |= {
            f"before{i}": f"3: {at}.qkv.0",
            f"{at}.qkv": f"3: {' '.join(qkv)}",
            f"{at}.scaled": f"3: {at}.scores.0",
            f"{at}.weights": f"3: {at}.values.0",
            f"{at}.values": f"3: {at}.back.0 {at}.flat.0 {at}.out.0",
            f"between{i}": f"3: wide{i}.0",
            f"gelu{i}": f"3: narrow{i}.0",
        }
    wanted["last"] = "8: cut.0 first.0 head.0"
    assert written(graph) == wanted
    assert float_operators(graph) == {
        "placed": STREAM,
        **{f"before{i}": NO_FORM for i in range(2)},
        **{f"attention{i}.weights": NO_FORM for i in range(2)},
        **{f"attended{i}": STREAM for i in range(2)},
        **{f"between{i}": NO_FORM for i in range(2)},
        **{f"gelu{i}": NO_FORM for i in range(2)},
        **{f"block{i}": STREAM for i in range(2)},
        "last": NO_FORM,
    }


def test_the_plan_of_convnext(nets):
    wanted = {
        "images": "8: stem.0",
        "stem.norm": "3: depthwise0.0 add0.1",
        "norm0": "3: wide0.0",
        "gelu0": "3: narrow0.0",
        "gain0": "8: scaled0.0",
        "narrow0": "8: scaled0.1",
        "scaled0": "8: add0.0",
        "add0": "3: depthwise1.0",
        "norm1": "3: wide1.0",
        "gelu1": "3: narrow1.0",
        "gain1": "8: scaled1.0",
        "narrow1": "8: scaled1.1",
        "down.norm": "3: down.0",
        "down": "3: depthwise2.0 add2.1",
        "norm2": "3: wide2.0",
        "gelu2": "3: narrow2.0",
        "gain2": "8: scaled2.0",
        "narrow2": "8: scaled2.1",
        "scaled2": "8: add2.0",
        "add2": "8: pool.0",
        "last": "8: fc.0",
    }
    graph = nets.convnext().graph
    assert written(graph) == wanted  # add1 is read by a layer norm: nothing is quantized for it
    assert [k for k, v in float_operators(graph).items() if v == STREAM] == ["add1"]


def test_the_plan_of_squeeze_and_excite(nets):
    graph = fold_batch_norm(nets.excite()).graph
    wanted = {
        "images": "8: stem.0",
        "stem": "8: stem.act.0",
        "stem.act": "3: expand0.0 add0.1",
        "pool": "8: fc.0",
    }
    for i, residual in ((0, "3: expand1.0 add1.1"), (1, "8: pool.0")):
        wanted |= {
            f"expand{i}": f"8: expand{i}.act.0",
            f"expand{i}.act": f"3: depthwise{i}.0",
            f"depthwise{i}": f"8: depthwise{i}.act.0",
            f"depthwise{i}.act": f"8: pool{i}.0 excite{i}.0",
            f"pool{i}": f"3: reduce{i}.0",
            f"reduce{i}.act": f"3: restore{i}.0",
            f"restore{i}": f"8: gate{i}.0",
            f"gate{i}": f"8: excite{i}.1",
            f"excite{i}": f"3: project{i}.0",
            f"project{i}": f"8: add{i}.0",
            f"add{i}": residual,
        }
    assert written(graph) == wanted
    assert float_operators(graph) == {}


def test_the_plan_of_shuffled_channels(nets):
    found = written(fold_batch_norm(nets.shuffle()).graph)
    assert found["join0"] == ("3: split0.0 swap0.0 merge0.0 left1.0 right1.0 enter1.0 join1.0")


def test_products_have_the_bits_of_activations(nets):
    graph = nets.vit().graph
    for layers in LAYER_PRESETS[1:]:
        bits = edge_bits(resolve(graph, Scheme(2, 5), layers))
        scores = (bits["attention1.scores.0"], bits["attention1.scores.1"])
        assert (*scores, bits["attention1.values.0"]) == (5, 5, 5)
        assert bits["head.0"] == 8
    low = resolve(graph, W4A3, "zsq_all_low")
    assert edge_bits(low) == {}  # nothing is rectified
    assert len(kernel_bits(low)) == 10


def test_rules_reach_products(nets):
    rules = [Rule("*.scores", keep_float=True), Rule("attention1.values", input_bits=6)]
    bits = edge_bits(resolve(nets.vit().graph, W4A3, rules=rules))
    assert "attention0.scores.0" not in bits
    assert "attention0.scaled.0" in bits  # `qkv` is quantized for the other product
    assert (bits["attention1.values.0"], bits["attention1.values.1"]) == (6, 6)


def test_every_output_has_its_last_layer(nets):
    plan = resolve(fold_batch_norm(nets.two_heads()).graph, W4A3)
    assert kernel_bits(plan) == {"stem": 8, "conv": 4, "classes": 8, "number": 8}


def test_transposed_convolutions(nets):
    table = resolve(fold_batch_norm(nets.unet()).graph, W4A3).table
    assert table[Site("up1", "kernel")].grid == Grid(4, axis=-1)
    assert table[Site("up3", "kernel")].grid == Grid(4, axis=None)  # grouped
    graph = Graph((Node("t", ConvTranspose2d(groups=2), ("x",)),), ("x",), ("t",))
    kernel = resolve(graph, W4A3).table[Site("t", "kernel")]
    assert kernel.grid == Grid(8, symmetric=True, axis=None)


@pytest.mark.parametrize("op", [Relu(), Relu(6.0), Clip(0.0, 1.0), BatchNorm()], ids=str)
def test_what_the_operator_before_absorbs(op):
    graph = Graph((Node("w", Linear(), ("x",)), Node("n", op, ("w",))), ("x",), ("n",))
    assert list(tensor_groups(graph)) == ["x"]
    assert float_operators(graph) == ({"n": LONE_NORM} if op == BatchNorm() else {})


@pytest.mark.parametrize(
    "op",
    [LayerNorm(), Softmax(), Power(2.0), *map(Activation, ("gelu", "gelu_tanh", "mish", "exp"))],
    ids=str,
)
def test_what_has_no_8_bit_form(op):
    graph = Graph((Node("w", Linear(), ("x",)), Node("n", op, ("w",))), ("x",), ("n",))
    assert list(tensor_groups(graph)) == ["x"]
    assert float_operators(graph) == {"n": NO_FORM}


@pytest.mark.parametrize(
    "op",
    [
        LeakyRelu(),
        PRelu(),
        *map(Activation, ("sigmoid", "tanh", "silu", "hard_sigmoid", "hard_swish")),
    ],
    ids=str,
)
def test_activations_with_an_8_bit_form(op):
    graph = Graph((Node("w", Linear(), ("x",)), Node("n", op, ("w",))), ("x",), ("n",))
    assert tensor_groups(graph)["w"] == [Site("n", "input0")]
    assert float_operators(graph) == {}


@pytest.mark.parametrize("op", [Add(), Sub(), Mul()], ids=str)
def test_the_residual_stream_is_found_behind_moved_values(op):
    nodes = (
        Node("a", Linear(), ("x",)),
        Node("turned", Transpose((0, 2, 1)), ("a",)),
        Node("sum", op, ("turned", "x")),
        Node("back", Transpose((0, 2, 1)), ("sum",)),
        Node("norm", LayerNorm(), ("back",)),
        Node("b", Linear(), ("norm",)),
        Node("other", Add(), ("sum", "b")),
    )
    graph = Graph(nodes, ("x",), ("other",))
    assert origins(graph)["back"] == "sum"
    assert {k: [s.node for s in v] for k, v in tensor_groups(graph).items()} == {
        "x": ["a"],
        "norm": ["b"],
        "sum": ["other"],  # `back` and `turned` only carry floats to floats
        "b": ["other"],
    }


def test_values_moved_to_floats_and_integers_are_quantized_once():
    nodes = (
        Node("m", Reshape((4,)), ("x",)),
        Node("soft", Softmax(), ("m",)),
        Node("w", Linear(), ("m",)),
        Node("grown", Resize((2, 2), (2.0, 2.0)), ("y",)),
        Node("p", MatMul(), ("grown", "soft")),
    )
    graph = Graph(nodes, ("x", "y"), ("p", "w"))
    assert tensor_groups(graph) == {
        "x": [Site("m", "input0"), Site("w", "input0")],
        "y": [Site("grown", "input0"), Site("p", "input0")],
        "soft": [Site("p", "input1")],
    }


def test_reasons_for_float(nets):
    graph = nets.vit().graph
    assert float_layers(graph, resolve(graph, W4A3)) == {}
    rules = [Rule("wide0", keep_float=True), Rule("attention0.values", keep_float=True)]
    ruled = float_layers(graph, resolve(graph, W4A3, rules=rules))
    reason = "a rule keeps it in float"
    assert ruled == {"attention0.values": reason, "wide0": reason}
    graph = fold_batch_norm(nets.excite()).graph
    low = float_layers(graph, resolve(graph, W4A3, "zsq_all_low", [Rule("fc", keep_float=True)]))
    unread = "zsq_all_low: its input is not behind a ReLU"
    assert low.pop("fc") == reason
    assert set(low.values()) == {unread}
    assert "restore0" not in low  # the one behind a ReLU


def test_observers_of_8_bit_edges(graph):
    plan = observing(resolve(graph, W4A3), MinMax())
    for site, spec in plan.entries:
        edge = site.slot != "kernel" and spec.grid.bits == 8
        assert spec.observer == (MinMax() if edge else Lp(2.4))
    assert plan.groups == resolve(graph, W4A3).groups
