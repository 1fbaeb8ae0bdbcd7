import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from dfq_jax.errors import UsageError
from dfq_jax.graph.rewrite import with_params
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.steps import Now
from dfq_jax.recipes.deepinversion import (
    CIFAR_WEIGHTS,
    TermWeights,
    deepinversion,
    deepinversion_cifar,
)
from dfq_jax.synthesis.recipe import random_labels
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.sources.pixels import from_natural
from dfq_jax.synthesis.terms.base import Term, total_variation
from dfq_jax.synthesis.terms.match import batch_moments, batch_var_gap, matched, norms
from dfq_jax.synthesis.terms.rival import reads_half_the_size
from dfq_jax.synthesis.terms.targets import Target, batch_norm_targets, observe
from dfq_jax.types import InputContract

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model(nets):
    return nets.stem(seed=1)


def parts_of(recipe, model, x, shared=()):
    """The objective of a recipe's last stage at `x`, and its parts."""
    targets, _ = batch_norm_targets(model)
    context = Context(model, targets, shared, recipe.condition(KEY, len(x), 5))
    now = Now(KEY, jnp.zeros((), jnp.int32))
    objective = build_objective(recipe, recipe.stages[-1])
    loss, (parts, _) = jax.jit(objective)(x, context, now)
    return float(loss), {k: float(v) for k, v in parts.items()}


def still(**changes):
    """A recipe that shows the network the images as they are."""
    return deepinversion(resolution="full", reach=0, mirror=False, bounded=False, **changes)


def test_objective_against_numpy(model, nets):
    x = nets.images(model, 4)
    seen = nets.forward(model, x)
    labels = np.asarray(random_labels(KEY, 4, 5))
    wanted = {"CE": -(labels * log_softmax(seen["fc"], axis=1)).sum(1).mean()}
    wanted["R_feature"] = 0.0
    for factor, name, source in [(10, "bn1", "conv1"), (1, "bn2", "conv2")]:
        bn = model.params[name]
        mean, var = seen[source].mean((0, 1, 2)), seen[source].var((0, 1, 2))
        gap = np.linalg.norm(mean - bn["mean"]) + np.linalg.norm(var - bn["var"])
        wanted["R_feature"] += factor * gap
    x64 = np.asarray(x, np.float64)
    wanted["R_TV"] = sum(
        np.linalg.norm(x64[:, a:][:, : 6 - a, c : 6 - d] - x64[:, : 6 - a, d : 6 - c])
        for a, c, d in [(1, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 1)]
    )
    wanted["R_l2"] = np.linalg.norm(x64.reshape(4, -1), axis=1).mean()
    loss, parts = parts_of(still(), model, x)
    assert set(parts) == set(wanted)
    for name, value in wanted.items():
        assert parts[name] == pytest.approx(value, rel=1e-4), name
    weights = {"CE": 1, "R_feature": 0.01, "R_TV": 1e-4, "R_l2": 1e-5}
    assert loss == pytest.approx(sum(w * wanted[k] for k, w in weights.items()), rel=1e-4)


def test_statistics_of_the_batch_itself_cost_nothing_in_any_order(model, nets, scenes):
    x = nets.images(model, 4)
    targets, _ = batch_norm_targets(model)
    stats = jax.jit(lambda x: observe(model, targets, x).stats)
    value = jax.jit(matched(batch_var_gap, norms, first=10.0))
    scene = scenes.observed(stats=stats(x), targets=targets)
    own = {k: Target(*batch_moments(s), targets[k].usable) for k, s in scene.stats.items()}
    floor = (10 + 1) * 2e-6  # of the square roots
    assert float(value(scene._replace(targets=own))) == pytest.approx(floor, abs=1e-6)
    shuffled = scene._replace(stats=stats(x[jnp.array([2, 0, 3, 1])]))
    assert float(value(shuffled)) == pytest.approx(float(value(scene)), rel=1e-5)
    assert float(value(scene)) > 0.1


def test_variation_of_flat_images_and_of_one_bright_pixel():
    variation = jax.jit(total_variation)
    flat = jnp.full((2, 5, 5, 3), 0.7)
    assert float(variation(flat)) == pytest.approx(4e-3, rel=1e-5)  # the floor of the roots
    assert not np.asarray(jax.grad(total_variation)(flat)).any()
    bright = flat.at[1, 2, 2, 0].add(3.0)
    assert float(variation(bright)) == pytest.approx(4 * 2**0.5 * 3, rel=1e-4)


