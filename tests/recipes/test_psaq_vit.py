import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.steps import Now
from dfq_jax.recipes.psaq_vit import psaq_vit
from dfq_jax.synthesis.recipe import random_labels
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.patches import (
    PAPER_VALUES,
    attention_outputs,
    layer_entropy,
    variation_gap,
)
from dfq_jax.synthesis.terms.targets import observe
from dfq_jax.types import InputContract

KEY = jax.random.key(6)


@pytest.fixture(scope="module")
def vit(nets):
    return nets.vit()


def loss_of(recipe, model, x, labels, shared):
    """The objective at images, its parts, and its gradient."""
    context = Context(model, {}, shared, labels)
    now = Now(KEY, jnp.zeros((), jnp.int32))
    objective = build_objective(recipe)
    compiled = jax.jit(jax.value_and_grad(lambda x: objective(x, context, now), has_aux=True))
    (loss, (parts, _)), slope = compiled(x)
    return float(loss), {k: float(v) for k, v in parts.items()}, slope


def test_objective_is_the_weighted_sum_of_three_terms(vit, nets):
    """Of images that rolling and mirroring leave alone, so that each term is known."""
    x = jnp.broadcast_to(gaussian(KEY, (3, 1, 1, 3)) * 0.5, (3, 8, 8, 3))
    labels, wanted = random_labels(KEY, 3, 5), jnp.float32(2750.0)
    loss, parts, slope = loss_of(psaq_vit(), vit, x, labels, wanted)
    assert loss == pytest.approx(-parts["PSE"] + parts["CE"] + 0.05 * parts["TV"], rel=1e-5)
    tensors = nets.forward(vit, x)
    entropy = sum(
        float(layer_entropy(jnp.asarray(tensors[product], jnp.float32)))
        for product in attention_outputs(vit.graph)
    )
    assert parts["PSE"] == pytest.approx(entropy, rel=1e-2)
    logits = tensors[vit.graph.outputs[0]]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    crossed = -np.log((chances * np.asarray(labels)).sum(1)).mean()
    assert parts["CE"] == pytest.approx(crossed, rel=1e-4)
    assert np.isfinite(slope).all()


def numpy_variation(x):
    """Frobenius norms of differences along rows, columns and both diagonals, summed."""
    x = np.asarray(x, np.float64)
    pairs = [
        (x[:, 1:], x[:, :-1]),
        (x[:, :, 1:], x[:, :, :-1]),
        (x[:, 1:, 1:], x[:, :-1, :-1]),
        (x[:, 1:, :-1], x[:, :-1, 1:]),
    ]
    return sum(np.linalg.norm((a - b).ravel()) for a, b in pairs)


def test_distance_to_the_variation_drawn(scenes):
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3))
    for wanted in (100.0, 2750.0):
        seen = scenes.observed(images=x, shared=jnp.float32(wanted))
        here = wanted * (x.size / PAPER_VALUES) ** 0.5
        gap = abs(numpy_variation(x) - here)
        assert float(variation_gap(seen)) == pytest.approx(gap, rel=1e-4)
    flat = scenes.observed(images=np.ones((4, 8, 8, 3)), shared=jnp.float32(2750.0))
    assert float(variation_gap(flat)) == pytest.approx(here, rel=1e-3)  # the whole of it
    term = psaq_vit().terms[2]
    assert (term.name, term.weight) == ("TV", 0.05)


def test_as_much_variation_in_each_image_whatever_its_size(scenes):
    """Noise that meets what was drawn, roughly, does so in another batch and size, too."""
    rng = np.random.default_rng(1)
    for shape in ((2, 24, 24, 3), (8, 48, 48, 3)):
        x = rng.normal(size=shape) * 0.2215  # a norm of differences is 2**0.5 of it
        seen = scenes.observed(images=x, shared=jnp.float32(2750.0))
        here = 2750 * (x.size / PAPER_VALUES) ** 0.5
        assert float(variation_gap(seen)) < 0.06 * here
    assert PAPER_VALUES == 32 * 3 * 224 * 224


def test_variation_is_drawn_once_a_run(vit):
    prepare = psaq_vit().prepare
    drawn = [float(prepare(vit, {}, jax.random.key(i))) for i in range(40)]
    assert 2500 <= min(drawn) < 2600
    assert 2900 < max(drawn) <= 3000
    assert drawn[0] == float(prepare(vit, {}, jax.random.key(0)))


