"""Text that a network samples: what its probabilities say, place by place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llamas import llama_file

import dfq_jax as dfq
from dfq_jax.errors import UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Add, Constant, Linear
from dfq_jax.graph.token_ops import Embed
from dfq_jax.io.load import load
from dfq_jax.recipes.rows import AT_ONCE, method_of, sampled, written
from dfq_jax.types import Tokens, Values


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Model:
    return load(llama_file(tmp_path_factory.mktemp("net") / "net.bin"), size=12).model


def chain(chances: np.ndarray, begin: int | None) -> Model:
    """A network that knows nothing but which token follows which."""
    params = {"look": {"table": jnp.asarray(np.log(chances), jnp.float32)}}
    nodes = (Node("look", Embed(), ("ids",)),)
    read = Tokens(40, len(chances), begin=begin)
    return Model(Graph(nodes, ("ids",), ("look",)), params, (read,))


def test_rows_are_those_of_drawing_token_after_token(llama):
    key = jax.random.key(3)
    rows = np.asarray(written(llama, key))
    noise = jax.random.gumbel(jax.random.split(key)[1], (AT_ONCE, 12, 32))
    ids = np.ones((AT_ONCE, 12), np.int32)
    for place in range(11):
        scores = evaluate(llama, jnp.asarray(ids))[0][0]
        ids[:, place + 1] = np.argmax(scores[:, place] + noise[:, place], axis=-1)
    np.testing.assert_array_equal(rows, ids)
    assert len({tuple(row) for row in rows}) > 1


def test_tokens_come_as_often_as_the_network_says():
    chances = np.array([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25], [0.05, 0.05, 0.9]])
    rows = np.asarray(sampled(chain(chances, 1), 64, jax.random.key(0)))
    assert np.all(rows[:, 0] == 1)
    counts = np.zeros((3, 3))
    np.add.at(counts, (rows[:, :-1].ravel(), rows[:, 1:].ravel()), 1)
    found = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(found, chances, atol=5 * np.sqrt(0.25 / counts.sum(1).min()))


def test_without_a_first_token_all_begin_a_row():
    rows = np.asarray(sampled(chain(np.full((3, 3), 1 / 3), None), 32, jax.random.key(0)))
    assert set(rows[:, 0]) == {0, 1, 2}


def test_rows_say_where_they_come_from(llama):
    made = dfq.synthesize(llama, n=3, seed=5)
    assert (made.provenance["method"], made.evidence, len(made)) == ("sampled", "statistics", 3)
    np.testing.assert_array_equal(made.array, dfq.synthesize(llama, "sampled", 3, seed=5).array)
    random = dfq.synthesize(llama, "noise", 3)
    assert random.evidence == "noise"
    assert "random ones" in random.provenance["notes"][0]


def test_text_is_for_networks_that_predict_it():
    table = jnp.ones((9, 4))
    nodes = (Node("look", Embed(), ("ids",)),)
    encoder = Model(Graph(nodes, ("ids",), ("look",)), {"look": {"table": table}}, (Tokens(5, 9),))
    assert method_of(encoder, "best") == "noise"
    with pytest.raises(UsageError, match="predict the next token"):
        dfq.synthesize(encoder, "sampled", 2)
    with pytest.raises(UsageError, match="none of best, sampled, noise"):
        dfq.synthesize(encoder, "zeroq", 2)


def test_plain_values_are_drawn_from_their_range():
    nodes = (Node("fc", Linear(), ("x",)), Node("c", Constant(), ()), Node("y", Add(), ("fc", "c")))
    params = {"fc": {"kernel": jnp.ones((3, 2))}, "c": {"value": jnp.ones((1, 2))}}
    model = Model(Graph(nodes, ("x",), ("y",)), params, (Values((3,), -2.0, 5.0),))
    made = np.asarray(dfq.synthesize(model, n=50).array)
    assert made.shape == (50, 3)
    assert -2 <= made.min() < 0 < 3 < made.max() <= 5
