import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from dfq_jax.numerics.gaussian import (
    clipped_normal,
    curve_of_normal,
    leaky_normal,
    normal_range,
)
from dfq_jax.types import Moments

clipped = jax.jit(clipped_normal, static_argnames="ceiling")


def moments(mean, std):
    return Moments(jnp.atleast_1d(jnp.float32(mean)), jnp.atleast_1d(jnp.float32(std) ** 2))


@pytest.mark.parametrize(
    ("mean", "std", "relu", "relu6"),
    [
        (0.0, 1.0, 0.39894, None),
        (1.0, 1.0, 1.08332, None),
        (-1.0, 2.0, 0.39559, 0.39548),
        (5.0, 3.0, 5.05948, 4.29677),
    ],
)
def test_known_means(mean, std, relu, relu6):
    assert float(clipped(moments(mean, std), None).mean[0]) == pytest.approx(relu, abs=2e-5)
    if relu6 is not None:
        assert float(clipped(moments(mean, std), 6.0).mean[0]) == pytest.approx(relu6, abs=2e-5)


def test_known_variance():
    assert float(clipped(moments(0.5, 1.3), None).var[0]) == pytest.approx(0.8508, abs=1e-4)


@pytest.mark.parametrize("ceiling", [None, 6.0, 0.5])
def test_against_numerical_integration(ceiling):
    top = np.inf if ceiling is None else ceiling
    means, stds = np.meshgrid([-3.0, -0.3, 0.0, 1.7, 7.0], [0.05, 0.6, 2.5])
    ours = clipped(moments(means.ravel(), stds.ravel()), ceiling)
    for index, (mean, std) in enumerate(zip(means.ravel(), stds.ravel(), strict=True)):
        power = lambda k, m=mean, s=std: sum(
            quad(lambda x: np.clip(x, 0, top) ** k * norm.pdf(x, m, s), *span, limit=200)[0]
            for span in [(m - 9 * s, m), (m, m + 9 * s)]
        )
        first = power(1)
        assert float(ours.mean[index]) == pytest.approx(first, abs=1e-5, rel=1e-5)
        assert float(ours.var[index]) == pytest.approx(power(2) - first**2, abs=3e-5, rel=1e-4)


@pytest.mark.parametrize("count", [0, 5, 2500])
def test_moments_of_numpy_stay_in_numpy_by_few_programs(count):
    rng = np.random.default_rng(count)
    mean, var = rng.normal(size=count), rng.exponential(size=count)
    given = Moments(mean.astype(np.float32), var.astype(np.float32))
    slope = np.float32(0.1) * given.var
    for curve in (
        lambda m: clipped_normal(m, 6.0),
        lambda m: curve_of_normal(jnp.tanh, m),
        lambda m: leaky_normal(m, slope),
    ):
        ours, theirs = curve(given), curve(Moments(*map(jnp.asarray, given)))
        for a, b in zip(ours, theirs, strict=True):
            assert type(a) is np.ndarray
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)
    if count:
        ours, theirs = (
            normal_range(given, 6.0),
            normal_range(Moments(*map(jnp.asarray, given)), 6.0),
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def integrated(curve, mean, std):
    """Mean and variance of a curve of a normal variable."""
    power = lambda k: sum(
        quad(lambda x: curve(x) ** k * norm.pdf(x, mean, std), *span, limit=200)[0]
        for span in [(mean - 9 * std, mean), (mean, mean + 9 * std)]
    )
    return power(1), power(2) - power(1) ** 2


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3, 1.0, -0.5])
def test_leaky_slopes_against_numerical_integration(slope):
    means, stds = [-2.0, 0.0, 0.7, 4.0], [0.5, 1.0, 2.0, 0.1]
    ours = leaky_normal(moments(means, stds), slope)
    for index, (mean, std) in enumerate(zip(means, stds, strict=True)):
        first, var = integrated(lambda x: x if x > 0 else slope * x, mean, std)
        assert float(ours.mean[index]) == pytest.approx(first, abs=1e-5, rel=1e-5)
        assert float(ours.var[index]) == pytest.approx(var, abs=3e-5, rel=1e-4)


def test_a_slope_of_one_changes_nothing():
    same = leaky_normal(moments([-1.0, 3.0], [0.5, 2.0]), jnp.ones(2))
    np.testing.assert_allclose(same.mean, [-1, 3], rtol=1e-6)
    np.testing.assert_allclose(same.var, [0.25, 4], rtol=1e-5)


@pytest.mark.parametrize("name", ["silu", "tanh", "sigmoid", "gelu", "softplus"])
def test_curves_against_numerical_integration(name):
    exact = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "tanh": np.tanh,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "gelu": lambda x: x * norm.cdf(x),
        "softplus": lambda x: np.logaddexp(x, 0),
    }[name]
    curve = jnp.tanh if name == "tanh" else getattr(jax.nn, name)
    curve = curve if name != "gelu" else lambda x: jax.nn.gelu(x, approximate=False)
    means, stds = [-3.0, -0.3, 0.0, 1.7, 7.0], [0.05, 0.6, 2.5, 1.0, 3.0]
    ours = jax.jit(lambda m: curve_of_normal(curve, m))(moments(means, stds))
    for index, (mean, std) in enumerate(zip(means, stds, strict=True)):
        first, var = integrated(exact, mean, std)
        assert float(ours.mean[index]) == pytest.approx(first, abs=2e-4, rel=2e-4)
        assert float(ours.var[index]) == pytest.approx(var, abs=2e-4, rel=2e-3)


def test_a_curve_of_a_constant():
    found = curve_of_normal(jnp.tanh, moments([0.5, -1.0], [0.0, 0.0]))
    np.testing.assert_allclose(found.mean, np.tanh([0.5, -1.0]), rtol=1e-6)
    np.testing.assert_allclose(found.var, 0, atol=1e-7)


def test_constants_stay_constants():
    found = clipped(moments([-2.0, 0.0, 3.0, 8.0], [0.0] * 4), 6.0)
    np.testing.assert_allclose(found.mean, [0, 0, 3, 6], atol=1e-6)
    np.testing.assert_allclose(found.var, 0, atol=1e-5)


@pytest.mark.parametrize("ceiling", [None, 6.0])
def test_gradients_match_finite_differences(ceiling):
    total = jax.jit(
        lambda mean, var: sum(x.sum() for x in clipped_normal(Moments(mean, var), ceiling))
    )
    point = (jnp.array([0.3, 5.0]), jnp.array([1.5, 4.0]))
    for argument, slope in enumerate(jax.grad(total, argnums=(0, 1))(*point)):
        for i in range(2):
            moved = [
                float(total(*(p.at[i].add(h) if a == argument else p for a, p in enumerate(point))))
                for h in (0.02, -0.02)
            ]
            assert float(slope[i]) == pytest.approx((moved[0] - moved[1]) / 0.04, abs=2e-3)


def test_range_of_the_widest_channel():
    m = Moments(jnp.array([1.0, -2.0, 0.0]), jnp.array([4.0, 1.0, 0.0]))
    ends = lambda *args, **how: tuple(float(v) for v in normal_range(m, *args, **how))
    assert ends(3.0) == (-5, 7)
    assert ends(0.25) == (-2.25, 1.5)
    assert ends(3.0, rectified=True) == (0, 7)