@pytest.mark.parametrize(("stage", "reach"), [(0, 15), (1, 30)])
def test_images_are_rolled_alike_along_both_axes_and_mirrored(stage, reach):
    x = jnp.arange(2.0 * 64 * 64).reshape(2, 64, 64, 1)
    augment = jax.jit(psaq_vit().stages[stage].augment)
    found = set()
    for i in range(80):
        shown = np.asarray(augment(jax.random.fold_in(KEY, i), x))
        candidates = [
            (offset, mirrored)
            for offset, mirrored in itertools.product(range(-reach, reach + 1), (False, True))
            if np.array_equal(
                shown, np.roll(x, (offset, offset), (1, 2))[:, :, :: 1 - 2 * mirrored]
            )
        ]
        assert len(candidates) == 1
        found |= set(candidates)
    assert {mirrored for _, mirrored in found} == {False, True}
    offsets = {offset for offset, _ in found}
    assert min(offsets) < -0.75 * reach
    assert max(offsets) > 0.75 * reach


def test_rolling_leaves_constant_images_alone(vit, nets):
    x = jnp.broadcast_to(gaussian(KEY, (2, 1, 1, 3)), (2, 8, 8, 3))
    logits = nets.run(vit, x)
    augment = jax.jit(psaq_vit().stages[0].augment)
    for i in range(4):
        np.testing.assert_array_equal(nets.run(vit, augment(jax.random.fold_in(KEY, i), x)), logits)
    noise = gaussian(KEY, (2, 8, 8, 3))
    assert np.abs(nets.run(vit, augment(KEY, noise)) - nets.run(vit, noise)).max() > 1e-3


def test_rate_warms_up_and_falls_in_each_stage():
    """Adam's steps under a constant slope have the size of the rate."""
    recipe = psaq_vit(learning_rate=0.25)
    assert [stage.steps for stage in recipe.stages] == [500, 500]
    slope = jnp.ones(())
    for stage, factor in itertools.product(recipe.stages, (1.0, 0.5)):
        rule = stage.optimizer(factor)

        @jax.jit
        def steps(state, rule=rule):
            def one(state, _):
                update, state = rule.update(slope, state, slope)
                return state, update

            return jax.lax.scan(one, state, length=500)[1]

        with jax.numpy_dtype_promotion("standard"):
            sizes = -np.asarray(steps(rule.init(slope)))
        done = np.arange(500)
        rise, fall = (done + 1) / 100, 0.5 * (1 + np.cos(np.pi * (done - 100) / 400))
        wanted = 0.25 * factor * np.where(done < 100, rise, fall)
        np.testing.assert_allclose(sizes, wanted, rtol=1e-3, atol=1e-5)


def test_momenta_of_the_optimizer():
    """Steps 1 and 2 of Adam with 0.5 and 0.9, at a slope that turns round."""
    rule = psaq_vit(steps=2000, learning_rate=1.0).stages[0].optimizer(1.0)
    slopes, x = [1.0, -0.5], jnp.zeros(())
    state, m, v = rule.init(x), 0.0, 0.0
    for i, g in enumerate(slopes, 1):
        m, v = 0.5 * m + 0.5 * g, 0.9 * v + 0.1 * g**2
        with jax.numpy_dtype_promotion("standard"):
            update, state = rule.update(jnp.float32(g), state, x)
        wanted = -(i / 100) * (m / (1 - 0.5**i)) / np.sqrt(v / (1 - 0.9**i))
        assert np.asarray(update) == pytest.approx(wanted, rel=1e-3)


def entropy_of(model, images):
    """Of all blocks, of images as they are."""
    taps = attention_outputs(model.graph)
    look = jax.jit(lambda x: observe(model, {}, x, taps=tuple(taps.values())).taps)
    return sum(float(layer_entropy(v)) for v in look(images).values())


