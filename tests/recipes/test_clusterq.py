from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.optim.steps import Now
from dfq_jax.recipes.clusterq import clusterq
from dfq_jax.synthesis.recipe import grouped_labels
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.terms.centres import recorded_clusters
from dfq_jax.synthesis.terms.targets import batch_norm_targets, observe

KEY = jax.random.key(0)
LAYERS = ("bn1", "bn2")


@pytest.fixture(scope="module")
def model(nets):
    return nets.stem()


@pytest.fixture(scope="module")
def images(model, nets):
    return 3 * nets.images(model, 8)  # the network tells them apart


@pytest.fixture(scope="module")
def seen(model, images, nets):
    """Every tensor of the network in double precision."""
    tensors = nets.forward(model, images)
    readers = {n.name: n.inputs[0] for n in model.graph.nodes}
    return {name: tensors[readers[name]] for name in LAYERS} | {"fc": tensors["fc"]}


@pytest.fixture(scope="module")
def labels(seen):
    """What the network says, but for the last three images."""
    said = seen["fc"].argmax(1)
    return np.where(np.arange(8) < 5, said, (said + 1) % 5)


@pytest.fixture(scope="module")
def at(model):
    """(recipe) -> (images, labels, step, memory, key) -> loss, parts, memory, slope."""
    targets, _ = batch_norm_targets(model)

    def of(recipe):
        objective = build_objective(recipe)

        @jax.jit
        def run(x, labels, step, memory, key):
            context = Context(model, targets, (), labels)
            value = jax.value_and_grad(objective, has_aux=True)
            (loss, (parts, memory)), slope = value(x, context, Now(key, step, memory))
            return loss, parts, memory, slope

        def call(x, labels, step, memory, key=KEY):
            one_hot = jax.nn.one_hot(jnp.asarray(labels, jnp.int32), 5)
            return run(x, one_hot, jnp.array(step, jnp.int32), memory, key)

        return call

    return of


@pytest.fixture(scope="module")
def usual(at):
    """The recipe as published: 40 steps, 5 of which are warm-up."""
    return at(clusterq(steps=40))


@pytest.fixture(scope="module")
def without(at):
    """The same less the terms on classes."""
    return at(clusterq(steps=40, align=0.0, diversify=0.0))


@pytest.fixture(scope="module")
def start(model):
    return recorded_clusters(batch_norm_targets(model)[0], 5)


def sample_statistics(x):
    return x.mean((1, 2)), np.sqrt(x.var((1, 2)) + 1e-6)


def class_statistics(seen, chosen):
    """{layer: (means, deviations)} averaged over samples."""
    return {k: [v[chosen].mean(0) for v in sample_statistics(seen[k])] for k in LAYERS}


def test_parts_against_numpy(usual, model, images, labels, seen, start):
    """In their first active step, where all centres are still those recorded."""
    loss, parts, _, _ = usual(images, labels, 5, start)
    logits = seen["fc"] - np.log(np.exp(seen["fc"]).sum(1, keepdims=True))
    surprise = -logits[np.arange(8), labels].mean()
    match, aligned = 0.0, np.zeros(5)
    for name in LAYERS:
        mean, var = (np.asarray(model.params[name][k], float) for k in ("mean", "var"))
        flat = seen[name].reshape(-1, mean.size)
        match += ((flat.mean(0) - mean) ** 2 + (flat.var(0) - var) ** 2).mean() / 2
        m, d = (v[:5] for v in sample_statistics(seen[name]))
        aligned += ((m - mean) ** 2 + (d - np.sqrt(var + 1e-6)) ** 2).mean(1) / 2
    assert float(parts["CE"]) == pytest.approx(surprise, rel=1e-4)
    assert float(parts["BNS"]) == pytest.approx(match, rel=1e-4)
    assert float(parts["SFDA"]) == pytest.approx(aligned.mean(), rel=1e-4)
    weights = {"CE": 1, "BNS": 0.1, "SFDA": 0.9, "ICV": 0.6}
    total = sum(w * float(parts[k]) for k, w in weights.items())
    assert float(loss) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("relative", [False, True])
def test_variation_is_alignment_and_noise(relative, scenes: Any):
    """In the mean; the noise is absolute, or in units of each channel's recorded deviation."""
    rng = np.random.default_rng(0)
    targets = {k: scenes.target(np.zeros(3), v) for k, v in [("a", [4, 1, 9]), ("b", [1, 4, 4])]}
    observed = scenes.observed(
        stats={k: scenes.stats_of(rng.normal(size=(4, 3, 3, 3))) for k in targets},
        targets=targets,
        logits=np.eye(2)[[0, 1, 1, 0]],
        labels=jnp.asarray(np.eye(2)[[0, 1, 0, 0]], jnp.float32),
        memory=recorded_clusters(targets, 2),
        step=jnp.array(99, jnp.int32),
    )
    terms = {t.name: t.fn for t in clusterq(relative_noise=relative).terms}
    at = lambda key: terms["ICV"](observed._replace(key=key))
    values = jax.jit(jax.vmap(at))(jax.random.split(KEY, 10000))
    scale = (14 / 3 + 3) / 2 if relative else 1.0
    plain = float(terms["SFDA"](observed))
    assert plain > 0.1
    assert float(values.mean()) == pytest.approx(plain + 1.25 * scale, rel=0.02)


