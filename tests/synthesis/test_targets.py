import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.rewrite import with_params
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.synthesis.terms.targets import (
    Unusable,
    batch_norm_targets,
    distrusted_norms,
    observe,
    recorded_statistics,
    sample_stats,
)


def changed(model, name, **slots):
    return with_params(model, {name: {k: jnp.asarray(v, jnp.float32) for k, v in slots.items()}})


def test_healthy_network(tiny_net):
    targets, excluded = batch_norm_targets(tiny_net)
    assert excluded == ()
    assert list(targets) == ["bn1", "bn2", "bn3", "bn4"]
    for name, target in targets.items():
        np.testing.assert_array_equal(target.mean, tiny_net.params[name]["mean"])
        np.testing.assert_array_equal(target.var, tiny_net.params[name]["var"])
        assert np.all(np.asarray(target.usable))


def test_channels_without_a_variance_are_masked(tiny_net):
    var = [0.0, -1.0, np.nan, np.inf, 1.0, 2.0]
    model = changed(tiny_net, "bn2", var=var)
    model = changed(model, "bn1", mean=[0.0, np.nan, 0.0, 0.0, 0.0, 0.5])
    targets, excluded = batch_norm_targets(model)
    assert targets["bn2"].usable.tolist() == [False] * 4 + [True] * 2
    assert targets["bn2"].var.tolist() == [1, 1, 1, 1, 1, 2]
    assert targets["bn1"].usable.tolist() == [True, False, True, True, True, True]
    for target in targets.values():
        assert np.isfinite(np.concatenate([target.mean, target.var])).all()
    assert [(e.node, e.channels, e.of) for e in excluded] == [("bn1", 1, 6), ("bn2", 4, 6)]
    assert str(excluded[1]) == "bn2: 4 of 6 channels excluded (variance not positive)"


def test_layers_never_trained_or_without_channels_are_dropped(tiny_net):
    model = changed(tiny_net, "bn2", mean=np.zeros(6), var=np.ones(6))
    model = changed(model, "bn3", var=np.zeros(6))
    targets, excluded = batch_norm_targets(model)
    assert list(targets) == ["bn1", "bn4"]
    assert excluded == (
        Unusable("bn2", 6, 6, "never updated in training"),
        Unusable("bn3", 6, 6, "variance not positive"),
    )


def test_zero_means_alone_do_not_mean_untrained(tiny_net):
    model = changed(tiny_net, "bn2", mean=np.zeros(6))
    assert "bn2" in batch_norm_targets(model)[0]


def test_nothing_left(tiny_net):
    model = tiny_net
    for name, size in [("bn1", 6), ("bn2", 6), ("bn3", 6), ("bn4", 8)]:
        model = changed(model, name, mean=np.zeros(size), var=np.ones(size))
    message = "not available for this network: it has 4 batch norms, none with usable .*`images=`"
    with pytest.raises(UnsupportedModelError, match=message):
        batch_norm_targets(model)
    with pytest.raises(UnsupportedModelError, match="it has 0 batch norms, none with usable"):
        batch_norm_targets(fold_batch_norm(tiny_net))
    targets, excluded = recorded_statistics(model)
    assert targets == {}
    assert [e.node for e in excluded] == ["bn1", "bn2", "bn3", "bn4"]
    assert distrusted_norms(model) == {"bn1", "bn2", "bn3", "bn4"}


def test_norms_are_distrusted_only_as_a_whole(tiny_net):
    assert distrusted_norms(tiny_net) == frozenset()
    model = changed(tiny_net, "bn2", mean=np.zeros(6), var=np.ones(6))
    model = changed(model, "bn3", var=[0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert distrusted_norms(model) == {"bn2"}


@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 7, 6), (4, 6)])
def test_sample_statistics(shape):
    rng = np.random.default_rng(0)
    centre = rng.normal(size=6) * 100
    x = rng.normal(size=shape) * rng.uniform(0.1, 2, 6) + centre + 0.3
    stats = sample_stats(jnp.asarray(x, jnp.float32), jnp.asarray(centre, jnp.float32))
    flat = x.reshape(shape[0], -1, 6)
    assert stats.positions == flat.shape[1]
    np.testing.assert_allclose(stats.mean, flat.mean(1), rtol=1e-5)
    np.testing.assert_allclose(stats.var, flat.var(1), rtol=1e-3, atol=1e-6)


def test_observe_reads_the_inputs_of_batch_norms(tiny_net, nets):
    targets, _ = batch_norm_targets(tiny_net)
    x = nets.images(tiny_net, 3)
    logits, stats, _ = jax.jit(lambda m, t, x: observe(m, t, x))(tiny_net, targets, x)
    truth = nets.forward(tiny_net, x)
    np.testing.assert_allclose(logits, truth["fc"], rtol=1e-4, atol=1e-5)
    sources = {"bn1": "conv1", "bn2": "depthwise", "bn3": "project", "bn4": "conv2"}
    for norm, source in sources.items():
        np.testing.assert_allclose(stats[norm].mean, truth[source].mean((1, 2)), atol=1e-5)
        np.testing.assert_allclose(stats[norm].var, truth[source].var((1, 2)), rtol=1e-4, atol=1e-5)
    only = {"bn3": targets["bn3"]}
    assert set(observe(tiny_net, only, x[:1]).stats) == {"bn3"}
