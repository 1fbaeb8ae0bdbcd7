from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.steps import Now
from dfq_jax.recipes.fdda import fdda
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.terms.centres import Centre, ClassCentres, class_centres
from dfq_jax.synthesis.terms.targets import Stats, batch_norm_targets

KEY = jax.random.key(0)
LAYERS = ("bn1", "bn2")
alone = partial(fdda, mixed=False)
"""All images of one class."""


@pytest.fixture(scope="module")
def model(nets):
    return nets.stem(seed=1)


@pytest.fixture(scope="module")
def said(model, nets):
    """What the network says of the real images."""
    return nets.forward(model, nets.images(model, 4, seed=9))["fc"].argmax(1)


@pytest.fixture(scope="module")
def centres(model, nets, said):
    """One image for each of four of five classes, the first of which the network gets right."""
    labels = (said[0] + np.arange(4)) % 5
    found = class_centres(model, nets.images(model, 4, seed=9), jnp.asarray(labels, jnp.int32), 5)
    assert found.right[said[0]]
    assert 1 <= int(found.right.sum()) < int(found.seen.sum()) == 4
    return found


def labels_of(recipe, classes=5, batch=6):
    """The classes of many batches, all of one class each."""
    found = set()
    for i in range(40):
        labels = np.asarray(recipe.condition(jax.random.key(i), batch, classes))
        assert labels.shape == (batch, classes)
        np.testing.assert_array_equal(labels.sum(1), 1)
        assert len(set(labels.argmax(1))) == 1
        found.add(int(labels[0].argmax()))
    return found


def test_a_batch_is_of_one_reliable_class(centres):
    assert labels_of(alone(centres)) == set(np.flatnonzero(centres.right).tolist())
    assert labels_of(alone(centres, reliable=False)) == set(np.flatnonzero(centres.seen).tolist())


def test_classes_to_choose_from_are_needed(centres):
    nothing = centres._replace(right=jnp.zeros(5, bool))
    with pytest.raises(ValueError, match=r"fdda\(\) needs .* an image the network gets right, got"):
        alone(nothing)
    alone(nothing, reliable=False)
    with pytest.raises(ValueError, match=r"class with an image, got none"):
        alone(nothing._replace(seen=jnp.zeros(5, bool)), reliable=False)


def test_centres_of_another_network_are_refused(model, centres, nets):
    targets, _ = batch_norm_targets(model)
    assert alone(centres).prepare(model, targets, KEY) is centres.centres
    other = nets.tiny()
    with pytest.raises(ValueError, match=r"centres of 4 channels in the batch norm 'bn1'.* has 6"):
        alone(centres).prepare(other, batch_norm_targets(other)[0], KEY)
    renamed = centres._replace(centres={"bn7": centres.centres["bn1"]})
    with pytest.raises(ValueError, match=r"'bn7', where this network of .* has 0"):
        alone(renamed).prepare(model, targets, KEY)


@pytest.fixture(scope="module")
def at(model, centres):
    """(recipe, images, class) -> loss, its parts."""

    def call(recipe, x, label):
        labels = jax.nn.one_hot(jnp.full(len(x), label, jnp.int32), 5)
        context = Context(model, batch_norm_targets(model)[0], centres.centres, labels)
        now = Now(KEY, jnp.zeros((), jnp.int32))
        loss, (parts, _) = jax.jit(build_objective(recipe))(x, context, now)
        return float(loss), {k: float(v) for k, v in parts.items()}

    return call


def test_parts_against_numpy(at, model, centres, nets):
    x, label = nets.images(model, 6), 3
    seen = nets.forward(model, x)
    readers = {n.name: n.inputs[0] for n in model.graph.nodes}
    match = centred = 0.0
    for name in LAYERS:
        flat = seen[readers[name]].reshape(-1, seen[readers[name]].shape[-1])
        for kind, moment in (("mean", flat.mean(0)), ("var", flat.var(0))):
            match += ((moment - np.asarray(model.params[name][kind], float)) ** 2).mean() / 2
        for moment, centre in zip((flat.mean(0), flat.var(0)), centres.centres[name], strict=True):
            centred += ((moment - np.asarray(centre[label], float)) ** 2).mean() / 2
    scores = seen["fc"] - np.log(np.exp(seen["fc"]).sum(1, keepdims=True))
    loss, parts = at(alone(centres), x, label)
    assert parts["CE"] == pytest.approx(-scores[:, label].mean(), rel=1e-4)
    assert parts["BNS"] == pytest.approx(match, rel=1e-4)
    assert parts["C_BNS"] == pytest.approx(centred, rel=1e-4)
    weights = {"CE": 0.5, "BNS": 0.2, "D_BNS": 0.9, "C_BNS": 0.01}
    assert loss == pytest.approx(sum(w * parts[k] for k, w in weights.items()), rel=1e-5)
    silent = at(alone(centres, noise=(0.0, 0.0)), x, label)[1]
    assert silent["D_BNS"] == pytest.approx(silent["C_BNS"], rel=1e-6)
    plain = at(alone(centres, distort=0.0, align=0.0), x, label)[0]
    assert plain == pytest.approx(0.5 * parts["CE"] + 0.2 * match, rel=1e-4)


