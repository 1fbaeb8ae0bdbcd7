"""Layers whose gradients lie on 8 bits."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.graph.evaluate import apply_node
from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import Linear, Relu
from dfq_jax.numerics.gradient_grids import counteracted_rate, gradient_on_grid
from dfq_jax.recipes.best_training import best_training
from dfq_jax.training.gradient_levels import with_gradients_on
from dfq_jax.training.method import on_gradient_grid

KEY = jax.random.key(5)
LAYER = Node("fc", Linear(), ("x",))


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"x": (6, 5), "kernel": (5, 3), "bias": (3,), "g": (6, 3)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def gradients(apply, arrays):
    slots = {"kernel": arrays["kernel"], "bias": arrays["bias"]}
    made, back = jax.vjp(lambda s, x: apply(LAYER, s, (x,)), slots, arrays["x"])
    return made, *back(arrays["g"])


@pytest.mark.parametrize("bits", [3, 8])
def test_both_products_read_one_rounded_gradient(arrays, bits):
    apply = with_gradients_on(apply_node, bits, KEY)
    made, by_slots, by_x = gradients(apply, arrays)
    exact, *_ = gradients(apply_node, arrays)
    np.testing.assert_array_equal(made, exact)
    own = jax.random.fold_in(KEY, zlib.crc32(b"fc"))
    rounded, turned = gradient_on_grid(arrays["g"], bits, own)
    g = np.asarray(rounded)
    phi = float(counteracted_rate(turned))
    assert phi < 1
    np.testing.assert_allclose(by_x, g @ np.asarray(arrays["kernel"]).T, rtol=1e-5, atol=1e-6)
    wanted = phi * np.asarray(arrays["x"]).T @ g
    np.testing.assert_allclose(by_slots["kernel"], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_slots["bias"], phi * g.sum(0), rtol=1e-5, atol=1e-6)


def test_what_has_no_kernel_keeps_its_gradients(arrays):
    relu, apply = Node("relu", Relu(), ("x",)), with_gradients_on(apply_node, 2, KEY)
    slope = jax.grad(lambda x: jnp.sum(apply(relu, {}, (x,)) * arrays["x"]))(arrays["x"])
    np.testing.assert_array_equal(slope, jnp.where(arrays["x"] > 0, arrays["x"], 0))


def test_a_method_may_have_any_bits_that_grids_have():
    assert on_gradient_grid(best_training(), 8).gradient_bits == 8
    with pytest.raises(UsageError, match=r"gradients have 2\.\.8 bits, got 16"):
        on_gradient_grid(best_training(), 16)
