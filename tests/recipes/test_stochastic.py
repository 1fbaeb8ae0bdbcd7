import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dfq_jax
from dfq_jax.numerics.affine import Grid, fake_quantize, from_range
from dfq_jax.numerics.ranges import MinMax
from dfq_jax.numerics.rounding import rounded_at_random
from dfq_jax.quantization.observers import Observers
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.recipes.dfq import dfq
from dfq_jax.recipes.stochastic import stochastic


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_right_in_the_mean(symmetric):
    """Every value is one of its two neighbours; the likelihood is that of NumPy's fraction."""
    grid = Grid(4, symmetric=symmetric)
    w = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, 50), jnp.float32)
    affine = from_range(jnp.min(w), jnp.max(w), grid)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(lambda k: rounded_at_random(w, affine, grid, k))(keys))
    steps = np.asarray(w) / float(affine.scale)
    codes = drawn / float(affine.scale)
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    inside = np.ceil(steps) * float(affine.scale) <= drawn.max() + 1e-6
    assert (np.abs(codes - steps)[:, inside] < 1 + 1e-4).all()
    up = (codes > steps[None]).mean(0)
    np.testing.assert_allclose(up[inside], (steps - np.floor(steps))[inside], atol=0.03)
    np.testing.assert_allclose(drawn.mean(0)[inside], np.asarray(w)[inside], atol=0.03 * 0.15)


def test_a_network_rounded_at_random(tiny_net):
    how = {"layers": "zsq_all_low", "observers": Observers(weights=MinMax())}
    made = dfq(tiny_net, None, parse_scheme("w4a8"), **how)
    one, same, other = (stochastic(made, seed=s) for s in (0, 0, 1))
    kernel = lambda m: np.asarray(m.quantized.model.params["conv1"]["kernel"])
    np.testing.assert_array_equal(kernel(one), kernel(same))
    assert not np.array_equal(kernel(one), kernel(other))
    plan, affines = one.quantized.plan, one.quantized.affines
    for site, spec in plan.entries:
        if site.argument is None:
            found = one.quantized.model.params[site.node]["kernel"]
            snapped = fake_quantize(found, affines[site], spec.grid)
            np.testing.assert_allclose(snapped, found, atol=1e-6)
    asked = dfq_jax.pipeline_for(tiny_net, reconstruction="stochastic")
    assert asked.reconstruction == "stochastic"
    assert asked.observers is not None
    assert asked.observers.weights == MinMax()
