import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.synthesis.terms.slack import slack_margins
from dfq_jax.synthesis.terms.targets import batch_norm_targets

KEY = jax.random.key(3)
SOURCES = {"bn1": "conv1", "bn2": "depthwise", "bn3": "project", "bn4": "conv2"}


@pytest.fixture(scope="module")
def margins(tiny_net):
    targets, _ = batch_norm_targets(tiny_net)
    find = lambda **how: slack_margins(tiny_net, targets, KEY, **{"count": 6, "batch": 3, **how})
    return find


def test_quantiles_of_the_gaps_of_noise(tiny_net, nets, margins):
    noise = [jax.random.normal(k, (3, 8, 8, 3)) for k in jax.random.split(KEY, 2)]
    truth = nets.forward(tiny_net, jnp.concatenate(noise))
    found = margins(quantile=0.7)
    assert set(found) == set(SOURCES)
    for norm, source in SOURCES.items():
        x, bn = truth[source], tiny_net.params[norm]
        mean = x.mean((1, 2)).mean(0)
        std = np.sqrt(x.var((1, 2), ddof=1) + 1e-6).mean(0)
        delta = np.quantile(np.abs(mean - np.asarray(bn["mean"])), 0.7)
        gamma = np.quantile(np.abs(std - np.sqrt(np.asarray(bn["var"]) + 1e-6)), 0.7)
        assert float(found[norm][0]) == pytest.approx(delta, rel=1e-3, abs=1e-5)
        assert float(found[norm][1]) == pytest.approx(gamma, rel=1e-3, abs=1e-5)


def test_tolerances_grow_with_the_quantile(margins):
    levels = [margins(quantile=q) for q in (0.3, 0.9, 1.0)]
    for low, high in itertools.pairwise(levels):
        for name in SOURCES:
            assert all(float(a) < float(b) for a, b in zip(low[name], high[name], strict=True))


def test_few_noise_images_make_one_small_batch(margins):
    small, same = margins(count=3, batch=32), margins(count=3, batch=3)
    for name in SOURCES:
        assert float(small[name][0]) == float(same[name][0]) > 0


def test_whole_batches_are_drawn(margins):
    """Seven images in batches of three need three batches."""
    assert float(margins(count=7)["bn1"][0]) == float(margins(count=9)["bn1"][0])
    assert float(margins(count=7)["bn1"][0]) != float(margins(count=6)["bn1"][0])


@pytest.mark.parametrize("quantile", [0.0, 1.01])
def test_quantile_must_be_one(quantile, margins):
    with pytest.raises(ValueError, match=rf"needs 0 < quantile <= 1, got {quantile}"):
        margins(quantile=quantile)
