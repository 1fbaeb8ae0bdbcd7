import dataclasses

import jax.numpy as jnp
import pytest

from dfq_jax.errors import GraphError
from dfq_jax.graph import semantics
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    AdaptiveAvgPool,
    Add,
    BatchNorm,
    Constant,
    Conv2d,
    ConvTranspose2d,
    Linear,
    MatMul,
    MaxPool,
    Relu,
    Reshape,
    Scale,
    Slice,
)
from dfq_jax.graph.query import (
    ancestors,
    batch_norms,
    brief,
    constants,
    consumers,
    describe,
    last_weighted,
    macs,
    only_consumer,
    output_shapes,
    parameter_count,
    refusal_of_half,
    weighted_nodes,
    work,
)
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.windows import pooled
from dfq_jax.types import InputContract


def test_consumers_list_every_reader_with_its_argument():
    square = Node("square", Add(), ("a", "a"))
    a = Node("a", Relu(), ("x",))
    graph = Graph((a, square), ("x", "spare"), ("square",))
    assert consumers(graph) == {
        "x": ((a, 0),),
        "spare": (),
        "a": ((square, 0), (square, 1)),
        "square": (),
    }


def test_only_consumer(tiny_net):
    graph = tiny_net.graph
    readers = consumers(graph)
    assert only_consumer(graph, readers, "conv1") == graph["bn1"]
    assert only_consumer(graph, readers, "relu1") is None  # read by two
    assert only_consumer(graph, readers, "fc") is None  # read by none
    returned = Graph(graph.nodes, graph.inputs, ("conv1", "fc"))
    assert only_consumer(returned, readers, "conv1") is None


def test_selections_keep_execution_order(tiny_net):
    weighted = [n.name for n in weighted_nodes(tiny_net.graph)]
    assert weighted == ["conv1", "depthwise", "project", "conv2", "fc"]
    assert [n.name for n in batch_norms(tiny_net.graph)] == ["bn1", "bn2", "bn3", "bn4"]


@pytest.mark.parametrize("name", ["tiny_net", "mixed_net"])
def test_output_shapes_are_those_of_the_values(name, nets, request):
    model = request.getfixturevalue(name)
    truth = nets.forward(model, nets.images(model, 3))
    assert output_shapes(model, 3) == {k: v.shape for k, v in truth.items()}


def test_shape_errors_name_the_node(tiny_net):
    broken = with_params(tiny_net, {"conv2": {"kernel": jnp.zeros((3, 3, 5, 8))}})
    message = r"node conv2 = Conv2d\(.*\) <- maxpool cannot read inputs of shapes \[\(1, 4, 4, 6\)"
    with pytest.raises(GraphError, match=message):
        output_shapes(broken)
    lost = {k: v for k, v in tiny_net.params.items() if k != "fc"}
    with pytest.raises(GraphError, match=r"node fc = Linear\(\) <- pool cannot read .*kernel"):
        output_shapes(dataclasses.replace(tiny_net, params=lost))


def test_images_of_which_nothing_is_left_are_refused():
    nodes = (
        Node("pool", MaxPool((5, 5), (1, 1)), ("images",)),
        Node("end", AdaptiveAvgPool((2, 2)), ("pool",)),
    )
    contract = InputContract(8, 8, (0.5,), (0.25,))
    model = Model(Graph(nodes, ("images",), ("end",)), {}, (contract,))
    assert output_shapes(model)["end"] == (1, 2, 2, 1)
    assert "node pool = MaxPool" in str(refusal_of_half(model))
    assert "leaves nothing of inputs of shapes [(1, 4, 4, 1)]" in str(refusal_of_half(model))


def test_an_operator_is_traced_once_for_a_shape(monkeypatch):
    """Shapes are asked for at every stage of a run."""
    seen = []
    monkeypatch.setattr(semantics, "pooled", lambda *given: seen.append(given) or pooled(*given))
    nodes = Node("pool", MaxPool((3, 2), (2, 1)), ("images",)), Node("end", Relu(), ("pool",))
    model = Model(Graph(nodes, ("images",), ("end",)), {}, (InputContract(17, 11),))
    assert [output_shapes(model, n)["end"] for n in (1, 1, 2)] == [(1, 8, 10, 3)] * 2 + [
        (2, 8, 10, 3)
    ]
    assert len(seen) == 2


def test_multiply_accumulates_by_hand(tiny_net, mixed_net):
    assert macs(tiny_net) == {
        "conv1": 8 * 8 * 6 * 27,
        "depthwise": 8 * 8 * 6 * 9,
        "project": 8 * 8 * 6 * 6,
        "conv2": 2 * 2 * 8 * 9 * 6,
        "fc": 8 * 5,
    }
    shapes = output_shapes(mixed_net)
    pixels = shapes["mix"][1] * shapes["mix"][2]
    assert macs(mixed_net)["mix"] == pixels * 8 * 5
    assert macs(mixed_net)["conv2"] == shapes["conv2"][1] * shapes["conv2"][2] * 6 * 9 * 2


def test_work_needs_something_to_multiply():
    with pytest.raises(GraphError, match=r"node r = Relu\(.*\) <- x multiplies nothing"):
        work(Node("r", Relu(), ("x",)), (1, 1), (1, 1), (1, 1))


