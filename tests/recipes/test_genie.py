from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.state import StateStore
from dfq_jax.optim.steps import Now
from dfq_jax.recipes.genie import genie
from dfq_jax.synthesis.recipe import Stage
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.sources.generator import generated
from dfq_jax.synthesis.terms.targets import batch_norm_targets, observe
from dfq_jax.types import InputContract

KEY = jax.random.key(1)
SMALL = {"latent": 16, "channels": (8, 6)}


@pytest.fixture(scope="module")
def model(nets):
    """Two batch norms, two strided convolutions, 8x8 pixels."""
    b = nets.Builder(InputContract(8, 8), 1)
    x = b.unit("stem", "images", 4, stride=2)
    x = b.unit("block", x, 5, stride=2)
    return b.done(b.linear("fc", b.op("pool", nets.GlobalAvgPool(), x), 5))


@pytest.fixture(scope="module")
def variables():
    """Those that a run with KEY starts from."""
    key = jax.random.split(jax.random.fold_in(KEY, 0), 3)[0]
    return genie(**SMALL).source.init(key, (6, 8, 8, 3))


@pytest.fixture(scope="module")
def look(model):
    """reach -> compiled (variables, key) -> ((loss, parts), slope)."""
    context = Context(model, batch_norm_targets(model)[0], (), ())

    @cache
    def compiled(reach):
        objective = build_objective(genie(reach=reach, **SMALL))

        def loss(x, key):
            total, (parts, _) = objective(x, context, Now(key, jnp.zeros((), jnp.int32)))
            return total, parts

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    return compiled


def numpy_terms(nets, model, images):
    """Both terms in double precision, as the card writes them; no swing."""
    x = np.asarray(images, np.float64)
    mean, std = x.mean((1, 2)), x.std((1, 2), ddof=1)
    image = ((mean**2).sum() + ((std - 1) ** 2).sum()) / len(x)
    tensors, match = nets.forward(model, x), 0.0
    for node in model.graph.nodes:
        if isinstance(node.op, nets.BatchNorm):
            v, bn = tensors[node.inputs[0]], model.params[node.name]
            wanted = np.sqrt(np.asarray(bn["var"], np.float64) + 1e-6)
            gaps = (v.mean((0, 1, 2)) - np.asarray(bn["mean"], np.float64)) ** 2
            gaps += (v.std((0, 1, 2), ddof=1) - wanted) ** 2
            match += gaps.sum() / len(gaps)
    return match, image


def test_objective_against_numpy(model, nets, variables, look):
    (total, parts), _ = look(0)(variables, KEY)
    match, image = numpy_terms(nets, model, jax.jit(generated)(variables))
    assert float(parts["BNS"]) == pytest.approx(match, rel=1e-4)
    assert float(parts["image"]) == pytest.approx(image, rel=1e-4)
    assert float(total) == pytest.approx(match + image, rel=1e-4)


def test_network_swings_and_generator_does_not(variables, look):
    (_, still), _ = look(0)(variables, KEY)
    parts = [look(1)(variables, jax.random.key(i))[0][1] for i in range(5)]
    assert len({float(p["BNS"]) for p in parts}) > 1
    for p in parts:
        assert float(p["image"]) == pytest.approx(float(still["image"]), rel=1e-6)


def test_both_learn(variables, look):
    _, slope = look(1)(variables, KEY)
    assert np.linalg.norm(slope["latent"]) > 1e-3
    for name in ("project", "conv1", "conv2"):
        assert np.linalg.norm(np.ravel(slope["generator"][name]["kernel"])) > 1e-3


