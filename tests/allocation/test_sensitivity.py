import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr, softmax
from scipy.stats import spearmanr

from dfq_jax.allocation import sensitivity as module
from dfq_jax.allocation.choices import space_of
from dfq_jax.allocation.sensitivity import SENSITIVITIES, Aim, lattices_of, sensitivities, slopes_of
from dfq_jax.errors import PlanError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.ops import Relu
from dfq_jax.graph.tasks import parts_of
from dfq_jax.numerics.affine import fake_quantize, steps_of
from dfq_jax.numerics.ranges import MinMax, Statistics
from dfq_jax.numerics.softmax import divergence
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.ranges import expected_ranges
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.observers import Observers
from dfq_jax.quantization.plan import Site, parse_scheme
from dfq_jax.types import InputContract

W4A4, BITS = parse_scheme("w4a4"), (2, 4, 8)


@pytest.fixture(scope="module")
def model(nets):
    return fold_batch_norm(nets.tiny())


@pytest.fixture(scope="module")
def images(model, nets):
    return nets.images(model, 12)


@pytest.fixture(scope="module")
def space(model):
    return space_of(model.graph, scheme=W4A4, tensors=True, bits=BITS)


@pytest.fixture(scope="module")
def tables(model, space, images):
    """{method: sensitivities}."""
    key = jax.random.key(0)
    return {
        method: sensitivities(model, space, images, method=method, key=key, batch=6)
        for method in SENSITIVITIES
    }


@pytest.fixture(scope="module")
def fitted(model, space, images):
    """{bits: scales of every site}."""
    found = zip(space.bits, space.plans, strict=True)
    return {b: calibrate(model, plan, images, batch=6) for b, plan in found}


@pytest.fixture(scope="module")
def moved(nets, model, space, images, fitted):
    """(bits of each choice, None for float) -> divergence, all in float64 NumPy."""

    def forward(bits):
        chosen = {s: b for c, b in zip(space.choices, bits, strict=True) if b for s in c.sites}

        def snap(site, x):
            if site not in chosen:
                return x
            made = fitted[chosen[site]]
            grid, affine = made.plan.table[site].grid, made.qparams[site]
            scale, z = (np.asarray(v, np.float64) for v in (affine.scale, affine.zero_point))
            return (np.clip(np.round(x / scale) + z, grid.qmin, grid.qmax) - z) * scale

        edge = lambda node, i, x: snap(Site(node.name, i), x)
        kernel = lambda node, p: {
            k: snap(Site(node.name), v) if k == "kernel" else v for k, v in p.items()
        }
        return softmax(nets.forward(model, images, edge, kernel)["fc"], axis=-1)

    exact = forward([None] * len(space.choices))
    return lambda bits: rel_entr(exact, forward(bits)).sum(-1).mean()


def test_divergences_equal_those_of_networks_with_one_site_quantized(space, tables, moved):
    count = len(space.choices)
    alone = lambda row, b: [b if i == row else None for i in range(count)]
    raw = np.array([[moved(alone(row, b)) for b in BITS] for row in range(count)])
    truth = np.minimum.accumulate(raw, axis=1)
    np.testing.assert_allclose(tables["kl"], truth, rtol=0.02, atol=3e-7)


@pytest.mark.parametrize("observer", [MinMax(), Statistics()])
@pytest.mark.parametrize("widen", [True, False])
def test_grids_are_those_that_calibration_finds(model, images, observer, widen):
    seen = Observers(activations=observer)
    space = space_of(model.graph, scheme=W4A4, tensors=True, bits=BITS, observers=seen)
    how = {"expected": expected_ranges(model), "widen": widen, "batch": 6}
    found = lattices_of(model, space, images, **how)
    for level, plan in enumerate(space.plans):
        fitted = calibrate(model, plan, images, **how)
        for site, lattice in found.items():
            wanted = steps_of(fitted.affines[site], plan.table[site].grid)
            jax.tree.map(
                lambda stack, one, level=level: np.testing.assert_array_equal(stack[level], one),
                lattice,
                wanted,
            )


def test_expected_ranges_widen_grids_of_eight_bits(model, space, images, tables):
    far = {tensor: (-1e3 * jnp.ones(()), 1e3 * jnp.ones(())) for tensor, _ in space.plans[0].groups}
    how = {"key": jax.random.key(0), "batch": 6, "expected": far}
    wide = sensitivities(model, space, images, **how)
    tensors = [not choice.weight for choice in space.choices]
    assert (wide[tensors, -1] > 2 * tables["kl"][tensors, -1]).all()
    np.testing.assert_array_equal(
        sensitivities(model, space, images, widen=False, **how), tables["kl"]
    )


def test_one_program_for_all_kernels_tensors_and_bits(model, space, images, caplog):
    changed = space_of(model.graph, scheme=W4A4, bits=(3, 5, 6, 7))  # not compiled yet
    with jax.log_compiles():
        sensitivities(model, changed, images, key=jax.random.key(0), batch=4)
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert sum("jit(moved)" in message for message in compiled) == 1
    assert len(changed.choices) * len(changed.bits) == 12


def test_losses_fall_with_bits_and_the_seed_decides(model, space, images, tables):
    for table in tables.values():
        assert table.shape == (6, 3)
        assert (np.diff(table, axis=1) <= 0).all()
        assert (table[:, 0] > 0).all()
    for method in ("fisher", "trace"):
        again = sensitivities(model, space, images, method=method, key=jax.random.key(0), batch=6)
        np.testing.assert_array_equal(again, tables[method])


