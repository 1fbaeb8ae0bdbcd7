"""Outputs are judged by the one that suffers most, and by decisions of all of them."""

import math

import numpy as np
import pytest

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Activation
from dfq_jax.graph.tasks import Classifier, PlainValues
from dfq_jax.report.judge import judge_of
from dfq_jax.types import Values


def judged(exact, rough, curve=None, task=None):
    """The verdict on a network that returns what it reads, behind a curve."""
    inputs = tuple(Values(x.shape[1:]) for x in exact)
    names = tuple(f"x{i}" for i in range(len(exact)))
    nodes = tuple(Node(f"y{i}", Activation(curve or "gelu"), (x,)) for i, x in enumerate(names))
    graph = Graph(nodes, names, tuple(n.name for n in nodes))
    return judge_of(Model(graph, {}, inputs), task)(exact, rough)


def test_the_worst_output_decides():
    exact = np.array([[1.0, 2.0], [3.0, 0.0]], np.float32), np.full((2, 4, 1), 10.0, np.float32)
    rough = exact[0] + np.float32(0.1), exact[1] + np.float32(1.0)
    found = judged(exact, rough)
    assert found.sqnr_db == pytest.approx(20.0)
    assert found.agreement == 1.0
    first = judged(exact[:1], rough[:1])
    assert first.sqnr_db == pytest.approx(10 * math.log10(14 / 0.04), abs=1e-4)


def test_agreement_by_class_by_position_and_by_sign():
    a = np.array([[1.0, 2.0], [3.0, 0.0]], np.float32)
    assert judged((a,), (a[:, ::-1],)).agreement == 0.0
    assert judged((a,), (np.array([[1.0, 2.0], [0.0, 3.0]], np.float32),)).agreement == 0.5
    pixels = np.zeros((1, 2, 2, 3), np.float32)
    pixels[..., 1] = 1
    other = pixels.copy()
    other[0, 0, 0, 2] = 5
    assert judged((pixels,), (other,)).agreement == 0.75
    number = np.array([[1.0], [-2.0]], np.float32)
    assert judged((number,), (-number,), task=Classifier()).agreement == 0.0
    assert judged((number,), (-number,)).agreement == 1.0  # a regression decides nothing
    assert judged((a,), (a[:, ::-1],), "tanh").agreement == 1.0  # nor does a state


def test_the_part_that_agrees_least_decides_wherever_it_stands():
    a = np.array([[1.0, 2.0], [3.0, 0.0]], np.float32)
    assert judged((a, a), (a, a[:, ::-1])).agreement == 0.0
    assert judged((a, a), (a, a[:, ::-1]), task=PlainValues()).agreement == 1.0


def test_a_sigmoid_decides_at_one_half():
    p = np.array([[[0.2], [0.4], [0.6]]], np.float32)
    q = np.array([[[0.1], [0.6], [0.9]]], np.float32)
    assert judged((p,), (q,), "sigmoid").agreement == pytest.approx(2 / 3)


def test_ends():
    a = np.ones((2, 3), np.float32)
    assert judged((a,), (a,)) == (math.inf, 1.0)
    assert judged((a,), (a * np.nan,)).sqnr_db == -math.inf
    assert judged((a * 0,), (a,)).sqnr_db < -200
