"""Losses of a student against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import Add, GlobalAvgPool, Relu
from dfq_jax.training.losses import (
    Answers,
    Lesson,
    block_outputs,
    branch_outputs,
    channel_attention,
    channel_relations,
    direction_gap,
    distillation,
    easy_label_loss,
    embedding_loss,
    feature_gap,
    label_loss,
    margin_loss,
    relation_loss,
    score_distance,
    score_gap,
    spatial_attention,
)
from dfq_jax.types import InputContract

RNG = np.random.default_rng(3)
T, S = (RNG.normal(size=(6, 5)).astype(np.float32) for _ in range(2))
A, B = (RNG.normal(size=(6, 4, 4, 3)).astype(np.float32) for _ in range(2))
Y = np.eye(5, dtype=np.float32)[[0, 1, 2, 3, 4, 0]]


def one_tensor(graph):
    return ("t",)


@pytest.fixture
def lesson():
    nowhere = Model(Graph((), ("x",), ("x",)), {}, ())
    answers = lambda logits, tap: Answers(jnp.asarray(logits), {"t": jnp.asarray(tap)}, nowhere)
    images, key = jnp.zeros((6, 2, 2, 3)), jax.random.key(0)
    return Lesson(images, jnp.asarray(Y), answers(T, A), answers(S, B), key)


def softmax(v):
    e = np.exp(v - v.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(t, s, temperature):
    p, q = softmax(t / temperature), softmax(s / temperature)
    return (p * (np.log(p) - np.log(q))).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_distillation(lesson, temperature):
    wanted = temperature**2 * kl(T, S, temperature).mean()
    over_batch = distillation(temperature=temperature)(lesson)
    np.testing.assert_allclose(over_batch, wanted, rtol=1e-4)
    over_all = distillation(temperature=temperature, reduction="entries")(lesson)
    np.testing.assert_allclose(over_all * 5, over_batch, rtol=1e-6)


def test_slopes_are_nearly_the_same_at_all_high_temperatures(lesson):
    """`alpha T^2 KL` has a slope of about (s - t) / K."""

    def slope(temperature):
        loss = lambda s: distillation(temperature=temperature)(
            lesson._replace(student=lesson.student._replace(logits=s))
        )
        return np.asarray(jax.grad(loss)(lesson.student.logits))

    cold, warm = slope(10.0), slope(20.0)
    np.testing.assert_allclose(np.linalg.norm(cold), np.linalg.norm(warm), rtol=0.1)


def test_labels(lesson):
    entropy = -(Y * np.log(softmax(S))).sum(-1)
    np.testing.assert_allclose(label_loss(lesson), entropy.mean(), rtol=1e-5)
    sure = (Y * softmax(T)).sum(-1)
    hardest = float(np.sort(1 - sure)[2]) + 1e-4
    easy = (1 - sure) <= hardest
    assert easy.sum() == 3
    wanted = entropy[easy].sum() / 6
    np.testing.assert_allclose(easy_label_loss(hardest=hardest)(lesson), wanted, rtol=1e-5)


def test_gaps_of_outputs(lesson):
    np.testing.assert_allclose(score_gap(lesson), ((T - S) ** 2).mean() / (T**2).mean(), rtol=1e-5)
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    gap = ((unit(T) - unit(S)) ** 2).sum(-1).mean()
    np.testing.assert_allclose(direction_gap(lesson), gap, rtol=1e-5)
    mse = ((unit(T) - unit(S)) ** 2).mean()
    cosines = (unit(T) * unit(S)).sum(-1)
    np.testing.assert_allclose(embedding_loss(lesson), mse, rtol=1e-5)
    np.testing.assert_allclose(T.size * embedding_loss(lesson), (2 - 2 * cosines).sum(), rtol=1e-5)
    longer = lesson._replace(student=lesson.student._replace(logits=jnp.asarray(7 * S)))
    np.testing.assert_allclose(embedding_loss(longer), mse, rtol=1e-5)
    gram = lambda v: unit(v) @ unit(v).T
    np.testing.assert_allclose(relation_loss(lesson), ((gram(T) - gram(S)) ** 2).mean(), rtol=1e-4)


def test_margin(lesson):
    own = (Y * S).sum(-1)
    other = np.where(Y > 0, -np.inf, S).max(-1)
    wanted = np.maximum(0.5 - own + other, 0).mean()
    np.testing.assert_allclose(margin_loss(margin=0.5)(lesson), wanted, rtol=1e-5)


def test_attention(lesson):
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    by_channel = lambda v: unit((v**2).mean((1, 2)))
    wanted = ((by_channel(A) - by_channel(B)) ** 2).mean()
    np.testing.assert_allclose(channel_attention(of=one_tensor)(lesson), wanted, rtol=1e-4)
    by_place = lambda v: unit((v**2).mean(-1).reshape(6, -1))
    wanted = ((by_place(A) - by_place(B)) ** 2).mean()
    np.testing.assert_allclose(spatial_attention(of=one_tensor)(lesson), wanted, rtol=1e-4)
    flat = lambda v: np.moveaxis(v.reshape(6, 16, 3), 2, 1)
    alike = lambda v: np.stack([unit(flat(v)[b]) @ unit(flat(v)[b]).T for b in range(6)])
    wanted = np.abs(alike(A) - alike(B)).mean()
    np.testing.assert_allclose(channel_relations(of=one_tensor)(lesson), wanted, rtol=1e-4)
    wanted = ((A - B) ** 2).mean() / A.var((0, 1, 2)).mean()
    np.testing.assert_allclose(feature_gap(of=one_tensor)(lesson), wanted, rtol=1e-4)


def test_nothing_is_lost_by_an_equal_student(lesson):
    same = lesson._replace(student=lesson.teacher)
    for loss in (
        distillation(),
        score_gap,
        score_distance,
        channel_relations(of=one_tensor),
        direction_gap,
        embedding_loss,
        relation_loss,
        feature_gap(of=one_tensor),
    ):
        np.testing.assert_allclose(loss(same), 0.0, atol=1e-6)


def test_what_is_watched(tiny_net):
    graph = tiny_net.graph
    assert set(block_outputs(graph)) < set(graph.by_name) - set(graph.outputs)
    sums = {name for node in graph.nodes if type(node.op).__name__ == "Add" for name in node.inputs}
    assert branch_outputs(graph)
    assert set(branch_outputs(graph)) <= sums


def test_a_shortcut_with_a_layer_of_its_own_is_no_branch(nets):
    """Importers put the projection after the branch, as PyTorch computes them."""
    b = nets.Builder(InputContract(6, 6))
    x = b.op("relu1", Relu(), b.conv("conv1", "images", 4))
    y = b.conv("branch2", b.op("relu2", Relu(), b.conv("branch1", x, 4)), 5)
    added = b.op("add", Add(), y, b.conv("projection", x, 5, kernel=1))
    other = b.op("add2", Add(), added, b.conv("again", b.op("relu3", Relu(), added), 5))
    model = b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), other), 3))
    assert branch_outputs(model.graph) == ("branch2", "again")
