"""What outputs say, judged by running the network's own operators on numbers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.heads import heads_of
from dfq_jax.graph.ops import (
    Activation,
    Broadcast,
    Clip,
    Concat,
    Constant,
    Conv2d,
    Div,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Linear,
    Mul,
    Power,
    Reduce,
    Reshape,
    Scale,
    Slice,
    Softmax,
    Transpose,
)
from dfq_jax.graph.tasks import Embedding, task_of
from dfq_jax.types import InputContract

ALL = (0, None, 1)


class Net:
    """Collects nodes on images of 4x4x3."""

    def __init__(self):
        self.nodes, self.params = [], {}

    def op(self, name, op, *inputs, **slots):
        self.nodes.append(Node(name, op, inputs))
        self.params[name] = {k: jnp.asarray(v, jnp.float32) for k, v in slots.items()}
        return name

    def conv(self, name, x, cin, cout):
        kernel = np.random.default_rng(len(self.nodes)).normal(size=(1, 1, cin, cout))
        return self.op(name, Conv2d(), x, kernel=kernel)

    def linear(self, name, x, cin, cout):
        kernel = np.random.default_rng(len(self.nodes)).normal(size=(cin, cout))
        return self.op(name, Linear(), x, kernel=kernel)

    def model(self, *outputs):
        graph = Graph(tuple(self.nodes), ("images",), outputs)
        return Model(graph, self.params, (InputContract(4, 4),))


def told(part):
    return part.tensor, part.curve, part.kind, part.axis, part.where.shape


def check_positions(nets, model):
    """Every part's values out of the output are those of its tensor, behind its curve."""
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 3))
    found = nets.forward(model, x)
    for head in heads_of(model):
        for part in head.parts:
            before, behind = part.of_tensor(found[part.tensor]), part.of_output(found[part.output])
            if part.curve == "sigmoid":
                before = 1 / (1 + np.exp(-before))
            elif part.axis is not None and part.curve == "softmax":
                e = np.exp(before)
                before = e / e.sum(part.axis + 1, keepdims=True)
            np.testing.assert_allclose(behind, before, rtol=1e-6)


def parts(model):
    return [part for head in heads_of(model) for part in head.parts]


@pytest.mark.parametrize("last", [None, "softmax", "sigmoid"])
def test_a_classifier(nets, last):
    n = Net()
    x = n.linear("fc", n.op("pool", GlobalAvgPool(), "images"), 3, 5)
    if last:
        x = n.op("last", Softmax(-1) if last == "softmax" else Activation(last), x)
    (part,) = parts(n.model(x))
    assert told(part) == ("fc", last, "classes", 0, (5,))
    assert (part.name, part.certain) == (x, True)
    check_positions(nets, n.model(x))


def test_pixels_and_one_score(nets):
    n = Net()
    pixels, mask = n.conv("pixels", "images", 3, 6), n.conv("mask", "images", 3, 1)
    model = n.model(pixels, mask)
    assert [told(p) for p in parts(model)] == [
        ("pixels", None, "classes", 2, (4, 4, 6)),
        ("mask", None, "values", None, (4, 4, 1)),
    ]
    assert [p.certain for p in parts(model)] == [False, False]
    check_positions(nets, model)


def test_one_number_is_a_regression(nets):
    n = Net()
    model = n.model(n.linear("fc", n.op("pool", GlobalAvgPool(), "images"), 3, 1))
    assert [told(p) for p in parts(model)] == [("fc", None, "values", None, (1,))]
    check_positions(nets, model)


def lengths(n, x, how):
    """Euclidean lengths of vectors of 5, as exporters spell them."""
    if how == "l2":
        return n.op("length", Reduce("l2", (1,), True), x)
    squares = n.op("squares", Mul(), x, x) if how == "mul" else n.op("squares", Power(2.0), x)
    sums = n.op("sums", Reduce("sum", (1,), True), squares)
    root = Power(-0.5) if how == "rsqrt" else Activation("sqrt")
    return n.op("length", root, n.op("eps", Clip(1e-12, None), sums))


@pytest.mark.parametrize("how", ["l2", "mul", "pow", "rsqrt"])
def test_vectors_divided_by_their_length_are_directions(nets, how):
    n = Net()
    x = n.linear("fc", n.op("pool", GlobalAvgPool(), "images"), 3, 5)
    length = n.op("wide", Broadcast((5,)), lengths(n, x, how))
    model = n.model(n.op("unit", Mul() if how == "rsqrt" else Div(), x, length))
    (part,) = parts(model)
    assert told(part)[2:4] == ("values", None)
    assert task_of(model) == Embedding()
    out = nets.forward(model, np.random.default_rng(0).normal(size=(3, 4, 4, 3)))["unit"]
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("op", "slots"),
    [
        (Activation("tanh"), {}),
        (LayerNorm(), {"scale": np.ones(5), "bias": np.zeros(5)}),
        (Div(), None),
    ],
    ids=["tanh", "layer norm", "another vector"],
)
def test_states_are_no_scores_and_quotients_may_be(op, slots):
    n = Net()
    x = n.linear("fc", n.op("pool", GlobalAvgPool(), "images"), 3, 5)
    if slots is None:
        y = n.op("y", op, x, n.linear("other", "pool", 3, 5))
    else:
        y = n.op("y", op, x, **slots)
    kind = told(parts(n.model(y))[0])[2]
    assert kind == ("classes" if slots is None else "values")


