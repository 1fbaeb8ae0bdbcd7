"""Borders of rounding: that they are gains and shifts, and that layers take them over exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.ops import Add, GlobalAvgPool, Relu
from dfq_jax.numerics.affine import Affine, Grid, quantize
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, Site, resolve
from dfq_jax.recipes.aquant import aquant
from dfq_jax.reconstruction.borders import (
    absorbed,
    border_of,
    bordered,
    borders_at_first,
    makers,
)
from dfq_jax.reconstruction.engine import reconstruct
from dfq_jax.reconstruction.method import Penalty, Rates
from dfq_jax.types import InputContract


@pytest.mark.parametrize(("offset", "slope"), [(0.0, 0.0), (0.2, 0.1), (-0.3, -0.05), (0.1, 0.25)])
def test_a_border_is_a_gain_and_a_shift(offset, slope):
    """Against the rule itself, where the border lies in 0..1; 0 and 0 round to nearest."""
    scale, grid = jnp.float32(0.25), Grid(4)
    x = np.linspace(0.01, 3.7, 997).astype(np.float32)
    border = border_of({"offset": jnp.full(1, offset), "slope": jnp.full(1, slope)})
    moved = bordered(jnp.asarray(x)[:, None], border, scale)
    codes = np.asarray(quantize(moved, Affine(scale, jnp.uint8(0)), grid))[:, 0]
    whole = np.floor(x / 0.25)
    at = 0.5 + offset + slope * (whole + 0.5)
    wanted = whole + (x / 0.25 - whole >= at)
    told = (at > 0) & (at < 1)
    differ = codes[told] != np.clip(wanted, 0, 15)[told]
    assert told.sum() > 100
    assert differ.mean() < 0.01  # ties in float32


@pytest.fixture(scope="module")
def net(nets):
    b = nets.Builder(InputContract(8, 8))
    norm = lambda name, source: b.bn(f"{name}.bn", b.conv(name, source, 6))
    x = b.op("act0", Relu(), norm("conv0", "images"))
    y = b.op("act1", Relu(), norm("conv1", x))
    capped = b.op("act2", Relu(6.0), norm("conv2", y))
    total = b.op("act3", Relu(), b.op("sum", Add(), x, norm("conv3", capped)))
    last = b.op("act4", Relu(), norm("conv4", total))
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), last), 5))


@pytest.fixture(scope="module")
def given(net, nets):
    reference = fold_batch_norm(net)
    images = nets.images(reference, 12)
    plan = resolve(reference.graph, Scheme(4, 4), "zsq_all_low")
    return calibrate(reference, plan, images), reference, images


def test_which_layers_can_take_borders(given):
    """Not those behind sums or with a ceiling, nor those that others read in float."""
    quantized, reference, _ = given
    found = makers(reference.graph, quantized.plan)
    assert set(found.values()) == {"conv1"}


def test_layers_take_borders_over_exactly(given):
    """The codes that readers see are those of the bordered tensor."""
    quantized, reference, images = given
    plan, rng = quantized.plan, np.random.default_rng(1)
    borders = {
        tensor: {k: jnp.asarray(rng.uniform(-0.3, 0.3, v.shape), jnp.float32) for k, v in v.items()}
        for tensor, v in borders_at_first(reference, plan).items()
    }
    ((tensor, trained),) = borders.items()
    affine, spec = ((m[dict(plan.groups)[tensor][0]]) for m in (quantized.affines, plan.table))
    model, qparams = absorbed(quantized.model, quantized.affines, plan, borders)
    before, after = (
        evaluate(m, images, taps=(tensor,))[1][tensor] for m in (quantized.model, model)
    )
    wanted = bordered(before, border_of(trained), affine.scale)
    codes, plain, took = (
        np.asarray(quantize(v, affine, spec.grid)) for v in (wanted, before, after)
    )
    assert (codes != plain).mean() > 0.05
    assert (codes != took).mean() < 2e-3  # ties
    kernel = Site("conv1")
    old, new = (
        np.asarray(quantize(m.params["conv1"]["kernel"], q[kernel], plan.table[kernel].grid))
        for m, q in ((quantized.model, quantized.affines), (model, qparams))
    )
    np.testing.assert_array_equal(old, new)


def test_aquant_learns_borders(given, nets):
    """Scales of the kernel that took some differ by channel; nothing is left beside them."""
    _, reference, _ = given
    images = nets.images(reference, 32)
    quantized = calibrate(reference, resolve(reference.graph, Scheme(3, 3), "zsq_all_low"), images)
    rates = Rates(bits=1e-2, edges=1e-3, borders=3e-3)
    method = aquant(steps=80, batch=16)._replace(rates=rates, penalty=Penalty(0.003))
    key = jax.random.key(0)
    found, reports = reconstruct(quantized, reference, np.asarray(images), method, key)
    assert jax.tree.structure(found.qparams) == jax.tree.structure(quantized.qparams)

    def ratio(layer: str) -> np.ndarray:
        scales = [np.asarray(q.affines[Site(layer)].scale) for q in (found, quantized)]
        return scales[0] / scales[1]

    (block,) = (r for r in reports if r.name.startswith("conv1"))
    assert block.after < 0.9 * block.before
    assert np.ptp(ratio("conv1")) > 1e-3
    np.testing.assert_allclose(ratio("conv2"), 1.0, rtol=1e-6)
