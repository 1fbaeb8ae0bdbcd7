import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.channels import balancing, input_ranges, output_ranges, scaled_inputs


def spread(kernel, groups):
    """A grouped kernel as a dense one, (..., all inputs, outputs), zero between groups."""
    kernel = np.asarray(kernel)
    k, o = kernel.shape[-2:]
    dense = np.zeros((*kernel.shape[:-2], groups * k, o))
    for out in range(o):
        first = out // (o // groups) * k
        dense[..., first : first + k, out] = kernel[..., out]
    return dense


CASES = [((4, 6), 1), ((3, 3, 4, 6), 1), ((3, 3, 2, 6), 2), ((2, 1, 1, 5), 5), ((1, 1, 1, 6), 3)]


@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_ranges_are_those_of_the_dense_kernel(shape, groups):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    dense = np.abs(spread(kernel, groups))
    inputs = dense.max((*range(dense.ndim - 2), dense.ndim - 1))
    np.testing.assert_allclose(input_ranges(kernel, groups), inputs)
    np.testing.assert_allclose(output_ranges(kernel), dense.max(tuple(range(dense.ndim - 1))))


@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_scaling_inputs_scales_rows_of_the_dense_kernel(shape, groups):
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    factors = rng.uniform(0.5, 2, groups * shape[-2])
    found = spread(scaled_inputs(kernel, jnp.asarray(factors, jnp.float32), groups), groups)
    np.testing.assert_allclose(found, spread(kernel, groups) * factors[:, None], rtol=1e-6)


def test_the_worked_example_of_the_paper():
    """W1 = diag(4, 1/4), W2 = [[1, 2], [3, 4]] (out, in): both ranges become sqrt(r1 r2)."""
    w1, w2 = jnp.array([[4.0, 0.0], [0.0, 0.25]]), jnp.array([[1.0, 3.0], [2.0, 4.0]])
    s = balancing(output_ranges(w1), input_ranges(w2))
    np.testing.assert_allclose(1 / s, [0.8660, 4.0], rtol=1e-4)
    np.testing.assert_allclose(output_ranges(w1 / s), [3.4641, 1.0], rtol=1e-4)
    np.testing.assert_allclose(input_ranges(scaled_inputs(w2, s)), [3.4641, 1.0], rtol=1e-4)


def test_dead_channels_are_left_alone_and_extremes_bounded():
    first, second = jnp.array([2.0, 0.0, 3.0, 1e30]), jnp.array([1.0, 1.0, 0.0, 1e-30])
    np.testing.assert_allclose(balancing(first, second), [2**0.5, 1, 1, 1e8], rtol=1e-6)
