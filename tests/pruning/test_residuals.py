"""What rounding and zeros take from layers, put back by those that read them (UDFC)."""

import jax
import numpy as np
import pytest

import dfq_jax as dfq
from dfq_jax.graph.ops import GlobalAvgPool
from dfq_jax.numerics.affine import fake_quantize
from dfq_jax.numerics.ranges import MinMax
from dfq_jax.numerics.substitution import put_back
from dfq_jax.pruning.residuals import Residuals, passed_on, restored_in_order
from dfq_jax.quantization.observers import Observers
from dfq_jax.quantization.plan import Site, parse_scheme
from dfq_jax.quantization.simulate import simulate
from dfq_jax.recipes.dfq import dfq as data_free
from dfq_jax.recipes.udfc import udfc_rounding
from dfq_jax.types import InputContract


def test_what_is_missing_is_damped_least_squares():
    rng = np.random.default_rng(0)
    rows, gone = rng.normal(size=(6, 9)), 0.1 * rng.normal(size=(6, 9))
    found = put_back(rows @ rows.T, gone @ rows.T, size=0.5)
    pull = np.sqrt(0.5 * np.mean(np.sum(rows**2, 1)))
    system = np.concatenate([rows.T, pull * np.eye(6)])
    for missing, row in zip(gone, found, strict=True):
        wanted = np.linalg.lstsq(system, np.concatenate([missing, np.zeros(6)]), rcond=None)[0]
        assert np.allclose(row, wanted, atol=1e-6)


def test_a_filter_that_others_say_is_put_back(nets):
    """Two layers without activation; the first loses filters that are sums of others."""
    b = nets.Builder(InputContract(6, 6))
    model = b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), b.conv("a", "images", 8)), 4))
    kernels = {
        n: np.array(p["kernel"], np.float64) for n, p in model.params.items() if "kernel" in p
    }
    kernels["a"][..., 7] = 0.7 * kernels["a"][..., 2] - 0.4 * kernels["a"][..., 5]
    lose = lambda name, k: k * (np.arange(8) < 7) if name == "a" else k
    found = restored_in_order(model.graph, kernels, lose)
    image = np.random.default_rng(1).normal(size=kernels["a"].shape[:-1])
    out = lambda first, last: np.tensordot(image, first, 3) @ last
    exact = out(kernels["a"], kernels["fc"])
    gap = lambda last: np.sum((out(found["a"], last) - exact) ** 2)
    assert gap(found["fc"]) < 0.5 * gap(kernels["fc"])


def test_sums_add_what_is_known_and_concatenations_put_it_side_by_side(nets):
    model = nets.dense()
    concat = next(n for n in model.graph.nodes if type(n.op).__name__ == "Concat")
    x, y = (Residuals(np.full((2, 2), v), np.full((2, 2), -v)) for v in (1.0, 3.0))
    joined = passed_on(concat, [x, y])
    assert joined is not None
    assert joined.filters[2:, 2:].tolist() == [[3.0, 3.0]] * 2
    assert (joined.missing[:2, 2:] == 0).all()
    assert passed_on(concat, [x, None]) is None


@pytest.fixture(scope="module")
def spanned(nets):
    """More filters than they have weights, so that others say well what one lacks."""
    b = nets.Builder(InputContract(8, 8))
    x = b.unit("first", "images", 12, kernel=1)
    x = b.unit("third", b.unit("second", x, 32, kernel=1), 32, kernel=1)
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))


@pytest.fixture(scope="module")
def rounded(spanned):
    how = {"layers": "zsq_all_low", "observers": Observers(weights=MinMax())}
    made = data_free(spanned, None, parse_scheme("w3a8"), **how)
    return made, udfc_rounding(made)


def test_kernels_are_on_the_grids_they_had(rounded):
    made, found = rounded
    assert found.quantized.plan == made.quantized.plan
    table = found.quantized.plan.table
    for site, affine in found.quantized.affines.items():
        if site.argument is None:
            kernel = found.quantized.model.params[site.node]["kernel"]
            on_grid = fake_quantize(kernel, affine, table[site].grid)
            assert np.allclose(on_grid, kernel, atol=1e-6)
    assert Site("fc") in table


def test_less_is_lost_than_by_rounding_alone(rounded, spanned, nets):
    """Whose biases are corrected as well."""
    made, found = rounded
    images = nets.images(spanned, 32, seed=4)
    exact = np.asarray(dfq.predict(made.reference, images))
    lost = lambda q: np.mean((np.asarray(jax.jit(simulate)(q, images)) - exact) ** 2)
    assert lost(found.quantized) < lost(made.quantized)
