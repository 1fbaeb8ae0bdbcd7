import jax
import numpy as np
import pytest

from dfq_jax.recipes.best import best, best_unlabelled
from dfq_jax.synthesis.recipe import random_labels
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.sources.noise import noise
from dfq_jax.synthesis.sources.pixels import pink

KEY = jax.random.key(3)


def test_images_are_possible_pixels(tiny_net):
    made = synthesize_images(tiny_net, best(steps=4, batch=6), 6, KEY)
    lo, hi = tiny_net.contract.value_range
    images = np.asarray(made.images)
    assert images.min() >= lo - 1e-5
    assert images.max() <= hi + 1e-5
    assert images.std() > 0.1 * (hi - lo)


def test_more_steps_bring_statistics_and_labels_closer(tiny_net):
    losses = [
        synthesize_images(tiny_net, best(steps=s, batch=8), 8, KEY).losses[0] for s in (1, 40)
    ]
    assert losses[1] < 0.5 * losses[0]


def test_without_labels_nothing_looks_at_predictions(tiny_net):
    recipe = best_unlabelled(steps=4, batch=6)
    assert [term.name for term in recipe.terms] == ["batch norm"]
    assert [term.name for term in best().terms] == ["batch norm", "labels"]
    assert (recipe.name, recipe.settings["labels"]) == ("best_unlabelled", 0.0)
    assert synthesize_images(tiny_net, recipe, 6, KEY).images.shape == (6, *tiny_net.contract.shape)


def test_random_labels_are_one_hot_and_spread():
    labels = np.asarray(random_labels(KEY, 200, 5))
    assert labels.shape == (200, 5)
    np.testing.assert_array_equal(labels.sum(1), 1)
    assert labels.sum(0).min() > 20


def test_most_steps_are_taken_at_half_the_size(tiny_net):
    recipe = best(steps=10, coarse=0.8)
    assert [stage.steps for stage in recipe.stages] == [8, 2]
    images = jax.numpy.ones((2, 8, 8, 3))
    assert recipe.stages[0].augment(KEY, images).shape == (2, 4, 4, 3)
    assert recipe.stages[1].augment(KEY, images).shape == images.shape
    assert [stage.steps for stage in best(steps=1, coarse=0.8).stages] == [1]
    made = synthesize_images(tiny_net, best(steps=5, batch=4, coarse=0.6), 4, KEY)
    assert made.images.shape == (4, *tiny_net.contract.shape)
    assert np.isfinite(made.losses).all()


def test_each_size_has_a_cosine_of_its_own():
    """The first step of either stage is taken at the whole rate, the last one at almost none."""
    for stage in best(steps=40, coarse=0.5, learning_rate=0.2).stages:
        optimizer, x = stage.optimizer(1.0), jax.numpy.zeros(())
        state, sizes = optimizer.init(x), []
        for _ in range(20):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(jax.numpy.ones(()), state, x)
            sizes.append(-float(jax.numpy.asarray(updates)))
        np.testing.assert_allclose(sizes, 0.1 * (1 + np.cos(np.pi * np.arange(20) / 20)), rtol=1e-3)


def test_starts(tiny_net):
    shape = (4, 16, 16, 3)
    np.testing.assert_array_equal(best().source.init(KEY, shape), noise(KEY, shape))
    np.testing.assert_array_equal(best(start="pink").source.init(KEY, shape), pink(KEY, shape))


@pytest.mark.parametrize("wrong", [{"coarse": 1.0}, {"coarse": -0.1}, {"start": "grey"}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"best\(\) got"):
        best(**wrong)
