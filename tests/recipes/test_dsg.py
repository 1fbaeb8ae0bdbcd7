import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.optim.steps import Now
from dfq_jax.recipes.dsg import dsg
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.synthesis.run.engine import batch_size, synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.sources.pixels import gaussian, uniform
from dfq_jax.synthesis.terms.slack import slack_margins
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
    for factor, recipe in [(2.0, dsg(slack=False)), (4.0, dsg(variant="code", slack=False))]:
        wanted = 0.0
        for layer, (name, target) in enumerate(targets.items()):
            n = stats[name].positions
            std = np.sqrt(np.asarray(stats[name].var) * n / (n - 1) + 1e-6)
            gap = (np.asarray(stats[name].mean) - np.asarray(target.mean)) ** 2
            gap += (std - np.sqrt(np.asarray(target.var) + 1e-6)) ** 2
            weights = np.where(np.arange(4) % 2 == layer, factor, 1.0)
            wanted += (weights * gap.sum(1)).sum() / 4
        found = loss_of(recipe, model, x)[1]["LSE"]
        assert found == pytest.approx(wanted, rel=1e-4)


def test_total_is_the_weighted_sum_of_its_parts(model, nets):
    x = nets.images(model, 4)
    weights = {"LSE": 1.0, "image": 1.0, "SCI": 0.01}
    code = weights | {"CE": 2.0, "TV": 0.01, "l2": 0.01}
    for recipe, wanted in [(dsg(slack=False), weights), (dsg(variant="code", slack=False), code)]:
        total, parts = loss_of(recipe, model, x)
        assert {t.name: t.weight for t in recipe.terms} == wanted
        assert total == pytest.approx(sum(w * parts[k] for k, w in wanted.items()), rel=1e-5)


def test_labels_are_one_hot_and_random():
    labels = np.asarray(dsg().condition(KEY, 200, 5))
    assert labels.shape == (200, 5)
    np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile([0, 0, 0, 0, 1], (200, 1)))
    assert labels.sum(0).min() > 20


def test_settings():
    recipe = dsg(variant="code", steps=9, batch=6, inhibit=0.0, noise_images=8)
    assert (recipe.name, recipe.steps, recipe.batch) == ("dsg", 9, 6)
    assert recipe.settings["variant"] == "code"
    assert set(recipe.settings) >= {"quantile", "noise_images", "slack", "enhance", "inhibit"}
    assert "SCI" not in [t.name for t in recipe.terms]
    assert recipe.source.init is uniform
    assert dsg().source.init is gaussian
    assert batch_size(dsg(), 256, 9) == 36  # whole rounds of layers


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
