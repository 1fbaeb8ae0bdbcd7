from itertools import accumulate

import chex
import jax
import numpy as np
import pytest

from dfq_jax.graph.cuts import blocks, canonical, single_live_cuts, stage_sizes
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    WEIGHTED,
    Add,
    Constant,
    Flatten,
    GlobalAvgPool,
    Linear,
    Mul,
    Relu,
    Scale,
)
from dfq_jax.graph.query import constants
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.types import InputContract


def alive_after(graph, index):
    """Tensors made by the first `index + 1` nodes that something later still needs."""
    made = {*graph.inputs, *(n.name for n in graph.nodes[: index + 1])}
    needed = {i for n in graph.nodes[index + 1 :] for i in n.inputs} | set(graph.outputs)
    return made & needed


NETS = ("tiny", "mixed", "dense", "inception", "shuffle", "excite", "vit", "convnext", "unet")


@pytest.mark.parametrize("name", [*NETS, "two_heads"])
def test_cuts_by_definition(name, nets):
    graph = getattr(nets, name)().graph
    fixed = constants(graph)
    wanted = [
        n.name for i, n in enumerate(graph.nodes) if alive_after(graph, i) - fixed == {n.name}
    ]
    assert single_live_cuts(graph) == tuple(wanted)


def test_cuts_respect_residuals_and_returned_tensors(tiny_net):
    cuts = single_live_cuts(tiny_net.graph)
    assert cuts[:4] == ("conv1", "bn1", "relu1", "add")
    graph = tiny_net.graph
    returned = Graph(graph.nodes, graph.inputs, ("relu1", "fc"))
    assert single_live_cuts(returned) == ("conv1", "bn1", "relu1")


def test_outputs_of_the_network_come_first_and_in_its_order(nets):
    """Whatever order they are computed in."""
    graph = nets.two_heads().graph
    turned = Graph(graph.nodes, graph.inputs, ("number", "classes"))
    assert blocks(graph)[-1].graph.outputs == ("classes", "number")
    assert blocks(turned)[-1].graph.outputs == ("number", "classes")


def test_stages_end_where_little_passes(nets):
    """Before what widens first and shrinks then; pooled vectors belong to the stage before."""
    b = nets.Builder(InputContract(32, 32))
    x = b.unit("stem", "images", 8, stride=2)
    x = b.unit("wide", x, 16, kernel=1)
    x = b.unit("narrow", x, 6, kernel=1)
    x = b.unit("next.wide", x, 24, kernel=1)
    x = b.unit("next.shrink", x, 24, stride=2)
    x = b.unit("next.narrow", x, 8, kernel=1)
    x = b.unit("small", x, 8, stride=2)
    x = b.unit("last", x, 8)
    pooled = b.op("flat", Flatten(), b.op("pool", GlobalAvgPool(), x))
    model = b.done(b.linear("fc", pooled, 10))
    ends = [b.graph.outputs[0] for b in blocks(model.graph)]
    sizes = stage_sizes(model)
    assert sum(sizes) == len(ends)
    assert [ends[i - 1] for i in accumulate(sizes)][:2] == ["narrow.act", "next.narrow.act"]
    assert len(sizes) == 3


def test_block_contents(tiny_net):
    pieces = blocks(tiny_net.graph)
    assert [b.names for b in pieces] == [
        ("conv1", "bn1", "relu1"),
        ("depthwise", "bn2", "relu2", "project", "bn3", "add", "relu3", "maxpool"),
        ("conv2", "bn4", "relu4", "pool"),
        ("fc",),
    ]
    assert [b.graph.inputs for b in pieces] == [("images",), ("relu1",), ("maxpool",), ("pool",)]


def test_a_first_piece_without_weights_joins_the_next():
    nodes = (Node("r", Relu(), ("x",)), Node("s", Add(), ("r", "r")), Node("t", Relu(), ("s",)))
    assert [b.names for b in blocks(Graph(nodes, ("x",), ("t",)))] == [("r", "s", "t")]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("folded", [False, True])
