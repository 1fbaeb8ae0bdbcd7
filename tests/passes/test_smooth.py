"""Outliers of activations moved into kernels: nothing changes but how large channels are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llamas import bert_folder, llama_file

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import LayerNorm, Linear
from dfq_jax.io.load import load
from dfq_jax.passes.smooth import smooth, smoothable
from dfq_jax.types import Values

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(20, 6)), jnp.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Model:
    return load(llama_file(tmp_path_factory.mktemp("net") / "net.bin"), size=8).model


def normed(bias: bool = True) -> Model:
    """A norm with one large channel, and two layers behind it."""
    norm = {"scale": np.array([1, 1, 50, 1, 1, 1.0])} | ({"bias": np.ones(6)} if bias else {})
    params = {"norm": norm, "a": {"kernel": RNG.normal(size=(6, 4))}}
    params |= {"b": {"kernel": RNG.normal(size=(6, 3)), "bias": np.ones(3)}}
    arrays = {n: {k: jnp.asarray(v, jnp.float32) for k, v in p.items()} for n, p in params.items()}
    nodes = (
        Node("norm", LayerNorm(), ("x",)),
        Node("a", Linear(), ("norm",)),
        Node("b", Linear(), ("norm",)),
    )
    return Model(Graph(nodes, ("x",), ("a", "b")), arrays, (Values((6,)),))


def test_factors_are_those_of_the_paper():
    model = normed()
    found = smooth(model, X, 0.5)
    peaks = np.abs(np.asarray(evaluate(model, X, taps=["norm"])[1]["norm"])).max(0)
    kernels = [np.abs(np.asarray(model.params[n]["kernel"])).max(1) for n in "ab"]
    s = np.sqrt(peaks / np.maximum(*kernels))
    s /= np.exp(np.log(s).mean())
    np.testing.assert_allclose(
        found.params["norm"]["scale"], model.params["norm"]["scale"] / s, rtol=1e-5
    )
    np.testing.assert_allclose(
        found.params["norm"]["bias"], model.params["norm"]["bias"] / s, rtol=1e-5
    )
    want = model.params["a"]["kernel"] * s[:, None]
    np.testing.assert_allclose(found.params["a"]["kernel"], want, rtol=1e-5)


def test_the_function_stays_and_channels_become_alike():
    model = normed()
    found = smooth(model, X, 1.0)
    before, after = (evaluate(m, X, taps=["norm"]) for m in (model, found))
    for a, b in zip(before[0], after[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    peaks = jnp.abs(after[1]["norm"]).max(0)
    np.testing.assert_allclose(peaks / peaks[0], jnp.ones(6), rtol=1e-4)


def test_norms_and_gated_products_of_a_llama_are_smoothed(llama):
    found = {place.tensor: place for place in smoothable(llama)}
    assert set(found) == {
        *(f"layers.{i}.{n}" for i in (0, 1) for n in ("attention_norm", "ffn_norm")),
        *(f"layers.{i}.feed_forward.mul" for i in (0, 1)),
        "norm",
    }
    assert found["layers.0.feed_forward.mul"].giver == "layers.0.feed_forward.w3"
    ids = jax.random.randint(jax.random.key(0), (4, 8), 0, 32)
    before, after = (evaluate(m, ids)[0][0] for m in (llama, smooth(llama, ids, 0.9)))
    np.testing.assert_allclose(after, before, atol=1e-4 * float(jnp.abs(before).max()))


def test_what_others_read_as_well_stays(tmp_path):
    """A norm whose output also goes on as the stream of an encoder."""
    model = load(bert_folder(tmp_path / "net"), size=6).model
    assert smoothable(model) == ()
    assert smooth(model, jnp.zeros((2, 6), jnp.int32)) is model
