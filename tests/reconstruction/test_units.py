"""Units: one after the other they are the network, in float and quantized."""

import jax
import numpy as np
import pytest

from dfq_jax.graph.cuts import blocks
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, Site, resolve
from dfq_jax.quantization.simulate import QuantizedModel, simulate
from dfq_jax.reconstruction.unit_at_work import run
from dfq_jax.reconstruction.units import layers_of, unit_model, unit_qparams, units_of, with_unit

NETWORKS = ("tiny", "dense", "inception", "excite", "mixed", "wide", "vit")
SHORTCUTS = tuple(f"{name} qdrop_8bit_ends_shortcuts" for name in ("tiny", "dense"))


@pytest.fixture(scope="module", params=NETWORKS + SHORTCUTS)
def quantized(request, nets):
    name, _, layers = request.param.partition(" ")
    model = fold_batch_norm(getattr(nets, name)())
    plan = resolve(model.graph, Scheme(4, 4), layers or "qdrop_8bit_ends")
    return calibrate(model, plan, nets.images(model, 6))


def through(units, quantized, x, *, rounded):
    """The output of units one after the other."""
    for unit in units:
        model = unit_model(unit, quantized.model)
        qparams = unit_qparams(unit, quantized.qparams) if rounded else None
        x = run(model, qparams, x, unit.plan if rounded else None, None)
    return np.asarray(x)


@pytest.mark.parametrize("merge", [1, 2, 0, "uneven"])
def test_units_make_up_the_network(quantized, nets, merge):
    x = nets.images(quantized.model, 6)
    if merge == "uneven":
        merge = (1, len(blocks(quantized.model.graph)) - 1)
    units = units_of(quantized.model.graph, quantized.plan, merge=merge)
    exact = np.asarray(evaluate(quantized.model, x)[0][0])
    np.testing.assert_allclose(
        through(units, quantized, x, rounded=False), exact, rtol=1e-4, atol=1e-4
    )
    rough = np.asarray(jax.jit(simulate)(quantized, x))
    np.testing.assert_allclose(
        through(units, quantized, x, rounded=True), rough, rtol=1e-4, atol=1e-4
    )


def test_every_site_is_in_one_unit_or_comes_again_later(quantized):
    units = units_of(quantized.model.graph, quantized.plan)
    seen = []
    for unit in units:
        original = {new: old for old, new in unit.names.items()}
        seen += [Site(original[site.node], site.argument) for site, _ in unit.plan.entries]
    assert len(seen) == len(set(seen))
    table = quantized.plan.table
    assert {site for site in table if site.argument is None} <= set(seen)
    for _, sites in quantized.plan.groups:
        assert any(site in seen for site in sites)


def test_equal_blocks_are_equal(nets):
    """The residual blocks of `vit` share graphs and plans, so they compile once."""
    model = fold_batch_norm(nets.vit())
    units = units_of(model.graph, resolve(model.graph, Scheme(4, 4), "zsq_all_low"))
    models = [unit_model(unit, model) for unit in units]
    kinds = {(m.graph, u.plan) for m, u in zip(models, units, strict=True)}
    assert len(kinds) < len(units)


def test_a_changed_unit_changes_the_network(quantized):
    units = units_of(quantized.model.graph, quantized.plan)
    unit = next(u for u in units if u.plan.groups and u.plan.entries)
    model, qparams = unit_model(unit, quantized.model), unit_qparams(unit, quantized.qparams)
    halved = {s: a._replace(scale=a.scale / 2) for s, a in qparams.items()}
    new = with_unit(quantized, unit, jax.tree.map(lambda v: v + 1, model), halved)
    original = {new: old for old, new in unit.names.items()}
    for name in unit.names:
        for slot, value in quantized.model.params.get(name, {}).items():
            np.testing.assert_array_equal(new.model.params[name][slot], value + 1)
    changed = {Site(original[s.node], s.argument) for s in halved}
    for _, sites in quantized.plan.groups:
        if changed & set(sites):
            changed |= set(sites)  # one grid
    for site, affine in new.affines.items():
        factor = 0.5 if site in changed else 1.0
        np.testing.assert_allclose(affine.scale, factor * quantized.affines[site].scale)
    assert isinstance(new, QuantizedModel)


def test_layers_of_a_unit(nets):
    """A layer has what it absorbs with it, and quantizes what it reads."""
    model = fold_batch_norm(nets.tiny())
    units = units_of(model.graph, resolve(model.graph, Scheme(4, 4)))
    unit = next(u for u in units if u.title.startswith("depthwise"))
    assert unit.title == "depthwise +1"
    original = {new: old for old, new in unit.names.items()}
    layers = layers_of(unit)
    assert [[original[n] for n in layer.block.names] for layer in layers] == [
        ["depthwise", "relu2"],
        ["project"],
    ]
    sites = [[site.slot for site, _ in layer.plan.entries] for layer in layers]
    assert sites == [["kernel", "input0"], ["kernel", "input0"]]
