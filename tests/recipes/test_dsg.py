from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.optim.steps import Now
from dfq_jax.recipes.dsg import dsg, dsg_journal
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.synthesis.recipe import batch_size
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.sources.pixels import gaussian, uniform
from dfq_jax.synthesis.terms.slack import exactly, slack_margins
from dfq_jax.synthesis.terms.spectrum import spectral_distance, spectrum
from dfq_jax.synthesis.terms.targets import batch_norm_targets, observe

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model(nets):
    return nets.stem(seed=1)


def loss_of(recipe, model, x, shared=None):
    """The objective of a recipe and its parts at `x`."""
    targets, _ = batch_norm_targets(model)
    labels = recipe.condition(KEY, len(x), 5)
    context = Context(model, targets, shared, labels)
    now = Now(KEY, jnp.zeros((), jnp.int32))
    loss, (parts, _) = jax.jit(build_objective(recipe))(x, context, now)
    return float(loss), {k: float(v) for k, v in parts.items()}


def constant(model, delta):
    return {k: (jnp.float32(delta),) * 2 for k in batch_norm_targets(model)[0]}


def test_without_its_ideas_it_is_zeroq(model, nets):
    x = nets.images(model, 4)
    plain, _ = loss_of(dsg(slack=False, enhance=False, inhibit=0.0), model, x)
    assert plain == pytest.approx(loss_of(zeroq(), model, x)[0], rel=1e-6)
    zero = loss_of(dsg(enhance=False, inhibit=0.0), model, x, constant(model, 0.0))
    assert zero[0] == pytest.approx(plain, rel=1e-6)


def test_no_tolerances_are_measured_where_none_are_wanted(model):
    targets, _ = batch_norm_targets(model)
    assert dsg(slack=False).prepare(model, targets, KEY) is None


def test_tolerance_lowers_the_loss_monotonously(model, nets):
    x = nets.images(model, 4)
    losses = [
        loss_of(dsg(inhibit=0.0), model, x, constant(model, d))[1]["LSE"]
        for d in (0.0, 0.1, 0.3, 100.0)
    ]
    assert losses[0] > losses[1] > losses[2] > losses[3] == 0


def test_the_noise_that_set_the_tolerances_costs_nothing(model):
    """At quantile 1 every gap of the calibration noise is inside; one image at a time."""
    targets, _ = batch_norm_targets(model)
    recipe = dsg(quantile=1.0, noise_images=1, inhibit=0.0)
    shared = recipe.prepare(model, targets, KEY)
    noise = gaussian(jax.random.split(KEY, 1)[0], (1, *model.contract.shape))
    assert loss_of(recipe, model, noise, shared)[1]["LSE"] < 1e-8
    same = slack_margins(model, targets, KEY, quantile=1.0, count=1)
    for name, (delta, gamma) in shared.items():
        assert (float(delta), float(gamma)) == tuple(float(v) for v in same[name])


def test_each_sample_emphasises_one_layer(model, nets):
    """Two layers: even samples count the first again, odd ones the second."""
    x = nets.images(model, 4)
    targets, _ = batch_norm_targets(model)
    stats = observe(model, targets, x).stats
    journal = dsg_journal()._replace(prepare=exactly)
    for factor, recipe in [(2.0, dsg(slack=False)), (4.0, journal)]:
        wanted = 0.0
        for layer, (name, target) in enumerate(targets.items()):
            n = stats[name].positions
            std = np.sqrt(np.asarray(stats[name].var) * n / (n - 1) + 1e-6)
            gap = (np.asarray(stats[name].mean) - np.asarray(target.mean)) ** 2
            gap += (std - np.sqrt(np.asarray(target.var) + 1e-6)) ** 2
            own = np.arange(4) == layer if recipe is journal else np.arange(4) % 2 == layer
            weights = np.where(own, factor, 1.0)
            wanted += (weights * gap.sum(1)).sum() / 4
        found = loss_of(recipe, model, x)[1]["LSE"]
        assert found == pytest.approx(wanted, rel=1e-4)


