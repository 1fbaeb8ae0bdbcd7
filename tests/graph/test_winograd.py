import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from dfq_jax.graph.evaluate import apply_tiled, evaluate
from dfq_jax.graph.ops import Conv2d
from dfq_jax.graph.winograd import convolve_by_tiles, tile_values, tileable

ROUNDING = 3e-5
"""Of the largest value: what the transforms cost in float32."""
CASES = {
    "same": ((8, 8), ((1, 1), (1, 1))),
    "odd": ((7, 9), ((1, 1), (1, 1))),
    "valid": ((6, 5), ((0, 0), (0, 0))),
    "uneven": ((5, 11), ((0, 2), (2, 1))),
    "one tile": ((4, 4), ((1, 1), (0, 0))),
}


def drawn(size, cin=32, cout=40):
    x = jax.random.normal(jax.random.key(0), (2, *size, cin))
    return x, jax.random.normal(jax.random.key(1), (3, 3, cin, cout)) / 17


def by_hand(x, kernel, padding):
    """In float64, a product for each entry of the kernel."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    h, w = x.shape[1] - 2, x.shape[2] - 2
    entries = ((i, j) for i in range(3) for j in range(3))
    return sum(x[:, i : i + h, j : j + w] @ np.asarray(kernel[i, j], float) for i, j in entries)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_a_convolution(name):
    size, padding = CASES[name]
    x, kernel = drawn(size)
    wanted = by_hand(x, kernel, padding)
    found = jax.jit(convolve_by_tiles, static_argnums=2)(x, kernel, padding)
    np.testing.assert_allclose(found, wanted, atol=ROUNDING * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_a_convolution(name):
    size, padding = CASES[name]
    x, kernel = drawn(size)
    native = lambda x, k: lax.conv_general_dilated(
        x, k, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    tiled = lambda x, k: convolve_by_tiles(x, k, padding)
    _, pull = jax.vjp(tiled, x, kernel)
    g = jax.random.normal(jax.random.key(2), native(x, kernel).shape)
    for found, wanted in zip(pull(g), jax.vjp(native, x, kernel)[1](g), strict=True):
        bound = ROUNDING * float(jnp.abs(wanted).max())
        np.testing.assert_allclose(found, wanted, atol=bound, rtol=0)


def test_second_derivatives():
    x, kernel = drawn((5, 6), 2, 2)
    bent = jax.jit(lambda x: jnp.sin(convolve_by_tiles(x, kernel, ((1, 1), (1, 1)))))
    check_grads(bent, (x,), order=2, modes=["rev"], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("x", "kernel", "op"),
    [
        ((1, 8, 8, 32), (3, 3, 32, 16), Conv2d()),
        ((1, 8, 8, 16), (3, 3, 16, 32), Conv2d()),
        ((1, 3, 8, 32), (3, 3, 32, 32), Conv2d(padding=((1, 1), (1, 1)))),
        ((1, 8, 8, 32), (5, 5, 32, 32), Conv2d()),
        ((1, 8, 8, 32), (3, 3, 32, 32), Conv2d((2, 2))),
        ((1, 8, 8, 32), (3, 3, 32, 32), Conv2d(dilation=(2, 1))),
        ((1, 8, 8, 64), (3, 3, 32, 64), Conv2d(groups=2)),
        ((1, 8, 8, 32), (3, 3, 32, 32), Conv2d(padding=((3, 1), (1, 1)))),
    ],
)
def test_what_is_not_tiled(x, kernel, op):
    assert not tileable(x, kernel, op)
    assert tileable((1, 8, 8, 32), (3, 3, 32, 32), Conv2d(padding=((2, 0), (1, 1))))


def test_values_of_tiles_by_hand():
    """Outputs of 8x7: 2x2 tiles of 36 entries, for 3 images and 32 + 40 channels."""
    op = Conv2d(padding=((1, 1), (0, 1)))
    assert tile_values((3, 8, 8, 32), (3, 3, 32, 40), op) == 36 * 3 * 4 * 72


@pytest.mark.parametrize("name", ["wide", "tiny", "mixed"])
def test_a_network_by_tiles(nets, name):
    """Equal to rounding; where nothing is tiled, equal."""
    model = getattr(nets, name)()
    images = nets.images(model)
    plain = np.asarray(evaluate(model, images)[0][0])
    tiled = np.asarray(evaluate(model, images, apply=apply_tiled)[0][0])
    np.testing.assert_allclose(tiled, plain, atol=1e-4 * np.abs(plain).max())
    assert np.array_equal(tiled, plain) == (name != "wide")
