import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dfq_jax.graph.ops import MaxPool
from dfq_jax.graph.windows import max_pool, over_windows

DILATED = MaxPool((2, 3), (1, 2), ((1, 1), (1, 1)), (2, 1)), (7, 8)
"""XLA's own reduction has no gradient then."""
CASES = {
    "resnet": (MaxPool((3, 3), (2, 2), ((1, 1), (1, 1))), (8, 8)),
    "odd": (MaxPool((3, 3), (2, 2), ((0, 1), (0, 1))), (7, 9)),
    "halves": (MaxPool((2, 2), (2, 2)), (6, 7)),
    "same": (MaxPool((5, 5), (1, 1), ((2, 2), (2, 2))), (6, 5)),
    "gaps": (MaxPool((1, 2), (2, 3)), (5, 8)),
}


def native(op, x):
    return over_windows(op, x, -jnp.inf, jax.lax.max)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_a_window_reduction(name):
    op, size = CASES[name]
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    y, pull = jax.vjp(lambda x: max_pool(op, x), x)
    wanted, pull_native = jax.vjp(lambda x: native(op, x), x)
    np.testing.assert_array_equal(y, wanted)
    g = jax.random.normal(jax.random.key(1), y.shape)
    np.testing.assert_allclose(pull(g)[0], pull_native(g)[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(lambda x: max_pool(op, x))(x), wanted)


@pytest.mark.torch
@pytest.mark.parametrize(("op", "size"), [CASES["resnet"], CASES["same"], DILATED])
def test_of_equal_values_the_first_gets_the_gradient_as_in_torch(op, size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).integers(0, 2, (2, *size, 3)).astype(np.float32)
    y, pull = jax.vjp(lambda x: max_pool(op, x), jnp.asarray(x))
    theirs = torch.tensor(np.moveaxis(x, -1, 1).copy(), requires_grad=True)
    pads, dilation = op.padding[0][0], op.dilation
    out = torch.nn.functional.max_pool2d(theirs, op.window, op.strides, pads, dilation)
    g = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    out.backward(torch.tensor(np.moveaxis(g, -1, 1).copy()))
    np.testing.assert_array_equal(np.moveaxis(np.asarray(y), -1, 1), out.detach())
    wanted = np.moveaxis(theirs.grad.numpy(), 1, -1)
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], wanted, rtol=1e-6, atol=1e-6)


def test_second_derivatives():
    op, size = CASES["resnet"]
    x = jax.random.normal(jax.random.key(0), (1, *size, 2))
    bent = jax.jit(lambda x: jnp.sin(max_pool(op, x)))
    check_grads(bent, (x,), order=2, modes=["rev"], rtol=3e-2, atol=3e-2)


def test_what_is_not_a_number_shows():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 1, 0].set(jnp.nan)
    y = max_pool(MaxPool((2, 2), (2, 2)), x)[0, :, :, 0]
    np.testing.assert_array_equal(jnp.isnan(y), [[True, False], [False, False]])


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        (MaxPool((2, 2), (2, 2), ((-1, 0), (0, -1))), jnp.float32),
        (MaxPool((6, 6), (1, 1)), jnp.float32),
    ],
)
def test_crops_and_wide_windows_are_left_to_xla(op, dtype):
    x = jax.random.normal(jax.random.key(0), (1, 7, 7, 2)).astype(dtype)
    assert "custom_vjp" not in str(jax.make_jaxpr(lambda x: max_pool(op, x))(x))
    np.testing.assert_array_equal(max_pool(op, x), native(op, x))