def test_every_image_has_to_be_normal(scenes):
    """Two images that are right on average are not right."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 6, 3))
    x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), ddof=1, keepdims=True)
    term = genie().terms[1]
    assert (term.name, term.weight) == ("image", 1.0)
    assert float(term.fn(scenes.observed(images=x))) < 1e-8
    shifted = x * 0.6**0.5 + np.array([1, -1]).reshape(2, 1, 1, 1) * 0.4**0.5
    assert np.abs(shifted.mean((0, 1, 2))).max() < 1e-6
    assert np.abs(shifted.std((0, 1, 2)) - 1).max() < 0.02
    apart = 3 * (0.4 + (1 - 0.6**0.5) ** 2)
    assert float(term.fn(scenes.observed(images=shifted))) == pytest.approx(apart, rel=1e-4)


def test_width_of_a_layer_does_not_count(scenes):
    rng = np.random.default_rng(1)
    x, mean, var = rng.normal(size=(3, 4, 4, 5)), rng.normal(size=5), rng.uniform(0.5, 2, 5)
    term = genie().terms[0]
    assert (term.name, term.weight) == ("BNS", 1.0)

    def value(copies):
        wide = lambda v: np.concatenate([v] * copies, -1)
        targets = {"bn": scenes.target(wide(mean), wide(var))}
        return float(
            term.fn(scenes.observed(stats={"bn": scenes.stats_of(wide(x))}, targets=targets))
        )

    gaps = (x.mean((0, 1, 2)) - mean) ** 2
    gaps += (x.std((0, 1, 2), ddof=1) - np.sqrt(var + 1e-6)) ** 2
    assert value(1) == pytest.approx(gaps.mean(), rel=1e-4)
    assert value(2) == pytest.approx(value(1), rel=1e-5)


def test_loss_falls(model, variables, look):
    """More than fivefold, though the network swings to the end."""
    seen = []
    recipe = genie(steps=1000, batch=6, **SMALL)
    made = synthesize_images(model, recipe, 6, KEY, chunk=10, watch=Watcher(progress=seen.append))
    start = np.mean([look(1)(variables, jax.random.key(i))[0][0] for i in range(5)])
    assert start > 5 * np.mean([p.parts["loss"] for p in seen[-20:]])
    images = np.asarray(made.images)
    assert images.shape == (6, 8, 8, 3)
    assert np.abs(images.mean((0, 1, 2))).max() < 1e-4
    assert np.abs(images.std((0, 1, 2)) - 1).max() < 1e-2


def only_generator(recipe, rate):
    """The same recipe with latent codes that stay as they were drawn."""
    rules: Any = {"latent": optax.set_to_zero(), "generator": optax.adam(rate)}
    frozen = optax.partition(rules, {name: name for name in rules})
    return recipe._replace(stages=(Stage(recipe.steps, lambda scale: frozen),))


def test_learned_codes_match_better(tiny_net, scenes):
    """Judged without swing; the generator learns too slowly to do without them."""
    targets, _ = batch_norm_targets(tiny_net)
    recipe = genie(steps=100, batch=16, generator_rate=1e-4, **SMALL)
    look = jax.jit(lambda images: observe(tiny_net, targets, images).stats)

    def held_out(recipe):
        images = synthesize_images(tiny_net, recipe, 32, KEY, chunk=100).images
        stats = [look(batch) for batch in jnp.split(images, 2)]
        seen = (scenes.observed(stats=each, targets=targets) for each in stats)
        return np.mean([float(recipe.terms[0].fn(o)) for o in seen])

    assert held_out(recipe) < 0.7 * held_out(only_generator(recipe, 1e-4))


def test_rates_fall_as_published():
    """Adam's steps under a constant slope have the size of the rate."""
    for factor in (1.0, 0.5):
        rule = optax.with_extra_args_support(genie().stages[0].optimizer(factor))
        ones = {"latent": jnp.ones(()), "generator": {"kernel": jnp.ones(())}}
        state = rule.init(ones)

        @jax.jit
        def steps(state, rule=rule, ones=ones):
            def one(state, _):
                update, state = rule.update(ones, state, ones, value=jnp.ones(()))
                return state, update

            return jax.lax.scan(one, state, length=450)[1]

        with jax.numpy_dtype_promotion("standard"):
            moves = steps(state)
        latent, generator = (
            -np.asarray(v) for v in (moves["latent"], moves["generator"]["kernel"])
        )
        steps_done = np.arange(450)
        wanted = factor * 0.01 * 0.95 ** (steps_done // 100)
        np.testing.assert_allclose(generator, wanted, rtol=1e-3)
        cuts = np.maximum(steps_done - 1, 0) // 101
        np.testing.assert_allclose(latent, np.maximum(factor * 0.1 * 0.1**cuts, 1e-4), rtol=1e-3)


def test_state_of_both_optimizers_is_kept(variables, tmp_path):
    optimizer = genie().stages[0].optimizer(1.0)
    fresh = optimizer.init(variables)
    moved = jax.tree.map(lambda v: v + 1, fresh)
    store = StateStore(tmp_path, {}, every_seconds=0.0)
    store.save(1, moved)
    found = store.load(fresh)
    assert jax.tree.structure(found) == jax.tree.structure(fresh)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sizes_it_cannot_make(nets):
    message = r"genie: the generator makes images of sizes divisible by 4.*reads 6x6 pixels.*224"
    with pytest.raises(UsageError, match=message):
        synthesize_images(nets.stem(), genie(steps=1), 1, KEY)


def test_settings():
    recipe = genie()
    assert (recipe.name, recipe.steps, recipe.batch) == ("genie", 4000, 128)
    assert not recipe.bounded
    assert recipe.distort is not None
    still = genie(steps=7, batch=3, reach=0, **SMALL)
    assert (still.steps, still.batch, still.distort) == (7, 3, None)
    assert still.settings == {
        "latent_rate": 0.1,
        "generator_rate": 0.01,
        "reach": 0,
        "latent": 16,
        "channels": [8, 6],
    }
