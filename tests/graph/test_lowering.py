import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dfq_jax.graph.lowering import convolve, cpu_special_case
from dfq_jax.graph.ops import Conv2d

ODD = ((2, 0), (1, 3))
CASES = {  # operator, image (h, w, c), kernel
    "plain": (Conv2d(padding=((1, 1), (1, 1))), (5, 6, 3), (3, 3, 3, 4)),
    "strided": (Conv2d((2, 3), ((1, 1), (0, 1))), (8, 9, 2), (3, 2, 2, 3)),
    "unread rows": (Conv2d((3, 3)), (9, 8, 2), (2, 2, 2, 3)),
    "dilated": (Conv2d(padding=ODD, dilation=(2, 3)), (8, 9, 2), (3, 3, 2, 2)),
    "grouped": (Conv2d((2, 1), ODD, groups=2), (7, 6, 4), (3, 2, 2, 6)),
    "everything": (Conv2d((2, 2), ODD, 3, (1, 2)), (9, 9, 6), (3, 3, 2, 3)),
    "over-padded": (Conv2d((1, 2), ((3, 4), (2, 5))), (4, 5, 2), (2, 2, 2, 2)),
    "depthwise": (Conv2d(padding=((1, 1), (1, 1)), groups=4), (6, 5, 4), (3, 3, 1, 4)),
    "depthwise strided": (Conv2d((2, 2), ODD, 3, (2, 1)), (8, 9, 3), (3, 3, 1, 3)),
    "depthwise doubled": (Conv2d((1, 2), ODD, 3), (5, 6, 3), (2, 3, 1, 6)),
    "pointwise": (Conv2d(), (4, 5, 3), (1, 1, 3, 7)),
    "pointwise strided": (Conv2d((2, 3)), (7, 8, 3), (1, 1, 3, 2)),
    "pointwise padded": (Conv2d(padding=ODD), (4, 5, 3), (1, 1, 3, 2)),
}
SHORTCUTS = {name for name in CASES if "wise" in name} - {"pointwise padded"}


@pytest.fixture(params=list(CASES))
def case(request):
    op, image, window = CASES[request.param]
    rng = np.random.default_rng(len(request.param))
    x, kernel = rng.normal(size=(2, *image)), rng.normal(size=window)
    return op, x.astype(np.float32), kernel.astype(np.float32)


def test_forward_matches_numpy_loops(case, nets):
    op, x, kernel = case
    truth = nets.conv(x, kernel, op.strides, op.padding, op.groups, op.dilation)
    ours = jax.jit(lambda x, k: convolve(x, k, op))(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.torch
def test_gradients_match_torch(case):
    torch = pytest.importorskip("torch")
    op, x, kernel = case
    images = torch.tensor(np.moveaxis(x, -1, 1).copy(), requires_grad=True)
    weights = torch.tensor(kernel.transpose(3, 2, 0, 1).copy(), requires_grad=True)
    (top, bottom), (left, right) = op.padding
    padded = torch.nn.functional.pad(images, (left, right, top, bottom))
    theirs = torch.nn.functional.conv2d(
        padded, weights, stride=op.strides, dilation=op.dilation, groups=op.groups
    )
    g = np.random.default_rng(1).normal(size=tuple(theirs.shape)).astype(np.float32)
    theirs.backward(torch.tensor(g))

    @jax.jit
    def pull(x, kernel, g):
        y, back = jax.vjp(lambda x, k: convolve(x, k, op), x, kernel)
        return y, *back(g)

    y, dx, dk = pull(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(np.moveaxis(g, 1, -1)))
    np.testing.assert_allclose(np.moveaxis(y, -1, 1), theirs.detach(), rtol=1e-4, atol=1e-4)
    assert images.grad is not None
    assert weights.grad is not None
    np.testing.assert_allclose(np.moveaxis(dx, -1, 1), images.grad, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dk.transpose(3, 2, 0, 1), weights.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["everything", "depthwise strided"])
def test_second_derivatives(name):
    op, image, window = CASES[name]
    x = jax.random.normal(jax.random.key(0), (1, *image))
    kernel = jax.random.normal(jax.random.key(1), window)
    convolved = jax.jit(lambda x, k: jnp.sin(convolve(x, k, op)))
    check_grads(convolved, (x, kernel), order=2, modes=["rev"], rtol=3e-2, atol=3e-2)


def test_gradients_inside_scan_are_those_outside():
    op, image, window = CASES["everything"]
    x = jax.random.normal(jax.random.key(0), (1, *image))
    kernel = jax.random.normal(jax.random.key(1), window)
    slope = jax.grad(lambda x: jnp.sum(convolve(x, kernel, op) ** 2))
    step = lambda x, _: (x - 0.01 * slope(x), None)
    scanned = jax.jit(lambda x: jax.lax.scan(step, x, length=2)[0])(x)
    once = x - 0.01 * slope(x)
    np.testing.assert_allclose(scanned, once - 0.01 * slope(once), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(CASES))
def test_which_shapes_take_a_shortcut(name):
    op, image, window = CASES[name]
    assert (cpu_special_case((2, *image), window, op) is not None) == (name in SHORTCUTS)


def test_one_channel_is_not_depthwise():
    """With a single channel a general convolution is the same thing, and the faster one."""
    assert cpu_special_case((1, 4, 4, 1), (3, 3, 1, 2), Conv2d()) is None
