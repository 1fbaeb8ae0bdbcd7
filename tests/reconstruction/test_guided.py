"""Many blocks at once: the loss against NumPy, and what it does for a network of few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.cuts import blocks, stage_sizes
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.numerics.affine import Affine, Grid, fake_quantize
from dfq_jax.numerics.rounding import straight_through
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.quantization.simulate import simulate
from dfq_jax.recipes.stages import stages
from dfq_jax.reconstruction.engine import reconstruct
from dfq_jax.reconstruction.guided import gaps, guides, variances
from dfq_jax.reconstruction.method import batch_of


@pytest.fixture(scope="module")
def given(nets):
    reference = fold_batch_norm(nets.tiny())
    images = np.asarray(nets.images(reference, 512))
    plan = resolve(reference.graph, Scheme(3, 3))
    return calibrate(reference, plan, jnp.asarray(images[:64])), reference, images


def test_units_are_variances_over_all_images(given):
    """By channel, then mean over channels; as many batches as it takes."""
    _, reference, images = given
    found = variances(reference, images[:70])
    names = guides(reference.graph)
    assert set(found) == set(names)
    _, values = evaluate(reference, jnp.asarray(images[:70]), taps=names)
    for name, value in values.items():
        value = np.asarray(value, np.float64)
        wanted = value.var(tuple(range(value.ndim - 1))).mean()
        np.testing.assert_allclose(found[name], wanted, rtol=1e-3)


def test_guides_are_the_ends_of_blocks(given):
    _, reference, _ = given
    graph = reference.graph
    assert guides(graph)[:-1] == tuple(b.graph.outputs[0] for b in blocks(graph))[:-1]
    assert guides(graph)[-1] == graph.outputs[0]


def test_the_output_counts_as_much_as_all_blocks(given):
    _, reference, _ = given
    graph = reference.graph
    rng = np.random.default_rng(1)
    wanted = {name: jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for name in guides(graph)}
    found = {name: value + 1 for name, value in wanted.items()}
    units = {name: jnp.float32(1 + number) for number, name in enumerate(wanted)}
    parts = gaps(graph, found, wanted, units)
    inside = [1 / units[n] for n in wanted if n not in graph.outputs]
    np.testing.assert_allclose(parts["blocks"], np.mean(inside), rtol=1e-6)
    last = graph.outputs[0]
    np.testing.assert_allclose(parts["reconstruction"], 1 / units[last], rtol=1e-6)


def test_straight_through_rounds_and_lets_slopes_pass():
    grid = Grid(3, axis=-1)
    affine = Affine(jnp.array([[0.5, 0.25]]), jnp.array([[3, 4]], jnp.uint8))
    kernel = jax.random.normal(jax.random.key(0), (5, 2))
    rounding = straight_through()
    trained, fixed = rounding.init(kernel, affine, grid)
    soft = lambda t: rounding.soft(t, fixed, grid)
    np.testing.assert_allclose(soft(trained), fake_quantize(kernel, affine, grid), atol=1e-7)
    slopes = jax.grad(lambda t: jnp.sum(soft(t)))(trained)
    steps = np.asarray(trained["codes"])
    inside = (steps > [-3, -4]) & (steps < [4, 3])
    np.testing.assert_allclose(slopes["codes"], np.where(inside, affine.scale, 0), atol=1e-7)
    codes = np.clip(np.round(steps), [-3, -4], [4, 3])
    np.testing.assert_allclose(slopes["scale"], codes.sum(0, keepdims=True), rtol=1e-6)
    after, hard = rounding.hard(trained, fixed, grid)
    np.testing.assert_array_equal(after.scale, affine.scale)
    np.testing.assert_array_equal(hard, soft(trained))


def test_a_network_of_few_bits_learns(given):
    """On images not learned from, too; and a second run gives the same bits."""
    start, reference, images = given
    method = stages(steps=1000, batch=8)
    seen, fresh = images[:384], jnp.asarray(images[384:])
    found, reports = reconstruct(start, reference, seen, method, jax.random.key(1))
    assert len(reports) == len(stage_sizes(reference)) > 1
    assert all(report.kept and report.after < report.before for report in reports)
    logits = evaluate(reference, fresh)[0][0]
    error = lambda q: float(jnp.mean((simulate(q, fresh) - logits) ** 2))
    assert error(found) < 0.9 * error(start)
    short = stages(steps=20, batch=8)
    first, again = (reconstruct(start, reference, seen, short, jax.random.key(1)) for _ in "ab")
    for a, b in zip(jax.tree.leaves(first[0]), jax.tree.leaves(again[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_steps_of_large_images_read_fewer():
    method = stages()
    sides = (224, 112, 56, 28, 14, 7)
    found = [batch_of(method, (64, side, side, 8)) for side in sides]
    assert found == [4, 4, 8, 16, 32, 32]
    assert batch_of(method, (64, 197, 8)) == 32  # tokens of 14 x 14 patches and a class
    assert batch_of(stages(batch=2), (64, 224, 224, 3)) == 2
    assert batch_of(method._replace(lines=0), (64, 224, 224, 3)) == 32
