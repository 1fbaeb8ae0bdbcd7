import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import softmax

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.optim.steps import Now
from dfq_jax.recipes.intraq import intraq
from dfq_jax.synthesis.recipe import Memory
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.sources.augment import unchanged
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.classes import ClassMemory, SoftLabels
from dfq_jax.synthesis.terms.targets import batch_norm_targets

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model(nets):
    return nets.stem(seed=1)


def test_objective_against_numpy(model, nets):
    x = nets.images(model, 6)
    seen, rng = nets.forward(model, x), np.random.default_rng(0)
    matches = []
    for name, source in [("bn1", "conv1"), ("bn2", "conv2")]:
        bn = model.params[name]
        mean, var = seen[source].mean((0, 1, 2)), seen[source].var((0, 1, 2))
        matches.append(np.mean((mean - bn["mean"]) ** 2) + np.mean((var - bn["var"]) ** 2))
    own, confidence = np.array([0, 1, 2, 2, 4, 4]), rng.uniform(0.9, 1, 6)
    wanted = {"BNS": np.mean(matches)}
    wanted["SIL"] = np.mean((softmax(seen["fc"], axis=1)[np.arange(6), own] - confidence) ** 2)
    sums, counts = rng.uniform(size=(5, 5)), np.array([2.0, 0.0, 1.0, 3.0, 4.0])
    cost = []
    for feature, label in zip(seen["pool"], own, strict=True):
        if counts[label]:
            centre = sums[label] / counts[label]
            apart = 1 - feature @ centre / np.linalg.norm(feature) / np.linalg.norm(centre)
            cost.append(max(0.2 - apart, 0) + max(apart - 0.3, 0))
    wanted["MDC"] = np.mean(cost)
    recipe = intraq(crops=0.0, lower=0.2, upper=0.3)
    memory = ClassMemory(*(jnp.asarray(v, jnp.float32) for v in (sums, counts)))
    soft = SoftLabels(*(jnp.asarray(v, jnp.float32) for v in (np.eye(5)[own], confidence)))
    context = Context(model, batch_norm_targets(model)[0], (), soft)
    now = Now(KEY, jnp.zeros((), jnp.int32), memory)
    loss, (parts, kept) = jax.jit(build_objective(recipe))(x, context, now)
    assert len(cost) == 5
    assert set(parts) == set(wanted)
    for name, value in wanted.items():
        assert float(parts[name]) == pytest.approx(value, rel=1e-4), name
    assert float(loss) == pytest.approx(sum(wanted.values()), rel=1e-4)
    np.testing.assert_array_equal(kept.sums, memory.sums)  # only finished images are remembered


def test_batches_look_back_at_the_finished_images_of_all_before(model, nets):
    """What the third batch remembers, from the images of the first two."""
    memories = []

    def start(*given):
        return recipe.memory.start(*given)

    def batch(o):
        jax.debug.callback(lambda *v: memories.append(v), *o.memory, o.labels.labels)
        assert recipe.memory.batch is not None
        return recipe.memory.batch(o)

    recipe = intraq(steps=3, batch=4)
    watched = recipe._replace(memory=Memory(start=start, batch=batch))
    made = synthesize_images(model, watched, 12, KEY, chunk=3)
    jax.effects_barrier()
    features = nets.forward(model, made.images)["pool"]
    labels = np.concatenate([np.asarray(m[2]) for m in memories])
    assert len(memories) == 3
    for index, (sums, counts, _) in enumerate(memories):
        before = labels[: 4 * index]
        np.testing.assert_allclose(sums, before.T @ features[: 4 * index], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(counts, before.sum(0))


def shown_by(recipe, images, count=40):
    """What the network is shown at each of many steps."""
    keys = jax.random.split(KEY, count)
    return np.asarray(jax.lax.map(lambda k: recipe.stages[0].augment(k, images), keys))


def test_every_other_step_shows_crops():
    images = jax.random.normal(KEY, (3, 8, 8, 3))
    plain = [np.array_equal(v, images) for v in shown_by(intraq(), images)]
    assert 0.25 < np.mean(plain) < 0.75
    crops = shown_by(intraq(crops=1.0), images)
    assert not any(np.array_equal(v, images) for v in crops)
    assert intraq(crops=0.0).stages[0].augment is unchanged


@pytest.fixture(scope="module")
def apart(tiny_net, nets):
    """How a recipe's images of a class differ: mean cosine distance of features, two batches."""

    def apart(crops, lower):
        recipe = intraq(steps=60, batch=20, lower=lower, upper=2.0, crops=crops)
        made = synthesize_images(tiny_net, recipe, 40, KEY, chunk=60)
        features = nets.forward(tiny_net, made.images)["pool"]
        keys = [jax.random.split(jax.random.fold_in(KEY, i), 3)[1] for i in range(2)]
        labels = np.concatenate([np.argmax(recipe.condition(k, 20, 5)[0], axis=1) for k in keys])
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        same = (labels[:, None] == labels[None]) & ~np.eye(40, dtype=bool)
        return float((1 - unit @ unit.T)[same].mean())

    return apart


def test_images_of_a_class_differ_more_with_crops_and_with_a_margin(apart):
    plain = apart(crops=0.0, lower=0.0)
    assert apart(crops=0.5, lower=0.0) > 1.5 * plain
    assert apart(crops=0.0, lower=0.3) > 1.5 * plain


def test_without_a_margin_nothing_is_remembered(nets):
    """The released values for ImageNet; so networks without a linear layer will do."""
    off = intraq(lower=0.0, upper=2.0, target=1.0, steps=1, batch=2)
    assert [t.name for t in off.terms] == ["BNS", "SIL"]
    assert off.memory == Memory()
    assert off.watch(nets.unet().graph) == {}
    assert (off.condition(KEY, 9, 5).confidence == 1).all()
    with pytest.raises(UnsupportedModelError, match="lacks a final linear layer"):
        synthesize_images(nets.unet(), intraq(steps=1, batch=2), 2, KEY)
    assert intraq().watch(nets.stem().graph) == {"features": "fc"}


def test_settings():
    recipe = intraq()
    assert (recipe.name, recipe.steps, recipe.batch) == ("intraq", 1000, 256)
    wanted = {"lower": 0.05, "upper": 0.8, "target": 0.95, "smallest": 0.5, "crops": 0.5}
    assert recipe.settings == wanted | {"learning_rate": 0.5}
    assert [(t.name, t.weight, t.classes) for t in recipe.terms] == [
        ("BNS", 1.0, False),
        ("SIL", 1.0, True),
        ("MDC", 1.0, True),
    ]
    assert recipe.source.init is gaussian
    assert recipe.memory.batch is not None
    rule = optax.with_extra_args_support(recipe.stages[0].optimizer(1.0))
    one, sizes = jnp.ones(()), []
    with jax.numpy_dtype_promotion("standard"):
        state, step = rule.init(one), jax.jit(lambda s: rule.update(one, s, one, value=one))
        for _ in range(110):
            update, state = step(state)
            sizes.append(-float(jnp.asarray(update)))
    np.testing.assert_allclose(sizes[:52], 0.5, rtol=1e-3)  # patience 50
    np.testing.assert_allclose(sizes[52:103], 0.05, rtol=1e-3)
