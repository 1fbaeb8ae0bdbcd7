import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import GlobalAvgPool
from dfq_jax.graph.rewrite import with_params
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.steps import Now
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.recipes.knowledge_within import knowledge_within
from dfq_jax.synthesis.recipe import random_labels
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.sources.augment import unchanged
from dfq_jax.synthesis.sources.pixels import gaussian, pink
from dfq_jax.synthesis.terms.match import matched_kl
from dfq_jax.synthesis.terms.targets import batch_norm_targets, observe
from dfq_jax.types import InputContract

KEY = jax.random.key(0)
SHAPE = (96, 8, 8, 3)


@pytest.fixture(scope="module")
def real():
    """Three sets of images with the spectrum of photographs, each channel of its own strength."""
    strength, shift = np.array([1.2, 0.7, 0.4]), np.array([0.3, -0.2, 0.5])
    return [np.asarray(pink(jax.random.key(i), SHAPE)) * strength + shift for i in range(3)]


@pytest.fixture(scope="module")
def pair(nets, real):
    """Two networks of different weights, whose batch norms recorded different real images."""

    def recorded(seed, images):
        b = nets.Builder(InputContract(8, 8), seed)
        b.seen["images"] = images
        x = b.unit("two", b.unit("one", "images", 8), 8, stride=2)
        return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))

    return recorded(0, real[0]), recorded(1, real[1])


@pytest.fixture(scope="module")
def score(scenes):
    """How far images are from what a network recorded."""

    @jax.jit
    def score(model, targets, images):
        stats = observe(model, targets, images).stats
        return matched_kl()(scenes.observed(stats=stats, targets=targets))

    return lambda model, images: float(
        score(model, batch_norm_targets(model)[0], jnp.asarray(images, jnp.float32))
    )


def test_real_images_are_closer_than_synthetic_ones_and_these_closer_than_noise(pair, real, score):
    """Made for one network, judged by the other: neither the weights nor the images are shared."""
    own, judge = pair
    seen = []
    recipe = knowledge_within(steps=80, batch=96)
    made = synthesize_images(own, recipe, 96, KEY, chunk=40, watch=Watcher(progress=seen.append))
    noise = gaussian(jax.random.key(7), SHAPE)
    scores = [score(judge, v) for v in (real[2], made.images, noise)]
    assert scores[0] < 0.7 * scores[1]
    assert scores[1] < 0.7 * scores[2]
    assert score(own, made.images) < 0.1 * score(own, noise)
    assert seen[-1].parts["BNS"] < 0.1 * seen[0].parts["BNS"] + 0.1


def parts_of(recipe, model, x):
    """The objective of a recipe at `x` and its parts."""
    targets, _ = batch_norm_targets(model)
    context = Context(model, targets, (), recipe.condition(KEY, len(x), 5))
    now = Now(KEY, jnp.zeros((), jnp.int32))
    loss, (parts, _) = jax.jit(build_objective(recipe))(x, context, now)
    return float(loss), {k: float(v) for k, v in parts.items()}


def test_objective_against_numpy(pair, nets):
    model = pair[0]
    x = nets.images(model, 4)
    seen, channels = nets.forward(model, x), []
    for name, source in [("one.bn", "one"), ("two.bn", "two")]:
        bn = {k: np.asarray(v, np.float64) for k, v in model.params[name].items()}
        mean, var = seen[source].mean((0, 1, 2)), seen[source].var((0, 1, 2))
        ratio = (bn["var"] + (bn["mean"] - mean) ** 2) / var
        channels.append(np.log(np.sqrt(var / bn["var"])) - 0.5 * (1 - ratio))
    labels = np.asarray(random_labels(KEY, 4, 5))
    entropy = -(labels * log_softmax(seen["fc"], axis=1)).sum(1).mean()
    loss, parts = parts_of(knowledge_within(scheme="both", reach=0), model, x)
    assert parts["BNS"] == pytest.approx(np.concatenate(channels).mean(), rel=1e-4)
    assert parts["CE"] == pytest.approx(entropy, rel=1e-4)
    assert loss == pytest.approx(parts["BNS"] + 0.1 * parts["CE"], rel=1e-5)


def test_collapsed_channels_are_held_back_but_keep_their_slope(pair):
    """Flat images have no variance: without the limit their channels would count millions."""
    model = pair[0]
    flat = jnp.zeros((4, 8, 8, 3)) + jnp.linspace(0, 1e-3, 8)[:, None, None]
    assert parts_of(knowledge_within(limit=1e30), model, flat)[0] > 1e4
    held, _ = parts_of(knowledge_within(), model, flat)
    assert 1e2 < held < 1e4
    recipe, targets = knowledge_within(), batch_norm_targets(model)[0]
    context = Context(model, targets, (), random_labels(KEY, 4, 5))
    now = Now(KEY, jnp.zeros((), jnp.int32))
    objective = build_objective(recipe)
    slope = jax.jit(jax.grad(lambda x: objective(x, context, now)[0]))(flat)
    assert np.isfinite(slope).all()
    assert np.asarray(slope).any()


def test_classes_alone_need_classes_and_no_statistics(pair, nets):
    recipe = knowledge_within(scheme="inception", steps=40, batch=5, learning_rate=0.2)
    fc = {"kernel": jnp.eye(8, 5) * 4, "bias": jnp.zeros(5)}  # class k is feature k
    folded = fold_batch_norm(with_params(pair[0], {"fc": fc}))
    seen = []
    made = synthesize_images(folded, recipe, 5, KEY, chunk=10, watch=Watcher(progress=seen.append))
    assert made.images.shape == (5, 8, 8, 3)
    assert seen[-1].parts["CE"] < 0.5 * seen[0].parts["CE"]
    assert set(seen[0].parts) == {"CE", "loss"}
    with pytest.raises(UnsupportedModelError, match=r'no classes apart.*Use scheme="bns"'):
        synthesize_images(nets.two_heads(), recipe, 2, KEY)


def test_settings():
    names = lambda r: {t.name: t.weight for t in r.terms}
    bns, classes, both = (knowledge_within(scheme=s) for s in ("bns", "inception", "both"))
    assert names(bns) == {"BNS": 1.0}
    assert names(classes) == {"CE": 1.0}
    assert names(both) == {"BNS": 1.0, "CE": 0.1}
    assert bns.stages[0].augment is unchanged
    assert both.stages[0].augment is not unchanged
    assert [t.classes for t in both.terms] == [False, True]
    assert (bns.name, bns.steps, bns.batch) == ("knowledge_within", 1000, 128)
    assert bns.settings["scheme"] == "bns"
    assert bns.source.init is gaussian
    rule, one = bns.stages[0].optimizer(0.5), jnp.ones(())
    with jax.numpy_dtype_promotion("standard"):
        update, _ = rule.update(one, rule.init(one))
    assert float(jnp.asarray(update)) == pytest.approx(-0.05, rel=1e-3)
