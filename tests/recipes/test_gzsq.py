import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.query import batch_norms
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.steps import Now
from dfq_jax.passes.estimate import recursive_moments
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.recipes.best import best
from dfq_jax.recipes.gzsq import gzsq
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.sources.pixels import gaussian, to_natural
from dfq_jax.synthesis.terms.estimates import estimated, natural_inputs
from dfq_jax.synthesis.terms.match import EPS, image_z_score
from dfq_jax.synthesis.terms.targets import batch_norm_targets, recorded_statistics
from dfq_jax.types import InputContract

KEY = jax.random.key(0)
NOW = Now(KEY, jnp.zeros((), jnp.int32))
OTHER = InputContract(6, 6, (0.5, 0.4, 0.3), (0.5, 0.25, 0.125))


@pytest.fixture(scope="module")
def bare(nets):
    """A network without batch norm, of another contract than ImageNet's."""
    folded = fold_batch_norm(nets.stem(seed=1))
    return dataclasses.replace(folded, moments={}, inputs=(OTHER,))


def means_off(nets, model, images):
    """Sum over layers of the length of `mean of the batch - target`, by NumPy."""
    truth, total = nets.forward(model, images), 0.0
    for name, target in batch_norm_targets(model)[0].items():
        values = truth[model.graph[name].inputs[0]]
        total += np.linalg.norm(values.mean((0, 1, 2)) - np.asarray(target.mean))
    return total


def distance(x, mean, std):
    """Norm over channels of the Z-score of Float[b h w c], by NumPy."""
    ours = np.sqrt(x.var((0, 1, 2)) + EPS) + 1e-6
    return np.linalg.norm((x.mean((0, 1, 2)) - mean) / np.hypot(ours, std + 1e-6))


def test_loss_against_numpy(bare, nets):
    model = estimated(bare)
    targets, _ = batch_norm_targets(model)
    natural = nets.images(model, 3) * 0.7 + 0.2
    context = Context(model, targets, (), ())
    objective = build_objective(gzsq(bounded=False))
    loss, (parts, _) = jax.jit(lambda x: objective(x, context, NOW))(natural)
    values = np.asarray(natural, float)
    pixels = values * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]
    truth = nets.forward(bare, (pixels - OTHER.mean) / OTHER.std)
    found = recursive_moments(bare, natural_inputs(OTHER))
    wanted = sum(
        distance(truth[name], np.asarray(found[name].mean), np.sqrt(found[name].var + EPS))
        for name in ("conv1", "conv2")
    )
    image = distance(values, 0, 1)
    assert float(parts["L_Z"]) == pytest.approx(wanted, rel=1e-4)
    assert float(parts["image"]) == pytest.approx(image, rel=1e-4)
    assert float(loss) == pytest.approx(wanted + image, rel=1e-4)


def test_images_of_the_right_colours_cost_nothing(scenes):
    x = np.asarray(gaussian(KEY, (2, 5, 4, 3)))
    x = (x - x.mean((0, 1, 2))) * 3
    assert float(image_z_score(scenes.observed(images=x))) == pytest.approx(0, abs=1e-5)
    assert float(image_z_score(scenes.observed(images=x + 1))) > 0.3


def test_images_reach_the_estimated_means(bare, nets):
    """Tenfold nearer than the noise they start from, and of possible pixels if asked for."""
    model, seen = estimated(bare, "analytic"), []  # the recursion's means contradict each other
    recipe = gzsq(batch=8, bounded=False)
    made = synthesize_images(model, recipe, 8, KEY, chunk=250, watch=Watcher(progress=seen.append))
    noise = synthesize_images(model, recipe._replace(terms=()), 8, KEY).images
    assert means_off(nets, model, made.images) < means_off(nets, model, noise) / 10
    assert made.losses[0] == pytest.approx(seen[-1].parts["loss"], rel=1e-5)
    assert set(seen[0].parts) == {"loss", "L_Z", "image"}
    assert np.asarray(to_natural(made.images, OTHER)).std() > 1.5  # contrast makes means cheap
    bounded = synthesize_images(model, gzsq(steps=10, batch=8), 8, KEY).images
    lo, hi = OTHER.value_range
    assert lo - 1e-5 <= float(bounded.min()) < float(bounded.max()) <= hi + 1e-5


@pytest.mark.parametrize("recipe", [zeroq, best])
def test_methods_that_need_statistics_find_them(recipe, bare):
    """Every batch-norm recipe runs as it is, and lowers its match."""
    seen = []
    model = estimated(bare, "analytic")
    synthesize_images(
        model, recipe(steps=12, batch=4), 4, KEY, chunk=3, watch=Watcher(progress=seen.append)
    )
    match = recipe().terms[0].name
    assert seen[-1].parts[match] < seen[0].parts[match]


@pytest.mark.parametrize("mode", ["gzsq", "analytic"])
def test_estimates_replace_recorded_statistics(mode, nets):
    """Real batch norms are folded away first; the function stays."""
    model = nets.stem(seed=2)
    changed = estimated(model, mode)
    assert [n.name for n in batch_norms(changed.graph)] == ["conv1.estimated", "conv2.estimated"]
    x = nets.images(model, 3)
    wanted = nets.forward(model, x)["fc"]
    np.testing.assert_allclose(
        nets.forward(changed, x)["fc"], wanted, atol=1e-5 * np.abs(wanted).max()
    )
    targets, excluded = recorded_statistics(changed)
    assert len(targets) == 2
    assert excluded == ()


def test_modes_differ_and_noise_obeys_its_key(bare):
    var = lambda *how, **more: np.asarray(
        estimated(bare, *how, **more).params["conv2.estimated"]["var"]
    )
    found = [
        var(),
        var("analytic"),
        var("noise"),
        var(rule="max"),
        var("noise", key=jax.random.key(1)),
    ]
    for i, one in enumerate(found):
        assert all(not np.allclose(one, other) for other in found[i + 1 :])
    np.testing.assert_array_equal(var("noise", key=jax.random.key(0)), found[2])


def test_natural_images_as_a_network_reads_them():
    found = natural_inputs(OTHER)
    mean = (np.array([0.485, 0.456, 0.406]) - OTHER.mean) / OTHER.std
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-6)
    std = np.array([0.229, 0.224, 0.225]) / OTHER.std
    np.testing.assert_allclose(found.var, std**2, rtol=1e-5)
    plain = natural_inputs(InputContract(4, 4))
    np.testing.assert_allclose(plain.mean, 0, atol=1e-6)
    np.testing.assert_allclose(plain.var, 1, rtol=1e-6)


def test_settings():
    recipe = gzsq(steps=7, batch=3, learning_rate=0.25)
    assert (recipe.name, recipe.steps, recipe.batch) == ("gzsq", 7, 3)
    assert recipe.settings == {"learning_rate": 0.25, "bounded": True}
    assert (gzsq().steps, gzsq().settings["learning_rate"]) == (500, 0.5)
    assert recipe.source.init is gaussian
    assert [t.weight for t in recipe.terms] == [1, 1]
    assert recipe.bounded
    assert not gzsq(bounded=False).bounded