def counted(op, kernel, read, made):
    return work(Node("n", op, ("x",)), kernel, read, made)


def test_work_of_products_and_transposed_convolutions():
    assert counted(MatMul(), (9, 2, 7, 5), (9, 2, 4, 7), (9, 2, 4, 5)) == 2 * 4 * 5 * 7
    assert counted(MatMul(True), (9, 2, 5, 7), (9, 2, 4, 7), (9, 2, 4, 5)) == 2 * 4 * 5 * 7
    read, made = (9, 3, 5, 8), (9, 7, 11, 6)
    assert counted(ConvTranspose2d((2, 2), groups=2), (3, 3, 4, 6), read, made) == 15 * 9 * 4 * 6


def test_work_includes_products_of_two_tensors(nets):
    found = macs(nets.vit())
    assert found["attention0.scores"] == found["attention0.values"] == 2 * 5 * 5 * 4
    assert found["attention0.qkv"] == 5 * 8 * 24
    assert found["patches"] == 4 * 16 * 3 * 8
    assert "attention0.weights" not in found
    assert macs(nets.unet())["up1"] == 2 * 2 * 2 * 2 * 8 * 6


def test_the_last_layer_of_every_output(nets, tiny_net):
    assert last_weighted(tiny_net.graph) == ("fc",)
    assert last_weighted(nets.two_heads().graph) == ("classes", "number")
    nodes = (Node("a", Linear(), ("x",)), Node("b", Linear(), ("a",)), Node("r", Relu(), ("x",)))
    assert last_weighted(Graph(nodes, ("x",), ("r", "a", "b", "a"))) == ("a", "b")


def test_tensors_that_depend_on_no_input(nets):
    assert constants(nets.vit().graph) == {"token", "places"}
    nodes = (
        Node("one", Constant(), ()),
        Node("two", Scale(2.0), ("one",)),
        Node("sum", Add(), ("two", "x")),
    )
    graph = Graph(nodes, ("x",), ("sum",))
    assert constants(graph) == {"one", "two"}
    assert ancestors(graph, "sum") == {"one", "two", "sum", "x"}
    assert ancestors(graph, "two") == {"one", "two"}


def test_parameter_count(tiny_net):
    kernels = 27 * 6 + 9 * 6 + 6 * 6 + 9 * 6 * 8 + 8 * 5
    norms = 4 * (6 + 6 + 6 + 8)
    assert parameter_count(tiny_net) == kernels + norms + 8 + 5


def test_describe():
    nodes = (
        Node("conv", Conv2d(), ("images",)),
        Node("bn", BatchNorm(), ("conv",)),
        Node("fc", Linear(), ("bn",)),
    )
    c = jnp.ones(2)
    params = {
        "conv": {"kernel": jnp.ones((2, 2, 3, 2))},
        "bn": {"mean": c, "var": c},
        "fc": {"kernel": jnp.ones((2, 7))},
    }
    model = Model(Graph(nodes, ("images",), ("fc", "bn")), params, (InputContract(4, 5),))
    assert describe(model).splitlines() == [
        "images  input        4x5x3",
        "conv    Conv2d(2x2)  3x4x2  <- images",
        "bn      BatchNorm    3x4x2  <- conv",
        "fc      Linear       3x4x7  <- bn",
        "returns fc, bn",
    ]


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (Relu(), "Relu"),
        (Relu(6.0), "Relu(ceiling=6.0)"),
        (Conv2d((2, 2), ((1, 1), (1, 1)), 4), "Conv2d(3x3, strides=2, padding=1, groups=4)"),
        (Conv2d((2, 1), ((0, 1), (0, 1))), "Conv2d(3x3, strides=(2, 1), padding=(0, 1))"),
        (MaxPool((3, 3), (2, 2)), "MaxPool(window=3, strides=2)"),
        (Reshape((4, 4)), "Reshape(shape=(4, 4))"),
        (
            Slice(((0, None, 1), (0, None, 2), (1, 5, 1), (-3, None, -1))),
            "Slice(bounds=[:, ::2, 1:5, -3::-1])",
        ),
    ],
)
def test_operators_in_brief(op, text):
    assert brief(op, {"kernel": jnp.ones((3, 3, 1, 4))}) == text


def test_constants_and_several_outputs_are_described(nets):
    lines = describe(nets.vit()).splitlines()
    assert lines[3].split() == ["token", "Constant", "1x8"]
    assert describe(nets.two_heads()).endswith("returns classes, number")
    scalar = Model(Graph((Node("c", Constant(), ()),), (), ("c",)), {}, ())
    scalar = with_params(scalar, {"c": {"value": jnp.ones(1)}})
    assert describe(scalar).splitlines()[0] == "c  Constant  1"


def test_names_cannot_break_lines():
    """Files call nodes as they like."""
    hostile = "fc\nreturns everything\x1b[31m"
    node = Node(hostile, Linear(), ("images",))
    params = {hostile: {"kernel": jnp.ones((3, 7))}}
    model = Model(Graph((node,), ("images",), (hostile,)), params, (InputContract(1, 1),))
    text = describe(model)
    assert len(text.splitlines()) == 3
    assert "fc\\nreturns everything\\x1b[31m" in text
    assert "\x1b" not in text