def test_blocks_partition_the_network(name, folded, nets):
    model = getattr(nets, name)()
    model = fold_batch_norm(model) if folded else model
    pieces, fixed = blocks(model.graph), constants(model.graph)
    moving = [n for block in pieces for n in block.graph.nodes if n.name not in fixed]
    assert moving == [n for n in model.graph.nodes if n.name not in fixed]
    assert {n for b in pieces for n in b.graph.nodes} == set(model.graph.nodes)
    for block in pieces:
        assert len(block.graph.inputs) == len(block.graph.outputs) == 1
        assert any(isinstance(n.op, WEIGHTED) for n in block.graph.nodes)
        assert not isinstance(block.graph.nodes[0].op, Relu | Add)
    x = nets.images(model, 2)
    through = x
    for block in pieces:
        through = nets.run(canonical(block, model), through)
    np.testing.assert_allclose(through, nets.run(model, x), rtol=1e-5, atol=2e-5)


def names_of(model):
    return [(b.names[0], b.names[-1]) for b in blocks(fold_batch_norm(model).graph)]


def test_blocks_of_transformers_begin_with_the_norm_of_a_branch(nets):
    assert names_of(nets.vit()) == [
        ("patches", "placed"),
        ("before0", "attended0"),
        ("between0", "block0"),
        ("before1", "attended1"),
        ("between1", "first"),
        ("head", "head"),
    ]
    assert blocks(nets.vit().graph)[0].names == (
        *("patches", "tokens", "token", "joined", "places", "placed"),
    )


def test_a_norm_without_a_branch_belongs_to_what_it_norms(nets):
    assert names_of(nets.convnext())[:3] == [
        ("stem", "stem.norm"),
        ("depthwise0", "add0"),
        ("depthwise1", "down.norm"),
    ]


def test_the_last_block_may_have_several_outputs(nets):
    last = blocks(fold_batch_norm(nets.two_heads()).graph)[-1]
    assert (last.graph.inputs, last.graph.outputs) == (("pool",), ("classes", "number"))


def test_constants_stand_in_every_block_that_reads_them():
    nodes = (
        Node("c", Constant(), ()),
        Node("d", Scale(2.0), ("c",)),
        Node("a", Linear(), ("x",)),
        Node("p", Mul(), ("a", "d")),
        Node("b", Linear(), ("p",)),
        Node("q", Mul(), ("b", "c")),
    )
    graph = Graph(nodes, ("x",), ("q",))
    assert single_live_cuts(graph) == ("a", "p", "b", "q")
    assert [b.names for b in blocks(graph)] == [("c", "d", "a", "p"), ("c", "b", "q")]


def test_canonical_carries_parameters_and_moments(tiny_net):
    model = fold_batch_norm(tiny_net)
    piece = canonical(blocks(model.graph)[1], model)
    assert piece.graph.inputs == ("x0",)
    assert [n.name for n in piece.graph.nodes] == [f"n{i}" for i in range(6)]
    assert piece.graph["n3"].inputs == ("n2", "x0")
    assert set(piece.params) == set(piece.moments) == {"n0", "n2"}
    assert piece.params["n2"]["kernel"] is model.params["project"]["kernel"]
    assert piece.moments["n0"] is model.moments["depthwise"]
    assert piece.inputs == ()  # what it reads are tensors of the network


def test_equal_blocks_share_one_program(nets):
    b = nets.Builder(nets.tiny().contract)
    x = b.conv("stem", "images", 4)
    for i in range(3):
        y = b.op(f"relu{i}", Relu(), b.conv(f"first{i}", x, 4))
        x = b.op(f"add{i}", Add(), b.conv(f"second{i}", y, 4), x)
    model = b.done(b.linear("fc", x, 2))
    pieces = [canonical(piece, model) for piece in blocks(model.graph)[1:4]]
    assert pieces[0].graph == pieces[1].graph == pieces[2].graph
    run = jax.jit(chex.assert_max_traces(lambda m, x: evaluate(m, x)[0][0], n=1))
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    outputs = [np.asarray(run(m, x)) for m in pieces]
    assert not np.allclose(outputs[0], outputs[1])
