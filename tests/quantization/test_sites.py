"""Which tensors are quantized together, and which operators stay in float."""

import pytest

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    Activation,
    Add,
    BatchNorm,
    Clip,
    Concat,
    Flatten,
    GlobalAvgPool,
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
    Scale,
    Slice,
    Softmax,
    Sub,
    Transpose,
)
from dfq_jax.quantization.plan import Site
from dfq_jax.quantization.sites import (
    LONE_NORM,
    NO_FORM,
    STATISTIC,
    float_operators,
    leading_to,
    origins,
    tensor_groups,
)


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
        "x": [Site("pad", 0), Site("twice", 0), Site("twice", 1)],
        "pad": [Site("both", 0)],
        "norm": [Site("both", 1)],
    }


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
    nodes = (Node("w", Linear(), ("x",)), Node("n", op, ("w",)), Node("last", Linear(), ("n",)))
    graph = Graph(nodes, ("x",), ("last",))
    assert tensor_groups(graph)["w"] == [Site("n", 0)]
    assert float_operators(graph) == {}


@pytest.mark.parametrize("behind", [(), (Reshape((8,)),)])
def test_scores_of_probabilities_that_leave_have_no_grid(behind):
    """Of images that show nothing it would end at 0, and no probability exceed one half."""
    nodes = [Node("w", Linear(), ("x",)), Node("n", Activation("sigmoid"), ("w",))]
    nodes += [Node("moved", op, ("n",)) for op in behind]
    graph = Graph(tuple(nodes), ("x",), (nodes[-1].name,))
    assert tensor_groups(graph).keys() == {"x"}
    gate = Node("gated", Mul(), ("w", "n"))
    inside = Graph((*nodes, gate), ("x",), ("gated",))
    assert Site("n", 0) in tensor_groups(inside)["w"]


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
        "x": [Site("m", 0), Site("w", 0)],
        "y": [Site("grown", 0), Site("p", 0)],
        "soft": [Site("p", 1)],
    }


def sites_of(nodes: tuple[Node, ...], *outputs: str) -> list[str]:
    """All edges that are quantized, as text."""
    groups = tensor_groups(Graph(nodes, ("x",), outputs))
    return [f"{s.node}.{s.argument}" for sites in groups.values() for s in sites]


HEADS = (
    Node("box", Linear(), ("x",)),
    Node("score", Linear(), ("x",)),
    Node("chance", Activation("sigmoid"), ("score",)),
    Node("join", Concat(1), ("box", "chance")),
)
READ = ["box.0", "score.0"]


@pytest.mark.parametrize(
    "moves",
    [
        (),
        (Transpose((0, 2, 1)),),
        (Reshape((9, 64)), Transpose((0, 2, 1)), Flatten()),
        (Relu(), Slice(((0, None, 1), (0, 4, 1)))),
        (Clip(0.0, 640.0), Pad(((0, 0), (0, 3)), -1.0), MaxPool((2, 2), (2, 2))),
    ],
    ids=len,
)
def test_what_an_output_joins_stays_float_however_it_is_moved(moves):
    chain, last = [], "join"
    for i, op in enumerate(moves):
        chain.append(Node(f"m{i}", op, (last,)))
        last = f"m{i}"
    assert sites_of((*HEADS, *chain), last) == READ


def test_joins_of_joins_and_several_outputs():
    nodes = (
        *HEADS,
        Node("more", Linear(), ("x",)),
        Node("turned", Transpose((0, 2, 1)), ("join",)),
        Node("all", Concat(1), ("turned", "more")),
        Node("flat", Flatten(), ("all",)),
        Node("cut", Slice(((0, None, 1), (0, 4, 1))), ("all",)),
    )
    assert sites_of(nodes, "flat", "cut", "chance") == [*READ, "more.0"]


def test_an_output_that_a_layer_reads_too_is_quantized_for_the_layer_alone():
    nodes = (
        *HEADS,
        Node("turned", Transpose((0, 2, 1)), ("join",)),
        Node("inside", Linear(), ("join",)),
        Node("behind", Linear(), ("turned",)),
        Node("sum", Add(), ("inside", "behind")),
    )
    assert sites_of(nodes, "turned", "sum") == [
        *READ,
        *("inside.0", "behind.0", "sum.0", "sum.1"),
    ]
    graph = Graph(nodes, ("x",), ("turned", "sum"))
    assert tensor_groups(graph)["join"] == [Site("inside", 0), Site("behind", 0)]


def test_joins_inside_a_network_are_quantized():
    """Parts of what is computed with before it leaves have grids; they are not rounded again."""
    nodes = (*HEADS, Node("scaled", Scale(2.0), ("join",)), Node("out", Flatten(), ("scaled",)))
    assert sites_of(nodes, "out") == [*READ, "chance.0", "join.0", "join.1"]
    fed = (*HEADS, Node("turned", Reshape((3,)), ("join",)), Node("next", Linear(), ("turned",)))
    assert sites_of(fed, "next") == [
        *READ,
        *("chance.0", "join.0", "join.1", "turned.0", "next.0"),
    ]


def contrast(*, kernel: bool = False) -> Graph:
    """Mean and deviation of positions, as attention by contrast spells them."""
    gate = Node("gate", Linear() if kernel else Activation("sigmoid"), ("sum",))
    nodes = (
        Node("layer", Linear(), ("images",)),
        Node("mean", GlobalAvgPool(keepdims=True), ("layer",)),
        Node("off", Sub(), ("layer", "mean")),
        Node("squares", Power(2.0), ("off",)),
        Node("variance", GlobalAvgPool(keepdims=True), ("squares",)),
        Node("deviation", Power(0.5), ("variance",)),
        Node("sum", Add(), ("mean", "deviation")),
        gate,
        Node("scaled", Mul(), ("layer", "gate")),
        Node("last", Linear(), ("scaled",)),
    )
    return Graph(nodes, ("images",), ("last",))


@pytest.mark.parametrize("kernel", [False, True])
def test_deviations_spelled_out_are_computed_in_float(kernel):
    graph = contrast(kernel=kernel)
    floats = float_operators(graph)
    assert floats == {
        "off": STATISTIC,
        "squares": NO_FORM,
        "variance": STATISTIC,
        "deviation": NO_FORM,
    }
    groups = tensor_groups(graph)
    assert {"mean", "deviation", "sum", "layer"} <= groups.keys()
    assert not {"off", "squares", "variance"} & groups.keys()


def test_a_mean_of_squares_that_a_layer_reads_has_a_grid():
    nodes = (
        Node("squares", Power(2.0), ("images",)),
        Node("mean", GlobalAvgPool(), ("squares",)),
        Node("layer", Linear(), ("mean",)),
    )
    graph = Graph(nodes, ("images",), ("layer",))
    assert float_operators(graph) == {"squares": NO_FORM}
    assert tensor_groups(graph).keys() == {"squares", "mean"}


@pytest.mark.parametrize(("reader", "kept"), [(Linear(), True), (Mul(), False), (Add(), False)])
def test_what_is_joined_is_rounded_once(reader, kept):
    """Parts that have grids get a common one only where a layer reads them together."""
    sources = ("both",) if isinstance(reader, Linear) else ("both", "images")
    nodes = (
        Node("a", Linear(), ("images",)),
        Node("b", Linear(), ("images",)),
        Node("both", Concat(-1), ("a", "b")),
        Node("reader", reader, sources),
        Node("last", Linear(), ("reader",)),
    )
    groups = tensor_groups(Graph(nodes, ("images",), ("last",)))
    assert {"a", "b"} <= groups.keys()
    assert ("both" in groups) == kept