def test_competition_with_the_student(model, nets):
    x = nets.images(model, 4)
    other = nets.stem(seed=2)
    p, q = (softmax(nets.forward(m, x)["fc"] / 3, axis=1) for m in (other, model))
    mean = (p + q) / 2
    wanted = 1 - 0.5 * np.sum(p * np.log(p / mean) + q * np.log(q / mean), axis=1).mean()
    recipe = still(student=other)
    found = {}
    for name, student in [("other", other), ("same", model)]:
        _, parts = parts_of(recipe, model, x, shared=student)
        found[name] = parts["R_compete"]
    assert found["other"] == pytest.approx(wanted, rel=1e-4)
    assert found["other"] < 0.999
    assert found["same"] == pytest.approx(1, abs=1e-6)
    p, q, mean = (np.clip(v, 0.01, 0.99) for v in (p, q, mean))
    wanted = 1 - 0.5 * np.sum(mean * np.log(mean**2 / (p * q)), axis=1).mean()
    _, parts = parts_of(still(student=other, variant="code"), model, x, shared=other)
    assert parts["R_compete"] == pytest.approx(wanted, rel=1e-4)


def test_a_student_reads_images_its_own_way(model, nets):
    """The same network behind another normalisation says the same."""
    contract = InputContract(6, 6, (0.5, 0.4, 0.3), (0.5, 0.25, 1.0))
    same = dataclasses.replace(nets.stem(seed=2), inputs=(contract,))
    student = nets.stem(seed=2)
    x, recipe = nets.images(model, 4), still(student=student)
    twisted = parts_of(recipe, model, x, shared=same)[1]["R_compete"]
    shown = from_natural(x, contract)
    p, q = nets.forward(student, shown)["fc"], nets.forward(model, x)["fc"]
    p, q = softmax(p / 3, axis=1), softmax(q / 3, axis=1)
    mean = (p + q) / 2
    wanted = 1 - 0.5 * np.sum(p * np.log(p / mean) + q * np.log(q / mean), axis=1).mean()
    assert twisted == pytest.approx(wanted, rel=1e-4)


def test_networks_disagree_more_where_it_pays(model, nets):
    weights, apart = CIFAR_WEIGHTS._replace(statistics=0.1, compete=1e3), []
    recipe = deepinversion_cifar(
        steps=20, batch=6, learning_rate=0.25, student=nets.stem(seed=2), weights=weights
    )
    note = lambda p: apart.append(1 - p.parts["R_compete"])
    synthesize_images(model, recipe, 6, KEY, chunk=1, watch=Watcher(progress=note))
    assert apart[-1] > 4 * apart[0] > 0


def test_half_the_size_then_all_of_it(model):
    """Two thirds of the steps; possible pixels at every one of them, and in the result."""
    shapes, ends = [], []

    def shown(o):
        shapes.append(o.images.shape)
        jax.debug.callback(lambda *v: ends.append(v), o.images.min(), o.images.max())
        return -30 * jnp.mean(o.natural[:, :, :2])  # not everywhere, or images would be blank

    recipe = deepinversion(steps=6, batch=2, learning_rate=9.0, reach=0)
    recipe = recipe._replace(terms=(*recipe.terms, Term("brighter", 1.0, shown)))
    seen = []
    made = synthesize_images(model, recipe, 2, KEY, watch=Watcher(progress=seen.append))
    assert list(dict.fromkeys(shapes)) == [(2, 3, 3, 3), (2, 6, 6, 3)]
    assert [p.step for p in seen] == [4, 6]
    assert [s.steps for s in recipe.stages] == [4, 2]
    jax.effects_barrier()
    low, high = model.contract.value_range
    assert len(ends) == 6
    for least, most in [*ends, (made.images.min(), made.images.max())]:
        assert float(least) >= low - 1e-5
        assert float(most) <= high + 1e-5
    assert float(made.images.max()) == pytest.approx(high, rel=1e-5)