def test_the_warm_up_leaves_classes_to_the_labels(usual, without, images, labels, start):
    loss, parts, memory, slope = usual(images, labels, 3, start)
    assert float(parts["SFDA"]) == float(parts["ICV"]) == 0
    plain = without(images, labels, 30, start)
    assert float(loss) == pytest.approx(float(plain[0]), rel=1e-6)
    np.testing.assert_allclose(slope, plain[3], rtol=1e-4, atol=1e-8)
    for new, old in zip(jax.tree.leaves(memory), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(new, old)


def test_centres_are_measured_once_and_then_follow(usual, images, labels, seen, start):
    _, _, first, _ = usual(images, labels, 4, start)
    right = np.arange(8) < 5
    assert set(np.flatnonzero(first.known)) == set(labels[:5])
    for c in range(5):
        mine = right & (labels == c)
        if not mine.any():
            for name in LAYERS:
                np.testing.assert_array_equal(
                    first.centres[name].mean[c], start.centres[name].mean[c]
                )
            continue
        for name, (mean, spread) in class_statistics(seen, mine).items():
            np.testing.assert_allclose(first.centres[name].mean[c], mean, atol=1e-4)
            np.testing.assert_allclose(first.centres[name].spread[c], spread, atol=1e-4)
    moved = jax.tree.map(lambda v: v + 1 if v.dtype == jnp.float32 else v, first)
    _, _, second, _ = usual(images, labels, 5, moved)
    for name in LAYERS:
        gap = np.asarray(second.centres[name].mean - first.centres[name].mean)
        wanted = np.where(np.asarray(first.known), 0.8, 1.0)[:, None]
        np.testing.assert_allclose(gap, np.broadcast_to(wanted, gap.shape), atol=1e-4)


def test_classes_have_centres_of_their_own(usual, images, labels, start):
    """Not the statistics of the whole batch, nor those recorded."""
    _, _, memory, _ = usual(images, labels, 4, start)
    known = np.flatnonzero(memory.known)
    assert len(known) > 1
    a, b = (np.asarray(memory.centres["bn2"].mean[c]) for c in known[:2])
    assert np.abs(a - b).max() > 0.05
    assert np.abs(a - np.asarray(start.centres["bn2"].mean[0])).max() > 0.05


def test_misclassified_samples_contribute_nothing(usual, without, images, labels, start):
    """Neither to the terms, nor to the slope, nor to the centres."""
    slope = usual(images, labels, 5, start)[3] - without(images, labels, 5, start)[3]
    pull = np.abs(np.asarray(slope)).max((1, 2, 3))
    assert (pull[:5] > 1e-4).all()
    assert (pull[5:] < 1e-6).all()
    _, parts, memory, _ = usual(images, np.append(labels[:5] + 1, labels[5:]) % 5, 5, start)
    assert float(parts["SFDA"]) == float(parts["ICV"]) == 0
    assert not memory.known.any()


def test_labels_come_in_groups_of_one_class():
    found = np.asarray(grouped_labels(KEY, 12, 10, 4))
    np.testing.assert_array_equal(found.sum(1), 1)
    label = found.argmax(1)
    assert len(set(label)) == 3
    np.testing.assert_array_equal(label, np.repeat(label[::4], 4))
    few = np.asarray(grouped_labels(KEY, 12, 2, 4)).argmax(1)
    assert sorted(few) == [0] * 4 + [1] * 8 or sorted(few) == [0] * 8 + [1] * 4
    other = grouped_labels(jax.random.key(1), 12, 10, 4)
    assert not np.array_equal(other, found)


def silhouette(points, groups):
    """Mean silhouette of points in groups, by Euclidean distance."""
    far = np.linalg.norm(points[:, None] - points[None], axis=2)
    values = []
    for i, group in enumerate(groups):
        own = (groups == group) & (np.arange(len(groups)) != i)
        others = [far[i, groups == g].mean() for g in set(groups) if g != group]
        a, b = far[i, own].mean(), min(others)
        values.append((b - a) / max(a, b))
    return np.mean(values)


def clustering(model, recipe):
    """The silhouette of deep statistics of images by their labels."""
    made = synthesize_images(model, recipe, 16, KEY, chunk=150)
    stats = jax.jit(lambda x: observe(model, batch_norm_targets(model)[0], x))(made.images).stats
    points = np.concatenate(sample_statistics_of(stats["bn2"]), axis=1)
    label_key = jax.random.split(jax.random.fold_in(KEY, 0), 3)[1]
    return silhouette(points, np.asarray(recipe.condition(label_key, 16, 5)).argmax(1))


def sample_statistics_of(stats):
    return np.asarray(stats.mean), np.sqrt(np.asarray(stats.var))


def test_classes_gather_more_than_without(nets):
    """Deep statistics of a class lie closer together than with labels and statistics alone."""
    model = nets.stem(seed=1)
    how: Any = {"steps": 150, "batch": 16, "per_class": 4, "learning_rate": 0.05}
    plain = clustering(model, clusterq(**how, align=0.0, diversify=0.0))
    gathered = clustering(model, clusterq(**how))
    assert gathered > plain + 0.05


def test_settings():
    recipe = clusterq(steps=9, batch=6, noise=(0.1, 0.2))
    assert (recipe.name, recipe.steps, recipe.batch) == ("clusterq", 9, 6)
    assert recipe.settings["noise"] == [0.1, 0.2]
    weights = {t.name: t.weight for t in clusterq().terms}
    wanted = {"CE": 1, "BNS": 0.1, "SFDA": 0.9, "ICV": 0.6}
    assert weights == wanted
    assert {t.name for t in recipe.terms if not t.classes} == {"BNS"}
    assert clusterq().settings["rate"] == 0.2
    assert clusterq().settings["noise"] == [0.5, 1.0]