def test_a_pooled_state_is_still_one():
    n = Net()
    x = n.op("mean", GlobalAvgPool(), n.op("bounded", Activation("tanh"), "images"))
    assert told(parts(n.model(x))[0])[2] == "values"


def test_what_a_softmax_reads_tells_scores_from_values(nets):
    """Beside it, a vector is four numbers and no class."""
    n = Net()
    vector = n.op("pool", GlobalAvgPool(), "images")
    n.op("classes", Softmax(-1), n.linear("fc", vector, 3, 5))
    n.linear("box", vector, 3, 4)
    assert [told(p) for p in parts(n.model("classes", "box"))] == [
        ("fc", "softmax", "classes", 0, (5,)),
        ("box", None, "values", None, (4,)),
    ]
    assert told(parts(n.model("box"))[0])[2] == "classes"  # nothing says otherwise


@pytest.mark.parametrize("order", ["rows", "channels", "flat"])
def test_the_order_of_axes_does_not_matter(nets, order):
    """Boxes in pixels and scores in [0, 1], joined, in any layout."""
    n = Net()
    raw = n.conv("raw", "images", 3, 9)
    cut = lambda name, a, b: n.op(name, Slice((ALL, ALL, ALL, (a, b, 1))), raw)
    box = n.op("box", Scale(320.0), n.op("boxes", Activation("sigmoid"), cut("first", 0, 4)))
    score = n.op("scores", Activation("sigmoid"), cut("rest", 4, None))
    x = n.op("joined", Concat(3), box, score)
    if order == "rows":
        x = n.op("out", Reshape((16, 9)), x)
    elif order == "channels":
        x = n.op("turned", Transpose((0, 3, 1, 2)), x)
        x = n.op("out", Reshape((9, 16)), x)
    else:
        x = n.op("out", Flatten(), x)
    model = n.model(x)
    assert [told(p) for p in parts(model)] == [
        ("box", None, "values", None, (4, 4, 4)),
        ("raw", "sigmoid", "signs", None, (4, 4, 5)),
    ]
    assert [p.name for p in parts(model)] == ["out: box", "out: scores"]
    check_positions(nets, model)


def test_anchors_of_two_levels_and_priors(nets):
    """Softmax over the classes of every anchor; constants say nothing."""
    n = Net()
    levels = [
        n.op(f"anchors{i}", Reshape((32, 3)), n.conv(f"level{i}", "images", 3, 6)) for i in (0, 1)
    ]
    scores = n.op("scores", Softmax(2), n.op("levels", Concat(1), *levels))
    one = n.op("prior", Constant(), value=np.ones((1, 1, 2)))
    priors = n.op("priors", Broadcast((64, 2)), one)
    model = n.model(n.op("out", Concat(2), scores, priors))
    (part,) = parts(model)
    assert told(part) == ("levels", "softmax", "classes", 1, (64, 3))
    check_positions(nets, model)
    below = n.model(n.op("raw", Concat(2), "levels", "priors"))
    assert [told(p)[:3] for p in parts(below)] == [
        ("level0", None, "values"),
        ("level1", None, "values"),
    ]


def test_parts_behind_one_sigmoid_have_names_of_their_own(nets):
    """Scales of a detector that are joined before the sigmoid."""
    n = Net()
    levels = [n.conv(f"level{i}", "images", 3, 2 + i) for i in (0, 1)]
    model = n.model(n.op("scores", Activation("sigmoid"), n.op("levels", Concat(3), *levels)))
    assert [part.name for part in parts(model)] == [
        "scores: scores of level0",
        "scores: scores of level1",
    ]
    check_positions(nets, model)


def test_some_classes_of_a_softmax(nets):
    """What reaches the output is no choice among all of them."""
    n = Net()
    soft = n.op("soft", Softmax(-1), n.conv("raw", "images", 3, 2))
    face = n.op("face", Slice((ALL, ALL, ALL, (1, 2, 1))), soft)
    (part,) = parts(n.model(face))
    assert told(part) == ("soft", None, "values", None, (4, 4, 1))
    check_positions(nets, n.model(face))


def test_scattered_values_are_flat(nets):
    n = Net()
    x = n.op("flat", Reshape((48,)), n.conv("raw", "images", 3, 3))
    model = n.model(n.op("odd", Slice((ALL, (0, 47, 1))), x))
    (part,) = parts(model)
    assert part.where.shape == (47,)
    check_positions(nets, model)


def test_an_output_named_twice_and_inputs_passed_on(nets):
    n = Net()
    model = n.model(n.conv("raw", "images", 3, 3), "raw")
    assert len(heads_of(model)) == 1
    given = dataclasses.replace(model, graph=Graph((), ("images",), ("images",)))
    assert told(parts(given)[0]) == ("images", None, "classes", 2, (4, 4, 3))
    n.op("alone", Constant(), value=np.ones((1, 4)))
    assert heads_of(n.model("alone"))[0].parts == ()
