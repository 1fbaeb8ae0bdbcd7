import dataclasses

import jax.numpy as jnp
import pytest

from dfq_jax.errors import GraphError
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Add, BatchNorm, Conv2d, Linear, Relu
from dfq_jax.graph.query import (
    batch_norms,
    consumers,
    describe,
    macs,
    only_consumer,
    output_shapes,
    parameter_count,
    weighted_nodes,
    work,
)
from dfq_jax.graph.rewrite import with_params
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


def test_work_needs_a_kernel():
    with pytest.raises(GraphError, match=r"node r = Relu\(.*\) <- x has no kernel"):
        work(Node("r", Relu(), ("x",)), (1, 1), (1, 1))


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
    model = Model(Graph(nodes, ("images",), ("fc", "bn")), params, InputContract(4, 5))
    lines = describe(model).splitlines()
    assert lines[0] == "images: input 4x5x3"
    assert lines[1] == f"{nodes[0]} : 3x4x2"
    assert lines[3:] == ["fc = Linear() <- bn : 3x4x7", "returns fc, bn"]