def test_total_is_the_weighted_sum_of_its_parts(model, nets):
    x = nets.images(model, 4)
    weights = {"LSE": 1.0, "image": 1.0}
    code = weights | {"SCI": 1.0, "CE": 2.0, "TV": 0.01, "l2": 0.01}
    ours = dsg(slack=False, inhibit=0.01), weights | {"SCI": 0.01}
    journal = dsg_journal()._replace(prepare=exactly)
    for recipe, wanted in [(dsg(slack=False), weights), ours, (journal, code)]:
        total, parts = loss_of(recipe, model, x)
        assert {t.name: t.weight for t in recipe.terms} == wanted
        assert total == pytest.approx(sum(w * parts[k] for k, w in wanted.items()), rel=1e-5)


def test_spectral_distance_is_that_of_the_released_code():
    """With NumPy's eigenvectors, whose signs are LAPACK's as well."""
    images, noise = (np.asarray(gaussian(jax.random.key(k), (5, 4, 4, 3))) for k in (1, 2))
    images = 0.3 * images + 1.0  # alike

    def spectrum(x):
        flat = x.reshape(5, -1)
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        return np.linalg.eigh(unit @ unit.T)

    (values, vectors), (wanted, others) = spectrum(images), spectrum(noise)
    weights = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    along = np.abs((weights * (vectors * others).sum(0)).sum())
    found = float(spectral_distance(jnp.asarray(images), jnp.asarray(noise)))
    size = np.abs(found - 1e-4 * ((values - wanted) ** 2).mean())
    signs = [
        np.abs((weights * (vectors * others).sum(0) * s).sum()) for s in product((1, -1), repeat=5)
    ]
    assert np.min(np.abs(size - np.array([along, *signs]))) < 1e-5


def test_slopes_of_a_spectrum():
    """Those of finite differences; finite for samples that are all alike."""
    root = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    matrix, weights = jnp.asarray(root @ root.T), jnp.asarray(root[::-1])

    def value(a):
        values, vectors = spectrum(a)
        return jnp.sum(values**2) + jnp.sum((vectors * vectors[0]) * weights)

    way = jnp.asarray(root + root.T)
    slope = float(jax.jvp(value, (matrix,), (way,))[1])
    assert slope == pytest.approx(
        float(value(matrix + 1e-2 * way) - value(matrix - 1e-2 * way)) / 2e-2, rel=2e-2
    )
    alike = jnp.ones((4, 3, 3, 3))
    noise = gaussian(KEY, (4, 3, 3, 3))
    assert np.isfinite(np.asarray(jax.grad(spectral_distance)(alike, noise))).all()


def test_settings():
    recipe = dsg(steps=9, batch=6, inhibit=0.01, noise_images=8)
    assert (recipe.name, recipe.steps, recipe.batch) == ("dsg", 9, 6)
    assert set(recipe.settings) >= {"quantile", "noise_images", "slack", "enhance", "inhibit"}
    assert dsg_journal().source.init is uniform
    assert dsg().source.init is gaussian
    assert [batch_size(dsg(), n, 49) for n in (1, 20, 256)] == [49] * 3  # one for each layer
    assert batch_size(dsg(batch=256), 256, 9) == 252  # whole rounds of layers
    assert batch_size(dsg_journal(), 256, 9) == 40


def spread(model, images):
    """How far apart the per-sample means of one batch are at the batch norms."""
    targets, _ = batch_norm_targets(model)
    stats = jax.jit(lambda x: observe(model, targets, x))(images).stats
    return float(np.mean([np.asarray(s.mean).std(0).mean() for s in stats.values()]))


def test_images_are_more_diverse_than_zeroqs(model):
    diverse = synthesize_images(model, dsg(steps=60, batch=8, noise_images=16), 8, KEY, chunk=60)
    strict = synthesize_images(model, zeroq(steps=60, batch=8, dark_start=False), 8, KEY, chunk=60)
    assert diverse.images.shape == strict.images.shape == (8, 6, 6, 3)
    assert spread(model, diverse.images) > 1.3 * spread(model, strict.images)
    shared = dsg(noise_images=16).prepare(
        model, batch_norm_targets(model)[0], jax.random.fold_in(KEY, 2**31 - 1)
    )
    loose = dsg(enhance=False, inhibit=0.0)
    start = gaussian(KEY, (8, 6, 6, 3))
    match = lambda x: loss_of(loose, model, x, shared)[1]["SDA"]
    assert match(diverse.images) < match(start) / 10
