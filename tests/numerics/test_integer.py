from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.lowering import convolve
from dfq_jax.graph.ops import Conv2d
from dfq_jax.numerics.integer import EXACT, exact_product, nibbles


@partial(jax.jit, static_argnames="reduction")
def matmul(x, w, reduction):
    return exact_product(x, w, jnp.matmul, reduction)


def test_every_code_splits_into_nibbles():
    codes = np.arange(-255, 256)
    high, low = (np.asarray(v) for v in nibbles(jnp.asarray(codes, jnp.int32)))
    np.testing.assert_array_equal(16 * high + low, codes)
    assert (low.min(), low.max()) == (-8, 7)
    assert np.abs(high).max() == 16
    assert high.dtype == low.dtype == np.float32


@pytest.mark.parametrize("terms", [27, 4112, 4113, 16384, 65536])
def test_products_of_random_codes_are_exact(terms):
    rng = np.random.default_rng(terms)
    x = rng.integers(-255, 256, (3, terms))
    w = rng.integers(-255, 256, (terms, 4))
    ours = matmul(jnp.asarray(x, jnp.int32), jnp.asarray(w, jnp.int32), terms)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, x @ w)


@pytest.mark.parametrize("terms", [4112, 65536])
def test_largest_sums_are_exact(terms):
    """All codes at their limits: unsigned activations, symmetric int8 weights."""
    rng = np.random.default_rng(terms)
    x = rng.integers(250, 256, (2, terms))  # odd ones among them: float32 sums would round
    w = np.stack([np.full(terms, 127), np.full(terms, -127), rng.integers(60, 128, terms)], axis=1)
    total = x @ w
    assert np.abs(total).max() < 2**31
    ours = matmul(jnp.asarray(x, jnp.int32), jnp.asarray(w, jnp.int32), terms)
    np.testing.assert_array_equal(ours, total)


@pytest.mark.parametrize("terms", [64, 4113, 33_025])
def test_products_of_two_unsigned_tensors_are_exact(terms):
    """Zero points at either end: every code at +255 or -255, as far as int32 holds the sum."""
    for signs in (1, -1):
        x, w = np.full((2, terms), 255), np.full((terms, 3), 255 * signs)
        x[1, ::2] -= 1
        w[::3, 1] -= signs
        ours = matmul(jnp.asarray(x, jnp.int32), jnp.asarray(w, jnp.int32), terms)
        np.testing.assert_array_equal(ours, x @ w)


def test_convolutions_are_exact(nets):
    rng = np.random.default_rng(0)
    op = Conv2d((2, 1), ((1, 0), (1, 1)), groups=2)
    x = rng.integers(-255, 256, (2, 6, 5, 8))
    w = rng.integers(-127, 128, (3, 3, 4, 6))
    ours = exact_product(
        jnp.asarray(x, jnp.int32), jnp.asarray(w, jnp.int32), partial(convolve, op=op), 36
    )
    np.testing.assert_array_equal(ours, nets.conv(x, w, op.strides, op.padding, op.groups))


@pytest.mark.parametrize("terms", [65_537, 150_000])
def test_long_sums_are_made_of_pieces(terms):
    """At the limits as far as int32 holds the sum; some pieces of it are larger than the whole."""
    rng = np.random.default_rng(terms)
    x = rng.integers(250, 256, (2, terms))
    w = rng.integers(-127, 128, (terms, 3))
    w[:, 1], w[::3, 2] = 127, -127
    w[66_000:, 1] = -127
    total = x @ w
    assert EXACT < np.abs(total).max() < 2**31
    ours = matmul(jnp.asarray(x, jnp.int32), jnp.asarray(w, jnp.int32), terms)
    np.testing.assert_array_equal(ours, total)


def test_long_sums_of_many_products_and_of_convolutions(monkeypatch, nets):
    """Pieces are cut alike in every product of a stack, and through the rows of a kernel."""
    monkeypatch.setattr("dfq_jax.numerics.integer.MOST_TERMS", 10)
    rng = np.random.default_rng(1)
    a, b = rng.integers(-255, 256, (2, 3, 4, 36)), rng.integers(-255, 256, (2, 3, 36, 5))
    ours = exact_product(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32), jnp.matmul, 36)
    np.testing.assert_array_equal(ours, a @ b)
    op = Conv2d((2, 1), ((1, 0), (1, 1)), groups=2)
    x, w = rng.integers(-255, 256, (2, 6, 5, 8)), rng.integers(-127, 128, (3, 3, 4, 6))
    ours = exact_product(
        jnp.asarray(x, jnp.int32), jnp.asarray(w, jnp.int32), partial(convolve, op=op), 36
    )
    np.testing.assert_array_equal(ours, nets.conv(x, w, op.strides, op.padding, op.groups))
