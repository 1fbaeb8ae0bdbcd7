import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import dfq_jax
from dfq_jax.api import grids
from dfq_jax.api.synthesize import synthesize
from dfq_jax.optim.steps import Now
from dfq_jax.recipes.aac import aac
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.synthesis.recipe import balanced_labels
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.sources.pixels import from_natural
from dfq_jax.synthesis.terms.targets import batch_norm_targets

KEY = jax.random.key(0)


def test_the_objective_by_hand(tiny_net, nets):
    """Cross-entropy less a tenth of the class's score, where nothing else counts."""
    recipe = aac(statistics=0.0, variation=0.0)
    x, labels = nets.images(tiny_net, 6), balanced_labels(KEY, 6, 5)
    targets, _ = batch_norm_targets(tiny_net)
    now = Now(KEY, jnp.zeros((), jnp.int32))
    context = Context(tiny_net, targets, (), labels)
    loss, (parts, _) = jax.jit(build_objective(recipe))(x, context, now)
    scores = nets.forward(tiny_net, from_natural(x, tiny_net.contract))["fc"]
    hot = np.asarray(labels).argmax(1)
    rows = np.arange(6)
    entropy, response = -log_softmax(scores, axis=1)[rows, hot].mean(), scores[rows, hot].mean()
    assert parts["response"] == pytest.approx(response, rel=1e-4)
    assert loss == pytest.approx(entropy - 0.1 * response, rel=1e-4)


def test_its_images_reach_higher_peaks_than_matching_ones(tiny_net, nets):
    """In most tensors, those of `zeroq` stay below."""
    make = lambda recipe: synthesize_images(tiny_net, recipe, 16, key=KEY).images
    loud = make(aac(steps=100, batch=16, statistics=0.01))
    calm = make(zeroq(steps=100, batch=16))
    peaks = lambda x: {k: v.max() for k, v in nets.forward(tiny_net, x).items() if "relu" in k}
    high, low = peaks(loud), peaks(calm)
    assert sum(high[k] > low[k] for k in high) > len(high) / 2
    assert high["relu4"] > low["relu4"]


def test_activation_ranges_end_at_what_they_show(nets, monkeypatch):
    """By `dfq.quantize` too: statistics widen no range."""
    model, peaks, real = nets.stem(), [], grids.dfq

    def watched(*args, **how):
        peaks.append(how["peaks"])
        return real(*args, **how)

    monkeypatch.setattr(grids, "dfq", watched)
    images = synthesize(model, "aac", 8, steps=2)
    dfq_jax.quantize(model, images)
    others = dataclasses.replace(images, evidence="statistics")
    dfq_jax.quantize(model, others)
    assert len(peaks[0]) == 6  # a quarter is held out
    assert peaks[1] is None