def test_stages_of_few_steps_and_of_networks_with_one_size(nets):
    assert [s.steps for s in deepinversion(steps=1).stages] == [1]
    assert [s.steps for s in deepinversion(resolution="full", steps=7).stages] == [7]
    assert [s.steps for s in deepinversion_cifar().stages] == [2000]
    fixed = nets.shuffle()
    with pytest.raises(UsageError, match=r'images of 4x4, half its size .*resolution="full"'):
        synthesize_images(fixed, deepinversion(steps=3), 2, KEY)
    assert deepinversion(resolution="full").prepare(fixed, {}, KEY) == ()
    reads_half_the_size(nets.tiny())


def test_students_that_do_not_fit_are_refused(model, nets):
    larger = nets.tiny()
    with pytest.raises(UsageError, match=r"the student must read the images .*\(8, 8, 3\), 5"):
        deepinversion(student=larger).prepare(model, {}, KEY)
    assert deepinversion(student=model).prepare(model, {}, KEY) is model


def recognised(model, recipe, images):
    """The share of a first batch whose label the network names."""
    label_key = jax.random.split(jax.random.fold_in(KEY, 0), 3)[1]
    logits = np.asarray(jax.jit(lambda x: observe(model, {}, x).logits)(images))
    labels = np.asarray(recipe.condition(label_key, *logits.shape))
    np.testing.assert_array_equal(labels.sum(0), len(images) / logits.shape[1])
    return np.mean(logits.argmax(1) == labels.argmax(1))


def test_the_network_recognises_its_images(tiny_net, nets):
    """Of a network whose class k is an unusually strong feature k."""
    pool = nets.forward(tiny_net, nets.images(tiny_net, 64))["pool"]
    kernel = np.eye(8, 5, dtype=np.float32) * 4 / pool.std(0, keepdims=True).T
    bias = -pool.mean(0) @ kernel
    fc = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    model = with_params(tiny_net, {"fc": fc})
    weights = CIFAR_WEIGHTS._replace(statistics=0.1)
    recipe = deepinversion_cifar(steps=60, batch=20, learning_rate=0.2, reach=1, weights=weights)
    made = synthesize_images(model, recipe, 20, KEY, chunk=60)
    assert recognised(model, recipe, made.images) >= 0.95
    noise = nets.images(model, 20)
    assert recognised(model, recipe, noise) < 0.5


@pytest.mark.slow
def test_a_trained_network_recognises_its_images(resnet20):
    """500 steps suffice; here for six images of each class of CIFAR-10."""
    recipe = deepinversion_cifar(steps=500, batch=60)
    jax.config.update("jax_disable_most_optimizations", False)
    made = synthesize_images(resnet20.model, recipe, 60, KEY, chunk=50)
    assert recognised(resnet20.model, recipe, made.images) >= 0.95


def test_rates_of_a_stage_rise_and_fall():
    """Adam's first step has the size of the rate: a hundredth of it, times the factor."""
    recipe = deepinversion(resolution="full", steps=300)
    one = jnp.ones(())
    for factor in (1.0, 0.5):
        rule = recipe.stages[0].optimizer(factor)
        with jax.numpy_dtype_promotion("standard"):
            state, sizes = rule.init(one), []
            step = jax.jit(rule.update)
            for _ in range(300):
                update, state = step(one, state)
                sizes.append(-float(jnp.asarray(update)))
        assert sizes[0] == pytest.approx(0.0025 * factor, rel=1e-3)
        assert sizes[99] == pytest.approx(0.25 * factor, rel=1e-3)
        assert sizes[-1] < 1e-3 * factor


def test_settings():
    recipe = deepinversion()
    assert (recipe.name, recipe.batch, recipe.steps, recipe.bounded) == (
        "deepinversion",
        84,
        3000,
        True,
    )
    assert recipe.settings["weights"] == TermWeights()._asdict()
    small = deepinversion_cifar(reach=3)
    assert (small.batch, small.steps, small.bounded) == (256, 2000, False)
    wanted = {"CE": 1, "R_feature": 10, "R_TV": 2.5e-5, "R_l2": 0}
    assert {t.name: t.weight for t in small.terms} == wanted
    assert small.settings["reach"] == 3
    assert [t.name for t in small.terms if t.classes] == ["CE"]
