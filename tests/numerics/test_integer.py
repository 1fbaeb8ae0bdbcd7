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


def test_too_many_terms():
    codes = jnp.zeros((1, 1), jnp.int32)
    assert EXACT // 256 == 65536
    with pytest.raises(ValueError, match=r"sums at most 65536 terms, got 65537"):
        exact_product(codes, codes, jnp.matmul, 65537)
