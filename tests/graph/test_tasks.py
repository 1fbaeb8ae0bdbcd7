"""What networks are for: found in their graphs, or said."""

import dataclasses
from typing import get_args

import jax.numpy as jnp
import pytest

from dfq_jax.base.words import TaskName
from dfq_jax.errors import DataError, UsageError
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    Activation,
    Broadcast,
    Clip,
    Concat,
    GlobalAvgPool,
    Linear,
    Relu,
    Reshape,
    Resize,
    Softmax,
    Sub,
)
from dfq_jax.graph.tasks import (
    TASKS,
    Classifier,
    DenseClassifier,
    Detector,
    Embedding,
    ImageToImage,
    LanguageModel,
    PlainValues,
    name_of,
    parts_of,
    task_from_json,
    task_named,
    task_of,
    task_to_json,
)
from dfq_jax.types import Input, InputContract, Tokens, Values

IMAGE = InputContract(4, 4, (0.5,) * 3, (0.25,) * 3)
GREY = InputContract(4, 4, (0.5,), (0.25,))


def network(*nodes: Node, outputs=None, read: Input = IMAGE, **params) -> Model:
    """A chain of operators that begins at `x`."""
    ends = outputs or (nodes[-1].name,)
    return Model(Graph(nodes, ("x",), ends), params, (read,))


SMALLER = Resize((2, 2), (0.5, 0.5))
LARGER = Resize((8, 8), (2.0, 2.0))
SCORES = (Node("y", GlobalAvgPool(), ("x",)),)


def detector() -> Model:
    """Scores behind a sigmoid beside offsets, on one output."""
    return network(
        Node("scores", Activation("sigmoid"), ("x",)),
        Node("boxes", Activation("tanh"), ("x",)),
        Node("y", Concat(3), ("scores", "boxes")),
    )


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (network(*SCORES), Classifier()),
        (network(Node("y", Activation("gelu"), ("x",))), DenseClassifier()),
        (network(Node("y", Activation("tanh"), ("x",))), ImageToImage(-1.0, 1.0)),
        (network(Node("y", Activation("sigmoid"), ("x",))), ImageToImage(0.0, 1.0)),
        (network(Node("y", Activation("sigmoid"), ("x",)), read=GREY), Classifier()),
        (network(Node("y", Clip(0.0, 255.0), ("x",)), read=GREY), ImageToImage(0.0, 255.0)),
        (
            network(Node("n", Activation("gelu"), ("x",)), Node("y", Sub(), ("x", "n"))),
            ImageToImage(-2.0, 2.0),
        ),
        (network(Node("y", Activation("softplus"), ("x",)), read=GREY), PlainValues()),
        (
            network(Node("d", Relu(), ("x",)), Node("y", SMALLER, ("d",)), read=GREY),
            PlainValues(),
        ),
        (network(Node("y", LARGER, ("x",))), ImageToImage(-2.0, 2.0)),
        (network(Node("u", LARGER, ("x",)), Node("y", Softmax(3), ("u",))), DenseClassifier()),
        (detector(), Detector()),
        (
            network(
                Node("y", Linear(), ("x",)), read=Values((5,)), y=dict(kernel=jnp.ones((5, 2)))
            ),
            Classifier(),
        ),
    ],
    ids=[
        "scores",
        "dense",
        "autoencoder ending in tanh",
        "autoencoder ending in a sigmoid",
        "mask",
        "clipped to pixels",
        "denoiser",
        "depth",
        "depth at another size",
        "larger image",
        "larger classes",
        "detector",
        "features",
    ],
)
def test_a_graph_tells_its_task(model, task):
    assert task_of(model) == task


def test_scores_of_every_token_are_a_language_model():
    nodes = (Node("r", Reshape((6, 1)), ("x",)), Node("y", Broadcast((6, 9)), ("r",)))
    assert task_of(network(*nodes, read=Tokens(6, 9))) == LanguageModel()
    assert task_of(network(*nodes, read=Tokens(6, 10))) != LanguageModel()
    assert task_of(network(*nodes, read=Values((6,)))) != LanguageModel()


def test_what_is_said_is_how_outputs_are_read():
    scores = network(*SCORES)
    assert [(p.kind, p.axis) for p in parts_of(scores)] == [("classes", 0)]
    (vector,) = parts_of(scores, Embedding())
    assert (vector.kind, vector.axis, vector.certain) == ("values", None, True)
    (dense,) = parts_of(network(Node("y", Activation("tanh"), ("x",))), DenseClassifier())
    assert (dense.kind, dense.axis, dense.certain) == ("classes", 2, True)
    (image,) = parts_of(network(Node("y", LARGER, ("x",))))
    assert image.kind == "values"


def test_a_classifier_keeps_what_its_softmax_says():
    model = network(Node("y", Softmax(1), ("x",)))
    (part,) = parts_of(model, DenseClassifier())
    assert (part.curve, part.axis) == ("softmax", 0)


def test_a_detector_reads_each_part_by_itself():
    kinds = [part.kind for part in parts_of(detector(), Detector())]
    assert kinds == ["signs", "values"]
    assert kinds == [part.kind for part in parts_of(detector())]


def test_names_are_those_of_the_command_line():
    assert tuple(TASKS) == get_args(TaskName)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_survive_a_round_trip(name):
    task = task_named(name)
    assert name_of(task) == name
    assert task_from_json(task_to_json(task)) == task


def test_options_survive_a_round_trip():
    task = ImageToImage(-1.0, 1.0, luma=True, border=4, rounded=True)
    assert task_from_json(task_to_json(task)) == task
    assert task_to_json(PlainValues()) == {"name": "values"}


@pytest.mark.parametrize(
    "data",
    [None, 3, {}, {"name": "poetry"}, {"name": "image", "low": 2}, {"name": "values", "x": 1}],
)
def test_what_is_no_task_is_damage(data):
    with pytest.raises(DataError, match="is no task; known are classifier"):
        task_from_json(data)


def test_unknown_names_and_ranges_are_refused():
    with pytest.raises(UsageError, match="'clasifier'"):
        task_named("clasifier")
    with pytest.raises(UsageError, match="black must lie below white"):
        dataclasses.replace(ImageToImage(), high=0.0)