def mean_terms(observed, centres, **how):
    """Both distances to the centre, averaged over the noise."""
    terms = {t.name: t.fn for t in alone(centres, **how).terms}
    at = lambda key: terms["D_BNS"](observed._replace(key=key))
    values = jax.jit(jax.vmap(at))(jax.random.split(KEY, 20000))
    return float(values.mean()), float(terms["C_BNS"](observed))


@pytest.fixture
def scene(scenes: Any) -> Any:
    """(variance) -> a batch at the centre of its class, which has this variance."""

    def build(var):
        centre = Centre(jnp.ones((2, 3)), jnp.full((2, 3), var))
        centres = ClassCentres({"bn": centre}, jnp.ones(2, bool), jnp.ones(2, bool))
        observed = scenes.observed(
            stats={"bn": Stats(jnp.full((4, 3), 1.2), jnp.full((4, 3), var), 9)},
            targets={"bn": scenes.target(np.zeros(3), np.ones(3))},
            shared=centres.centres,
            labels=jax.nn.one_hot(jnp.zeros(4, jnp.int32), 2),
        )
        return observed, centres

    return build


def test_noise_adds_its_variances(scene):
    """E[distorted] = centred + 0.5^2 + 1^2, wherever the variances are."""
    for var in (0.0, 20.0):
        noisy, plain = mean_terms(*scene(var))
        assert plain == pytest.approx(0.04, rel=1e-3)
        assert noisy == pytest.approx(plain + 1.25, rel=0.02)


def test_variances_drawn_below_zero_can_be_raised(scene):
    """Half of the noise around 0 is left; around 20 nothing changes."""
    noisy, plain = mean_terms(*scene(0.0), positive=True)
    assert noisy == pytest.approx(plain + 0.25 + 0.5, rel=0.03)
    far = mean_terms(*scene(20.0), positive=True)
    assert far == pytest.approx(mean_terms(*scene(20.0)), rel=1e-5)


def test_images_come_closer_to_the_centre_of_their_class(model, centres):
    """The statistics of the batch, which labels and recorded statistics alone leave elsewhere."""
    ends = {}
    for weight in (0.9, 0.0):
        recipe = alone(centres, steps=60, batch=4, learning_rate=0.1, distort=weight)
        seen = []
        made = synthesize_images(
            model, recipe, 4, KEY, chunk=1, watch=Watcher(progress=seen.append)
        )
        assert made.images.shape == (4, 6, 6, 3)
        first, last = seen[0].parts, seen[-1].parts
        assert last["CE"] < first["CE"]
        ends[weight] = last["C_BNS"] / first["C_BNS"]
    assert ends[0.9] < 0.2
    assert ends[0.0] > 0.4


def test_half_of_a_batch_is_mixed_and_half_of_one_class(model, centres, nets):
    """Labels of both, recorded statistics of the first, the centre of the second."""
    recipe = fdda(centres)
    labels = np.asarray(recipe.condition(KEY, 32, 5))
    assert len(set(labels[:16].argmax(1))) > 1
    (label,) = set(labels[16:].argmax(1))
    assert centres.right[label]
    x = nets.images(model, 6)
    labels = jax.nn.one_hot(jnp.array([0, 1, 2, label, label, label]), 5)
    context = Context(model, batch_norm_targets(model)[0], centres.centres, labels)
    now = Now(KEY, jnp.zeros((), jnp.int32))
    parts = jax.jit(build_objective(recipe))(x, context, now)[1][0]
    half = lambda part, own: {
        k: float(v)
        for k, v in jax.jit(build_objective(alone(centres)))(
            x[part], context._replace(labels=own), now
        )[1][0].items()
    }
    first, second = half(slice(0, 3), labels[:3]), half(slice(3, 6), labels[3:])
    assert float(parts["BNS"]) == pytest.approx(first["BNS"], rel=1e-4)
    assert float(parts["C_BNS"]) == pytest.approx(second["C_BNS"], rel=1e-4)
    assert float(parts["D_BNS"]) == pytest.approx(second["D_BNS"], rel=1e-4)
    assert float(parts["CE"]) == pytest.approx((first["CE"] + second["CE"]) / 2, rel=1e-4)
    weights = {t.name: t.weight for t in recipe.terms}
    assert weights == {"CE": 1.0, "BNS": 0.2, "D_BNS": 0.9, "C_BNS": 0.01}


def test_settings(centres):
    recipe = alone(centres, steps=9, batch=6)
    assert (recipe.name, recipe.steps, recipe.batch) == ("fdda", 9, 6)
    weights = {t.name: t.weight for t in recipe.terms}
    assert weights == {"CE": 0.5, "BNS": 0.2, "D_BNS": 0.9, "C_BNS": 0.01}
    assert {t.name for t in recipe.terms if not t.classes} == {"BNS"}
    assert recipe.settings["classes"] == int(centres.right.sum())
    assert recipe.settings["noise"] == [0.5, 1.0]
    moved = centres._replace(centres=jax.tree.map(lambda v: v + 1, centres.centres))
    assert alone(moved).settings["centres"] != recipe.settings["centres"]
    assert alone(centres).settings["centres"] == recipe.settings["centres"]
