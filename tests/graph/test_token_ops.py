"""Operators of tokens against NumPy, and their ONNX form against ONNX Runtime."""

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Reshape
from dfq_jax.graph.token_ops import Embed, Present, RmsNorm, Rotary
from dfq_jax.io.onnx.export import float_onnx, serialize
from dfq_jax.io.runtime.session import open_session
from dfq_jax.types import Tokens

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 11, (3, 5)).astype(np.int32)
TABLE, SCALE = RNG.normal(size=(11, 8)), RNG.normal(size=8)
ANGLES = RNG.uniform(0, 6, (5, 2))
LOOK = Node("look", Embed(), ("ids",))
SPLIT = Node("split", Reshape((5, 2, 4)), ("look",))


def turned(x):
    """Every plane by its angle, one complex number at a time."""
    planes = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * ANGLES)[:, None]
    return np.concatenate([planes.real, planes.imag], axis=-1)


ROWS = TABLE[IDS]
CASES = {
    "embed": ((LOOK,), {}, ROWS),
    "present": ((Node("found", Present(3), ("ids",)),), {}, (IDS != 3).astype(float)),
    "rms": (
        (LOOK, Node("norm", RmsNorm(1e-3), ("look",))),
        {"norm": {"scale": SCALE}},
        ROWS / np.sqrt((ROWS**2).mean(-1, keepdims=True) + 1e-3) * SCALE,
    ),
    "rms alone": (
        (LOOK, Node("norm", RmsNorm(0.5), ("look",))),
        {},
        ROWS / np.sqrt((ROWS**2).mean(-1, keepdims=True) + 0.5),
    ),
    "rotary": (
        (LOOK, SPLIT, Node("turn", Rotary(), ("split",))),
        {"turn": {"cos": np.cos(ANGLES), "sin": np.sin(ANGLES)}},
        turned(ROWS.reshape(3, 5, 2, 4)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_of_tokens(name):
    nodes, params, want = CASES[name]
    params = {"look": {"table": TABLE}, **params} if nodes[0] is LOOK else params
    arrays = {n: {k: jnp.asarray(v, jnp.float32) for k, v in p.items()} for n, p in params.items()}
    model = Model(Graph(nodes, ("ids",), (nodes[-1].name,)), arrays, (Tokens(5, 11),))
    found = evaluate(model, jnp.asarray(IDS))[0][0]
    np.testing.assert_allclose(found, want, atol=1e-5)
    file = serialize(float_onnx(model))
    for optimize in (False, True):
        session = open_session(file, optimize=optimize)
        (made,) = session.run(None, {"input_ids": IDS.astype(np.int64)})
        np.testing.assert_allclose(made, want, atol=1e-5)
