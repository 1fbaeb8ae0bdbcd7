import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.affine import Grid, fake_quantize
from dfq_jax.numerics.ranges import Lp, MinMax, weight_affine
from dfq_jax.numerics.squant import squant_kernel

run = jax.jit(squant_kernel, static_argnames="grid")
fit = jax.jit(weight_affine, static_argnames=("grid", "observer"))
GRIDS = {"w4": Grid(4, axis=-1), "w8": Grid(8, symmetric=True, axis=-1), "one": Grid(3)}


def kernel(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def brute_force(w, affine, grid):
    """The card's description, kernel by kernel and weight by weight, in float64."""
    shape = np.broadcast_shapes(affine.scale.shape, w.shape)
    scale = np.broadcast_to(np.asarray(affine.scale, np.float64), shape)
    zero = np.broadcast_to(np.asarray(affine.zero_point, np.float64), shape)
    flat = lambda a: np.asarray(a, np.float64).reshape(-1, *w.shape[-2:])
    t = flat(np.asarray(w) / np.asarray(scale, np.float32))  # ties as float32 has them
    low, high = grid.qmin - flat(zero), grid.qmax - flat(zero)
    q = np.clip(np.rint(t), low, high)
    for o in range(q.shape[2]):
        spare = []
        for i in range(q.shape[1]):
            e = q[:, i, o] - t[:, i, o]
            total = e.sum()
            sign = np.sign(total)
            movable = [
                k
                for k in range(len(e))
                if e[k] * sign > 0 and low[k, i, o] <= q[k, i, o] - sign <= high[k, i, o]
            ]
            movable.sort(key=lambda k: -abs(e[k]))
            count = round(abs(total))
            for k in movable[:count]:
                q[k, i, o] -= sign
            if count >= abs(total) and count and len(movable) >= count:
                spare.append((movable[count - 1], i, sign))
            elif count < abs(total) and len(movable) > count:
                spare.append((movable[count], i, -sign))
        total = (q - t)[..., o].sum()
        ready = [(k, i, d) for k, i, d in spare if d == -np.sign(total)]
        ready.sort(key=lambda s: -abs(q[s[0], s[1], o] - t[s[0], s[1], o]))
        for k, i, d in ready[: round(abs(total))]:
            q[k, i, o] += d
    return q.reshape(w.shape) * scale


@pytest.mark.parametrize(
    ("shape", "name", "observer"),
    [
        ((3, 3, 5, 6), "w4", MinMax()),
        ((3, 3, 5, 6), "w8", Lp()),
        ((1, 1, 40, 4), "w4", Lp()),
        ((60, 7), "one", Lp()),
        ((3, 3, 1, 8), "w8", MinMax()),
        ((5, 3, 2, 3), "one", MinMax()),
    ],
)
def test_equals_brute_force(name, shape, observer):
    w, grid = kernel(*shape, seed=len(shape)), GRIDS[name]
    affine = fit(w, grid, observer)
    found = np.asarray(run(w, affine, grid))
    wanted = brute_force(w, affine, grid)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * float(affine.scale.max()))


def sums(found, w, affine):
    """Errors in steps: of each kernel, of each output channel, of the worst weight."""
    e = np.asarray((found - w) / affine.scale, np.float64)
    return abs(e.sum((0, 1))).max(), abs(e.sum((0, 1, 2))).max(), abs(e).max()


def test_sums_of_errors_are_small():
    """The figures of the method: kernels below one step, channels half a step, weights one."""
    w, grid = kernel(3, 3, 32, 16, seed=1), GRIDS["w4"]
    affine = fit(w, grid, MinMax())
    nearest = sums(fake_quantize(w, affine, grid), w, affine)
    mine = sums(run(w, affine, grid), w, affine)
    assert nearest[0] > 1.5
    assert nearest[1] > 3
    assert mine[0] < 1
    assert mine[1] <= 0.5
    assert 0.5 < mine[2] < 1


def test_kernels_alone_sum_to_half_a_step():
    """With one input channel there is nothing for channels to add."""
    w, grid = kernel(3, 3, 1, 64, seed=2), GRIDS["w4"]
    affine = fit(w, grid, MinMax())
    assert sums(run(w, affine, grid), w, affine)[0] <= 0.5 + 1e-5


def test_outputs_for_positive_inputs_improve():
    w, grid = kernel(3, 3, 32, 16, seed=3), GRIDS["w4"]
    affine = fit(w, grid, MinMax())
    x = np.abs(np.random.default_rng(4).normal(size=(500, 288)))
    error = lambda a: np.mean((x @ np.asarray(a - w).reshape(288, 16)) ** 2)
    assert error(run(w, affine, grid)) < 0.8 * error(fake_quantize(w, affine, grid))


@pytest.mark.parametrize("name", GRIDS)
def test_results_lie_on_the_grid_and_stay(name):
    w, grid = kernel(3, 3, 4, 5, seed=5), GRIDS[name]
    affine = fit(w, grid, Lp())
    found = run(w, affine, grid)
    np.testing.assert_array_equal(fake_quantize(found, affine, grid), found)
    np.testing.assert_array_equal(run(found, affine, grid), found)


def test_dead_channels_stay_dead():
    w = kernel(3, 3, 4, 5).at[..., 2].set(0.0)
    affine = fit(w, GRIDS["w4"], MinMax())
    assert np.all(np.asarray(run(w, affine, GRIDS["w4"])[..., 2]) == 0)