@pytest.fixture(scope="module")
def curvature(nets):
    """{kernel: block of the Hessian of the divergence at the float network}, and many slopes."""
    model = fold_batch_norm(nets.stem())
    x = nets.images(model, 5)
    layers = ("conv2", "fc")
    names = tuple((Site(layer), layer) for layer in layers)
    keys = jax.random.split(jax.random.key(3), 2000)
    aim = Aim(parts_of(model), None)
    slopes = jax.jit(jax.vmap(lambda k: slopes_of(model, names, x, k, aim)[1]))(keys)
    exact = evaluate(model, x)[0][0]
    blocks = {}
    for layer in layers:
        kernel = model.params[layer]["kernel"]

        def loss(flat, layer=layer, shape=kernel.shape):
            slots = {**model.params[layer], "kernel": flat.reshape(shape)}
            params = {**model.params, layer: slots}
            return divergence(exact, evaluate(dataclasses.replace(model, params=params), x)[0][0])

        blocks[layer] = np.asarray(jax.jit(jax.hessian(loss))(kernel.ravel()))
    found = {name.split()[0]: np.asarray(v).reshape(2000, -1) for name, v in slopes.items()}
    return blocks, found


@pytest.mark.parametrize("layer", ["conv2", "fc"])
def test_one_draw_for_all_layers_gives_the_trace_of_each_block(curvature, layer):
    block, slopes = curvature[0][layer], curvature[1][layer]
    traces = np.sum(slopes**2, axis=1)
    assert (traces >= 0).all()
    assert np.mean(traces) == pytest.approx(np.trace(block), rel=0.05)
    diagonal = np.mean(slopes**2, axis=0)
    np.testing.assert_allclose(diagonal, np.diag(block), rtol=0.2, atol=0.02 * block.max())


def test_predictions_are_half_the_weighted_squared_rounding_error(nets):
    """Of a linear layer, whose Fisher diagonal is `x_i^2 p (1 - p)`."""
    model = fold_batch_norm(nets.stem())
    images = nets.images(model, 8)
    space = space_of(model.graph, "zsq_all_low", scheme=W4A4, bits=BITS)
    row = [c.name for c in space.choices].index("fc")
    env = nets.forward(model, images)
    p = softmax(env["fc"], axis=-1)
    fisher = np.einsum("ni,nc->ic", env["pool"] ** 2, p * (1 - p)) / len(p)
    kernel, truth = model.params["fc"]["kernel"], {"fisher": [], "trace": []}
    for plan in space.plans:
        site = Site("fc")
        affine = calibrate(model, plan, images).affines[site]
        error = np.asarray(fake_quantize(kernel, affine, plan.table[site].grid) - kernel) ** 2
        truth["fisher"].append(np.sum(fisher * error) / 2)
        truth["trace"].append(np.mean(fisher) * np.sum(error) / 2)
    many = jnp.concatenate([images] * 8)
    for method in SENSITIVITIES[1:]:
        found = sensitivities(
            model, space, many, method=method, key=jax.random.key(1), batch=len(images)
        )[row]
        np.testing.assert_allclose(found, truth[method], rtol=0.2)


@pytest.mark.parametrize("method", SENSITIVITIES)
def test_sums_order_mixed_networks_as_they_turn_out(space, tables, method, moved):
    rng, predicted, true = np.random.default_rng(5), [], []
    for _ in range(40):
        picks = rng.integers(0, len(BITS), len(space.choices))
        predicted.append(sum(row[p] for row, p in zip(tables[method], picks, strict=True)))
        true.append(moved([BITS[p] for p in picks]))
    assert np.asarray(spearmanr(predicted, true))[0] > 0.8


def scored_pixels(nets, seed=0):
    """A network that scores every pixel."""
    builder = nets.Builder(InputContract(4, 4), seed)
    x = builder.op("relu", Relu(), builder.conv("first", "images", 4, bias=True))
    x = builder.conv("middle", x, 4, kernel=1, bias=True)
    return builder.done(builder.conv("scores", x, 3, kernel=1, bias=True))


@pytest.mark.parametrize("make", [scored_pixels, lambda nets, seed: nets.two_heads(seed)])
def test_several_outputs_and_scores_for_each_pixel(make, nets):
    """A layer's one rounding is a draw of what the Fisher diagonal expects: right on average."""
    ratios = []
    for seed in range(6):
        model = fold_batch_norm(make(nets, seed))
        space = space_of(model.graph, scheme=W4A4, bits=(3, 8))
        x, key = nets.images(model, 16), jax.random.key(0)
        kl, fisher = (sensitivities(model, space, x, method=m, key=key) for m in ("kl", "fisher"))
        ratios.append(np.log(fisher[:, 1] / kl[:, 1]))
    assert np.abs(ratios).max() < 2.0
    assert abs(np.mean(ratios)) < 0.5


def test_refusals(model, space, images):
    key = jax.random.key(0)
    unchecked: Any = inspect.unwrap(sensitivities)  # what callers without a type checker see
    with pytest.raises(PlanError, match="'loss' is none of kl, fisher, trace"):
        unchecked(model, space, images, method="loss", key=key)
    with pytest.raises(PlanError, match="at least one image"):
        sensitivities(model, space, images[:0], key=key)


def test_numbers_that_are_not_finite_are_refused(model, space, images, monkeypatch):
    broken = lambda *args: np.array([[0.1, np.nan, 0.0]] * len(space.choices))
    monkeypatch.setattr(module, "measured", broken)
    with pytest.raises(PlanError, match="'depthwise' at 4 bits is not finite"):
        sensitivities(model, space, images, key=jax.random.key(0))
