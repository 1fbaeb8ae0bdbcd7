"""Layers in closed form: windows, moments, and what becomes of a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.lowering import convolve
from dfq_jax.graph.ops import Conv2d, ConvTranspose2d, Linear
from dfq_jax.graph.semantics import apply_op
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.numerics.affine import Affine, Grid, fake_quantize
from dfq_jax.numerics.ranges import Lp, weight_affine
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Plan, Scheme, Site, Spec, resolve
from dfq_jax.quantization.second_moments import (
    MOST_VALUES,
    Grams,
    images_at_a_time,
    moments_of,
    pieces,
    unfolded,
    unfolding,
)
from dfq_jax.reconstruction.closed_form import INSIDE, ClosedForm, solve, solved
from dfq_jax.reconstruction.engine import reconstruct
from dfq_jax.types import InputContract

KEY = jax.random.key(3)
CONTRACT = InputContract(7, 8, (0.5,) * 6, (0.5,) * 6)
OPERATORS = {
    "plain": (Conv2d(padding=((1, 1), (1, 1))), (3, 3, 6, 4)),
    "strided": (Conv2d((2, 1), ((1, 0), (0, 2))), (3, 2, 6, 4)),
    "dilated": (Conv2d(dilation=(2, 1)), (2, 3, 6, 4)),
    "groups": (Conv2d(groups=2), (3, 3, 3, 4)),
    "depthwise": (Conv2d(groups=6), (3, 3, 1, 12)),
    "transposed": (
        ConvTranspose2d((2, 3), ((1, 0), (0, 2)), 2, (2, 1), (1, 0)),
        (3, 2, 3, 4),
    ),
    "volume": (Conv3d((1, 2, 1), ((1, 0), (0, 1), (2, 0)), 2, (1, 1, 2)), (2, 3, 2, 3, 4)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_windows_times_kernel_is_the_convolution(name):
    op, shape = OPERATORS[name]
    x = jax.random.normal(KEY, (2, 5, 7, 8, 6) if isinstance(op, Conv3d) else (2, 7, 8, 6))
    kernel = jax.random.normal(jax.random.key(1), shape)
    wanted = apply_op(op, {"kernel": kernel}, x)
    rows = unfolded(x, op, shape)
    by_group = kernel.reshape(-1, op.groups, shape[-1] // op.groups)
    found = jnp.einsum("rgk,kgo->rgo", rows, by_group).reshape(wanted.shape)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert rows.size <= 2 * unfolding(op, shape) * x.size  # edges of such small images add some


def test_a_linear_layer_reads_rows():
    x = jax.random.normal(KEY, (4, 5, 6))
    np.testing.assert_array_equal(unfolded(x, Linear(), (6, 3))[:, 0], x.reshape(-1, 6))


def test_moments_are_means_over_images_and_positions():
    """In pieces, with the layer's own rounding of its quantized inputs."""
    op, shape = OPERATORS["plain"]
    exact = np.asarray(jax.random.normal(KEY, (5, 7, 8, 6)))
    rough, affine = exact + 0.1, Affine(jnp.float32(0.25), jnp.uint8(9))
    found, samples = moments_of(
        op, shape, [(rough[:3], exact[:3]), (rough[3:], exact[3:])], (affine, Grid(4))
    )
    snapped = fake_quantize(jnp.asarray(rough), affine, Grid(4))
    rows, wanted = (
        np.asarray(unfolded(v, op, shape))[:, 0].astype(float)
        for v in (snapped, jnp.asarray(exact))
    )
    assert samples == len(rows)
    np.testing.assert_allclose(found.gram[0], rows.T @ rows / len(rows), atol=1e-4)
    np.testing.assert_allclose(found.cross[0], rows.T @ wanted / len(rows), atol=1e-4)
    np.testing.assert_allclose(found.mean[0], rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.wanted[0], wanted.mean(0), atol=1e-5)
    about = found.centred()
    np.testing.assert_allclose(about.gram[0], np.cov(rows.T, bias=True), atol=1e-4)
    gaps = (rows - rows.mean(0)).T @ (wanted - wanted.mean(0)) / len(rows)
    np.testing.assert_allclose(about.cross[0], gaps, atol=1e-4)
    eye = np.mean(rows**2) * np.eye(rows.shape[1])
    for name in ("gram", "cross"):
        added = getattr(found.shrunk(0.5), name)[0] - getattr(found, name)[0]
        np.testing.assert_allclose(added, 0.5 * eye, atol=1e-4)
    many = np.zeros((5, MOST_VALUES // 20))
    assert [len(v) for v in pieces(many, images_at_a_time(many, 10))] == [2, 2, 1]


@pytest.mark.parametrize(
    ("name", "bits"),
    [("tiny", 2), ("shuffle", 4), pytest.param("excite", 3, marks=pytest.mark.slow)],
)
def test_networks_get_better(nets, name, bits):
    """Groups, depthwise and linear layers; every unit at least as good as rounded to nearest."""
    reference = fold_batch_norm(getattr(nets, name)())
    images = nets.images(reference, 24)
    plan = resolve(reference.graph, Scheme(bits, 8))
    quantized = calibrate(reference, plan, images)
    found, reports = reconstruct(quantized, reference, np.asarray(images), ClosedForm(), KEY)
    ratios = [r.after / max(r.before, 1e-9) for r in reports if r.before > 1e-5]
    assert np.exp(np.mean(np.log(ratios))) < 0.8
    for site, spec in plan.entries:
        if site.argument is None:
            old, new = (q.model.params[site.node]["kernel"] for q in (quantized, found))
            snapped = fake_quantize(new, found.affines[site], spec.grid)
            kept = not np.array_equal(old, new)  # or else left as it was, to be rounded later
            steps = np.abs(snapped - new) / found.affines[site].scale
            inside = np.abs(new / found.affines[site].scale) < 2 ** (spec.grid.bits - 1) - 1
            assert not kept or np.all(steps[inside] <= INSIDE + 1e-3)  # so it rounds to what it was


@pytest.mark.parametrize("name", ["plain", "groups"])
def test_mean_outputs_are_the_exact_ones(name):
    """Whatever rounding does to a kernel, the bias makes up for on average."""
    op, shape = OPERATORS[name]
    exact = np.asarray(jax.random.uniform(KEY, (8, 7, 8, 6)))
    rough = np.round(exact * 3) / 3
    kernel = jax.random.normal(jax.random.key(1), shape)
    graph = Graph((Node("n0", op, ("x0",)),), ("x0",), ("n0",))
    model = Model(graph, {"n0": {"kernel": kernel, "bias": jnp.ones(4)}}, (CONTRACT,))
    site, grid = Site("n0"), Grid(2, axis=-1)
    plan = Plan(((site, Spec(grid)),), (), Scheme(2, 8), "zsq_all_low")
    affine = weight_affine(kernel, grid, Lp(2.4))
    found, qparams = solved(model, {site: affine}, plan, [(rough, exact)], ClosedForm())
    hard = fake_quantize(found.params["n0"]["kernel"], qparams[site], grid)
    wanted = convolve(jnp.asarray(exact), kernel, op) + 1
    got = convolve(jnp.asarray(rough), hard, op) + found.params["n0"]["bias"]
    np.testing.assert_allclose(got.mean((0, 1, 2)), wanted.mean((0, 1, 2)), atol=1e-4)
    nearest = convolve(jnp.asarray(rough), fake_quantize(kernel, affine, grid), op) + 1
    assert jnp.mean((got - wanted) ** 2) < 0.5 * jnp.mean((nearest - wanted) ** 2)


def test_transposed_convolutions_are_solved(nets):
    """Units are no worse, and kernels of layers that paint learn as others do."""
    reference = fold_batch_norm(nets.unet())
    images = nets.images(reference, 8)
    plan = resolve(reference.graph, Scheme(3, 8))
    quantized = calibrate(reference, plan, images)
    found, reports = reconstruct(quantized, reference, np.asarray(images), ClosedForm(), KEY)
    ups = [n.name for n in reference.graph.nodes if isinstance(n.op, ConvTranspose2d)]
    kernel = lambda q, name: np.asarray(q.model.params[name]["kernel"])
    assert any(not np.array_equal(kernel(quantized, n), kernel(found, n)) for n in ups)
    assert all(r.after <= r.before * (1 + 1e-5) for r in reports)


def test_a_layer_with_one_output_is_solved_as_one_of_many():
    """Its one scale is that of its channel, and is refitted like others."""
    kernel = jax.random.normal(jax.random.key(5), (16, 1))
    rows = jax.random.normal(KEY, (64, 16)) @ jax.random.normal(jax.random.key(6), (16, 16))
    gram = (rows.T @ rows / 64)[None]
    moments = Grams(gram, gram, jnp.zeros((1, 16)), jnp.zeros((1, 16)))
    found = []
    for count in (1, 2):
        twins, grid = jnp.tile(kernel, (1, count)), Grid(2, symmetric=True, axis=-1)
        near, affine = solve(
            twins, weight_affine(twins, grid, Lp()), moments, grid, 1, ClosedForm()
        )
        found.append((near[:, 0], affine.scale.reshape(-1)[0]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)


def test_as_many_images_as_have_enough_positions():
    np.testing.assert_array_equal(ClosedForm().images(5, 100), np.arange(5))
    short = ClosedForm(positions=10_000)
    for each, expected in ((1, 1000), (50, 200), (1000, 64)):
        seen = short.images(1000, each)
        assert len(seen) == len(set(seen)) == expected
        assert seen.max() >= 900 * (expected < 1000)
    np.testing.assert_array_equal(short.images(40, 1000), np.arange(40))
