import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.basis import Basis, assign, codes, fit_basis, levels, refit_basis, snap, start

learn = jax.jit(fit_basis, static_argnames=("n", "kind", "turns"))


def f32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.fixture(scope="module")
def normal():
    return np.random.default_rng(0).normal(size=(1, 100_000))


def mse(x, basis):
    return float(jnp.mean((f32(x) - snap(f32(x), basis)) ** 2))


def test_codes_are_all_there_are():
    assert sorted(map(tuple, codes(2, "signs").tolist())) == [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    assert sorted(map(tuple, codes(2, "bits").tolist())) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("kind", ["signs", "bits"])
def test_assignment_is_to_the_nearest_level(kind):
    rng = np.random.default_rng(1)
    basis = Basis(f32(rng.normal(size=(5, 3))), f32(codes(3, kind)))
    x = rng.normal(size=(5, 200)) * 2
    all_levels = np.asarray(basis.vectors, np.float64) @ codes(3, kind).T
    np.testing.assert_allclose(levels(basis), all_levels, atol=1e-6)
    wanted = np.argmin(np.abs(x[..., None] - all_levels[:, None]), -1)
    found = np.asarray(assign(f32(x), basis))
    assert np.mean(found == wanted) > 0.999
    nearest = np.take_along_axis(all_levels, wanted, 1)
    np.testing.assert_allclose(snap(f32(x), basis), nearest, atol=1e-5)


@pytest.mark.parametrize("kind", ["signs", "bits"])
def test_refitting_is_least_squares(kind):
    """Against NumPy on the full matrix of codes."""
    rng = np.random.default_rng(2)
    x, counts = rng.normal(size=(3, 60)) + 0.5, rng.integers(1, 9, (3, 60))
    weight = counts / counts.sum(1, keepdims=True)
    basis = start(f32(x), f32(weight), 2, kind)
    assigned = assign(f32(x), basis)
    found = refit_basis(f32(x), f32(weight), assigned, basis).vectors
    for c in range(3):
        rows = codes(2, kind)[np.asarray(assigned[c])] * np.sqrt(counts[c])[:, None]
        wanted, *_ = np.linalg.lstsq(rows, x[c] * np.sqrt(counts[c]), rcond=None)
        np.testing.assert_allclose(found[c], wanted, atol=1e-4)


def test_unused_codes_leave_the_basis_where_it_was():
    basis = Basis(f32([[0.5, 100.0]]), f32(codes(2, "bits")))
    x = f32([[0.4, 0.6, 0.8]])
    found = refit_basis(x, jnp.full((1, 3), 1 / 3), assign(x, basis), basis).vectors
    np.testing.assert_allclose(found, [[0.6, 100.0]], rtol=1e-4)


def test_the_start_is_that_of_the_paper(normal):
    even = jnp.full((1, 100_000), 1e-5)
    signs = start(f32(normal), even, 3, "signs").vectors
    np.testing.assert_allclose(signs, 0.6745 / 4 * np.array([[1, 2, 4]]), rtol=0.01)
    bits = start(f32(np.maximum(normal, 0)), even, 2, "bits").vectors
    np.testing.assert_allclose(bits, 0.6745 * 2 / 3 * np.array([[1, 2]]), rtol=0.01)


@pytest.mark.parametrize(
    ("n", "vectors", "error"),
    [(1, [0.798], 0.363), (2, [0.529, 0.983], 0.1178), (3, [0.301, 0.607, 1.159], 0.0371)],
)
def test_known_bases_of_a_normal_variable(normal, n, vectors, error):
    found = learn(f32(normal), n, "signs", turns=100).basis
    np.testing.assert_allclose(np.sort(np.abs(found.vectors[0])), vectors, atol=0.012)
    assert mse(normal, found) == pytest.approx(error, rel=0.015)


@pytest.mark.parametrize(
    ("n", "vectors", "error"), [(2, [0.653, 1.301], 0.0234), (3, None, 0.0064)]
)
def test_known_bases_of_a_rectified_normal_variable(normal, n, vectors, error):
    x = np.maximum(normal, 0)
    found = learn(f32(x), n, "bits", turns=100).basis
    assert mse(x, found) == pytest.approx(error, rel=0.03)
    if vectors:
        np.testing.assert_allclose(np.sort(found.vectors[0]), vectors, atol=0.02)


@pytest.mark.parametrize("kind", ["signs", "bits"])
def test_sixteen_levels_beat_every_even_grid(kind, normal):
    """From the paper's start 30 turns would not."""
    x = normal if kind == "signs" else np.maximum(normal, 0)
    found = mse(x, learn(f32(x), 4, kind).basis)
    even = np.inf
    for step in np.linspace(0.1, 0.5, 81):
        if kind == "signs":
            q = (np.clip(np.floor(x / step), -8, 7) + 0.5) * step
        else:
            q = np.clip(np.rint(x / step), 0, 15) * step
        even = min(even, np.mean((x - q) ** 2))
    assert found < even * 1.001
    even_weight = jnp.full((1, x.size), 1 / x.size)
    assert found < 0.8 * mse(x, start(f32(x), even_weight, 4, kind))


@pytest.mark.parametrize(("n", "kind"), [(2, "signs"), (4, "signs"), (3, "bits")])
def test_no_turn_makes_it_worse_and_channels_are_alone(n, kind):
    rng = np.random.default_rng(3)
    x = rng.standard_t(4, size=(6, 300)) * np.array([[1e-3], [0.1], [1], [3], [10], [1]])
    x = np.abs(x) if kind == "bits" else x
    found = learn(f32(x), n, kind)
    errors = np.asarray(found.errors)
    assert errors.shape == (30, 6)
    assert (errors[1:] <= errors[:-1] * (1 + 1e-4)).all()
    assert (errors[-1] / errors[0]).mean() < 0.97
    alone = learn(f32(x[3:4]), n, kind).basis.vectors
    np.testing.assert_allclose(alone[0], found.basis.vectors[3], rtol=1e-3)


def test_weights_count_values_again():
    rng = np.random.default_rng(4)
    x, times = rng.normal(size=40), rng.integers(1, 5, 40)
    weighted = learn(f32(x[None]), 2, "signs", weight=f32(times[None])).basis
    repeated = learn(f32(np.repeat(x, times)[None]), 2, "signs").basis
    np.testing.assert_allclose(weighted.vectors, repeated.vectors, rtol=1e-3)


def test_dead_channels_have_one_level():
    found = learn(jnp.zeros((2, 9)), 2, "signs").basis
    np.testing.assert_array_equal(snap(jnp.zeros((2, 9)), found), 0)


def test_bit_planes_multiply_like_the_values():
    """What the levels are for: sums of products of planes of codes, weighted by both bases."""
    rng = np.random.default_rng(5)
    w, x = rng.normal(size=(4, 64)), np.maximum(rng.normal(size=(1, 64)), 0)
    v, u = learn(f32(w), 3, "signs").basis, learn(f32(x), 2, "bits").basis
    dense = np.asarray(snap(f32(w), v)) @ np.asarray(snap(f32(x), u)[0])
    planes_w = codes(3, "signs")[np.asarray(assign(f32(w), v))]
    planes_x = codes(2, "bits")[np.asarray(assign(f32(x), u))[0]]
    counts = np.einsum("cmi,mj->cij", planes_w, planes_x)
    assert (counts == np.rint(counts)).all()
    total = np.einsum("cij,ci,j->c", counts, v.vectors, u.vectors[0])
    np.testing.assert_allclose(total, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [0, 5])
def test_a_basis_is_short(n):
    with pytest.raises(ValueError, match=f"1 to 4 vectors, got {n}"):
        fit_basis(jnp.ones((1, 3)), n, "signs")