def transformer(nets, size, patch, width, heads, depth):
    """A vision transformer of any size, of ten classes."""
    b = nets.Builder(InputContract(size, size), 0)
    n, part, whole = (size // patch) ** 2 + 1, width // heads, ((0, 0), (0, 0))
    x = b.conv("patches", "images", width, patch, patch, bias=True, padding=whole)
    x = b.op("tokens", nets.Reshape((n - 1, width)), x)
    x = b.op("joined", nets.Concat(1), b.constant("token", b.rng.normal(size=(1, 1, width))), x)
    x = b.op("placed", nets.Add(), x, b.constant("places", b.rng.normal(size=(1, n, width)) * 0.3))

    def heads_of(name, y):
        y = b.op(f"{name}.heads", nets.Reshape((n, heads, part)), b.linear(f"{name}.all", y, width))
        return b.op(name, nets.Transpose((0, 2, 1, 3)), y)

    for i in range(depth):
        y = b.norm(f"before{i}", x)
        q, k, v = (heads_of(f"{name}{i}", y) for name in "qkv")
        products = b.op(f"products{i}", nets.MatMul(True), q, k)
        y = b.op(f"weights{i}", nets.Softmax(), b.op(f"s{i}", nets.Scale(part**-0.5), products))
        y = b.op(f"back{i}", nets.Transpose((0, 2, 1, 3)), b.op(f"out{i}", nets.MatMul(), y, v))
        y = b.linear(f"mix{i}", b.op(f"flat{i}", nets.Reshape((n, width)), y), width)
        x = b.op(f"attended{i}", nets.Add(), x, y)
        y = b.linear(f"wide{i}", b.norm(f"between{i}", x), 2 * width)
        y = b.linear(f"narrow{i}", b.op(f"gelu{i}", nets.Activation("gelu"), y), width)
        x = b.op(f"block{i}", nets.Add(), x, y)
    x = b.op("first", nets.Reshape((width,)), b.part("cut", b.norm("last", x), 0, 1, axis=1))
    return b.done(b.linear("head", x, 10))


@pytest.fixture(scope="module")
def finer(nets):
    """A transformer that sees sixteen patches."""
    return transformer(nets, 8, 2, 8, 2, 1)


def test_images_of_a_network_without_batch_norm(finer):
    """Possible pixels, nearer to their labels and to the variation drawn."""
    seen = []
    recipe = psaq_vit(steps=100, batch=4)
    made = synthesize_images(finer, recipe, 6, KEY, chunk=5, watch=Watcher(progress=seen.append))
    assert made.images.shape == (6, 8, 8, 3)
    assert (made.excluded, made.notes, len(made.losses)) == ((), (), 2)
    pixels = np.asarray(made.images) * finer.contract.std + finer.contract.mean
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    first, last = seen[0].parts, seen[19].parts
    assert last["TV"] < 0.8 * first["TV"]
    assert last["CE"] < first["CE"]
    assert last["loss"] < first["loss"] - 1


def test_patches_become_diverse(finer):
    alone = psaq_vit(steps=120, batch=4, labels=0.0, variation=0.0, reach=(0, 0))
    alone = alone._replace(stages=alone.stages[:1])
    made = synthesize_images(finer, alone, 4, KEY, chunk=30)
    start = gaussian(jax.random.split(jax.random.fold_in(KEY, 0), 3)[0], (4, 8, 8, 3))
    assert entropy_of(finer, made.images) > entropy_of(finer, start) + 0.1


def test_networks_it_cannot_read(tiny_net):
    with pytest.raises(UnsupportedModelError, match="has no attention that a method for trans"):
        synthesize_images(tiny_net, psaq_vit(steps=2, batch=2), 2, KEY)


def test_networks_without_classes(finer):
    """The variation is drawn even where no labels are."""
    graph = type(finer.graph)(finer.graph.nodes, finer.graph.inputs, ("last",))
    model = type(finer)(graph, finer.params, finer.inputs)
    made = synthesize_images(model, psaq_vit(steps=1, batch=2), 2, KEY)
    assert made.notes == ("no class labels: the network's output is 17x8; without CE",)
    assert np.isfinite(made.images).all()


@pytest.mark.parametrize(("steps", "stages"), [(1, (1,)), (2, (1, 1)), (7, (4, 3))])
def test_few_steps(steps, stages):
    recipe = psaq_vit(steps=steps)
    assert tuple(stage.steps for stage in recipe.stages) == stages
    assert recipe.steps == steps


def test_settings():
    recipe = psaq_vit(batch=3, learning_rate=0.25, labels=0.5, variation=0.1, reach=(2, 4))
    assert (recipe.name, recipe.steps, recipe.batch) == ("psaq_vit", 1000, 3)
    assert recipe.settings == {
        "learning_rate": 0.25,
        "labels": 0.5,
        "variation": 0.1,
        "reach": [2, 4],
    }
    assert [(t.name, t.weight, t.classes) for t in recipe.terms] == [
        ("PSE", -1.0, False),
        ("CE", 0.5, True),
        ("TV", 0.1, False),
    ]
    assert recipe.source.init is gaussian
    assert recipe.bounded
    assert not recipe.statistics
    assert psaq_vit().batch == 32
