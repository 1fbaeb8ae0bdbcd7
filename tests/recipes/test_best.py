import jax
import numpy as np

from dfq_jax.recipes.best import best
from dfq_jax.synthesis.recipe import random_labels
from dfq_jax.synthesis.run import synthesize_images

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


def test_label_weight_zero_leaves_labels_out(tiny_net):
    recipe = best(labels=0.0)
    assert next(t.weight for t in recipe.terms if t.name == "labels") == 0.0
    assert recipe.settings["labels"] == 0.0


def test_random_labels_are_one_hot_and_spread():
    labels = np.asarray(random_labels(KEY, 200, 5))
    assert labels.shape == (200, 5)
    np.testing.assert_array_equal(labels.sum(1), 1)
    assert labels.sum(0).min() > 20
