from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.ndimage import correlate1d

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.optim.alternating import whose_turn
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.schedules import radam_with_plateau
from dfq_jax.optim.steps import Now
from dfq_jax.recipes.mct import Variant, mct
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.sources.pixels import imagenet_moments
from dfq_jax.synthesis.terms.aggregate import IMAGE, empty_table, first_reader, last_target
from dfq_jax.synthesis.terms.targets import batch_norm_targets

KEY = jax.random.key(0)
MEAN, STD = imagenet_moments(3)
LOW, HIGH = -MEAN / STD, (1 - MEAN) / STD


@pytest.fixture(scope="module")
def model(nets):
    return nets.stem(seed=1)


@pytest.fixture(scope="module")
def targets(model):
    return batch_norm_targets(model)[0]


@pytest.fixture(scope="module")
def canvases():
    """Three batches of two canvases, four pixels larger than the images each way."""
    return 1.5 * jax.random.normal(KEY, (3, 2, 10, 10, 3))


@pytest.fixture(scope="module")
def at(model, targets):
    """(recipe, turns) -> (canvases, step, memory) -> loss, parts, memory, slope."""

    def of(recipe, turns):
        shared = recipe.prepare(model, targets, KEY)
        slope = jax.value_and_grad(build_objective(recipe, turns=turns), has_aux=True)

        @jax.jit
        def run(x, step, memory):
            context = Context(model, targets, shared, ())
            (loss, (parts, memory)), gradient = slope(x, context, Now(KEY, step, memory))
            return loss, parts, memory, gradient

        return lambda x, step, memory: run(x, jnp.array(step, jnp.int32), memory)

    return of


@pytest.fixture(scope="module")
def in_turns(at):
    """The recipe as published, on canvases a little larger than the images, for three batches."""
    return at(mct(margin=4), 3)


def blurred(canvas):
    """The 3x3 Gaussian of 1.25, zeros beyond the edge, by SciPy."""
    line = np.exp(-np.array([1.0, 0, 1]) / (2 * 1.25**2))
    line /= line.sum()
    out = np.asarray(canvas, np.float64)
    for axis in (1, 2):
        out = correlate1d(out, line, axis=axis, mode="constant")
    return out


def finalised(canvas):
    """What images become: blurred, cut out of the middle, clipped to possible pixels."""
    return np.clip(blurred(canvas)[:, 2:8, 2:8], LOW, HIGH)


def test_the_row_of_the_last_turn_holds_its_finished_images(
    in_turns, nets, model, targets, canvases
):
    memory, step = empty_table(targets, 3, 3), 4
    before = memory._replace(rows=jax.tree.map(lambda v: v + 7, dict(memory.rows)))
    _, _, after, _ = in_turns(canvases, step, before)
    last = int(whose_turn(jnp.array(step - 1, jnp.int32), 3))
    images = finalised(canvases[last])
    seen = nets.forward(model, images)  # ImageNet's normalisation: natural units
    readers = {n.name: n.inputs[0] for n in model.graph.nodes}
    for name, rows in after.rows.items():
        x = images if name == IMAGE else seen[readers[name]]
        centre = 0.0 if name == IMAGE else np.asarray(targets[name].mean, float)
        flat = x.reshape(-1, x.shape[-1]) - centre
        np.testing.assert_allclose(rows.first[last], flat.mean(0), atol=1e-4)
        np.testing.assert_allclose(rows.second[last], (flat**2).mean(0), atol=2e-4)
        for row in rows:
            np.testing.assert_array_equal(np.delete(np.asarray(row), last, axis=0), 7)
    assert after.seen.tolist() == [i == last for i in range(3)]


def test_only_the_canvases_of_this_turn_have_a_slope(in_turns, targets, canvases):
    memory = empty_table(targets, 3, 3)
    for step in range(3):
        _, _, memory, slope = in_turns(canvases, step, memory)
        turn = int(whose_turn(jnp.array(step, jnp.int32), 3))
        np.testing.assert_array_equal(np.delete(np.asarray(slope), turn, axis=0), 0)
        assert np.abs(slope[turn]).max() > 0
    assert memory.seen.sum() == 2  # the last turn's row is refreshed at the next step


def test_the_network_sees_windows_of_blurred_perhaps_mirrored_canvases(canvases):
    augment = jax.jit(mct(margin=4).stages[0].augment)
    canvas = np.asarray(canvases[0])
    windows = {
        (mirrored, top, left): whole[:, top : top + 6, left : left + 6]
        for mirrored, whole in enumerate((blurred(canvas), blurred(canvas[:, :, ::-1])))
        for top in range(5)
        for left in range(5)
    }
    places = set()
    for i in range(60):
        shown = np.asarray(augment(jax.random.key(i), canvases[0]))
        fits = [k for k, v in windows.items() if np.allclose(shown, v, atol=1e-5)]
        assert len(fits) == 1
        places.add(fits[0])
    assert {p[0] for p in places} == {0, 1}
    assert {p[1] for p in places} == {p[2] for p in places} == set(range(5))


def test_terms_of_both_variants(at, nets, model, targets, canvases):
    """One batch, what is shown being what is finished: against NumPy."""
    x = jnp.asarray(finalised(canvases[0]), jnp.float32)
    shown = finalised(np.pad(np.asarray(x), ((0, 0), (2, 2), (2, 2), (0, 0))))
    shown[:] = np.clip(blurred(x), LOW, HIGH)
    seen = nets.forward(model, shown)
    readers = {n.name: n.inputs[0] for n in model.graph.nodes}
    means, spreads = [(shown.mean((0, 1, 2)) ** 2).sum()], []
    spreads.append(((np.sqrt(shown.var((0, 1, 2)) + 1e-6) - 1) ** 2).sum())
    for name, target in targets.items():
        flat = seen[readers[name]].reshape(-1, target.mean.size)
        mean, std = np.asarray(target.mean, float), np.sqrt(np.asarray(target.var, float))
        means.append(((flat.mean(0) - mean) ** 2).mean())
        spreads.append(((np.sqrt(flat.var(0) + 1e-6) - std) ** 2).mean())
    width = (seen["fc"].max(1) - seen["fc"].min(1)).mean()
    last = seen[readers["bn2"]]
    mean, std = (np.asarray(v, float) for v in (targets["bn2"].mean, np.sqrt(targets["bn2"].var)))
    far = np.maximum(((last.mean((1, 2)) - mean) ** 2).mean(1) - 0.5, 0)
    far += np.maximum(((last.std((1, 2), ddof=1) - std) ** 2).mean(1) - 0.5, 0)
    wanted: dict[Variant, Any] = {
        "code": (np.mean(means) + np.mean(spreads), -width, 1e-5),
        "paper": (np.mean(means) + 10 * np.mean(spreads), -width + far.mean(), 3e-7),
    }
    for variant, (match, output, weight) in wanted.items():
        recipe = mct(variant=variant, margin=0)
        stage = recipe.stages[0]._replace(augment=lambda key, images: recipe_blur(images))
        run = at(recipe._replace(stages=(stage,)), 1)
        loss, parts, _, _ = run(x, 0, empty_table(targets, 1, 3))
        assert float(parts["BNS"]) == pytest.approx(match, rel=1e-3)
        assert float(parts["output"]) == pytest.approx(output, rel=1e-3)
        assert float(loss) == pytest.approx(match + weight * output, rel=1e-3)


def recipe_blur(images):
    return mct(margin=0).source.finish(images)


def test_images_are_possible_pixels_of_the_right_size_and_canvases_are_not_clipped(model):
    canvases = []
    recipe = mct(margin=4, steps=3, batch=2)
    finish = recipe.source.finish

    def spied(images):
        jax.debug.callback(lambda v: canvases.append(np.asarray(v)), images)
        return finish(images)

    recipe = recipe._replace(source=recipe.source._replace(finish=spied))
    seen = []
    made = synthesize_images(model, recipe, 5, KEY, chunk=9, watch=Watcher(progress=seen.append))
    jax.effects_barrier()
    images = np.asarray(made.images)
    assert images.shape == (5, 6, 6, 3)
    assert (images >= LOW - 1e-5).all()
    assert (images <= HIGH + 1e-5).all()
    assert {c.shape for c in canvases} == {(2, 10, 10, 3)}
    assert max(np.abs(c).max() for c in canvases) > HIGH.max()
    assert [(p.batch, p.batches, p.step, p.steps) for p in seen] == [(0, 1, 9, 9)]


def test_all_batches_together_come_closer_to_the_statistics(model):
    seen = []
    recipe = mct(variant="code", margin=4, steps=60, batch=2, learning_rate=2.0)
    made = synthesize_images(model, recipe, 4, KEY, chunk=1, watch=Watcher(progress=seen.append))
    start, end = (np.mean([p.parts["BNS"] for p in part]) for part in (seen[:4], seen[-8:]))
    assert end < start / 4
    assert np.abs(np.asarray(made.images[:2]) - made.images[2:]).max() > 0.1


def test_networks_without_classes_keep_their_table(nets):
    made = synthesize_images(nets.two_heads(), mct(margin=2, steps=1, batch=2), 4, KEY)
    assert made.notes == ()
    assert np.isfinite(made.images).all()


def test_the_last_batch_norm_is_the_last_one_executed(scenes: Any, model):
    made = {name: scenes.target(np.zeros(2), np.ones(2)) for name in ("c", "b", "z", "a")}
    assert list(last_target(model, made, KEY)) == ["a"]


def test_the_first_reader_of_the_images(model, nets):
    assert first_reader(model.graph) == "conv1"
    blind = type(model.graph)(model.graph.nodes[1:], (model.graph.nodes[0].name, "other"), ("fc",))
    assert first_reader(blind) == "bn1"
    unread = type(model.graph)(model.graph.nodes[1:], ("images", "conv1"), ("fc",))
    with pytest.raises(UnsupportedModelError, match="no node of this network reads 'images' first"):
        first_reader(unread)


@pytest.mark.torch
def test_steps_are_those_of_torchs_radam_halved_on_plateaus():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(40, 3)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.zeros(3))
    theirs = torch.optim.RAdam([parameter], lr=0.5)
    rule = optax.with_extra_args_support(radam_with_plateau(0.5, 100))  # patience 2
    x: Any = jnp.zeros(3)
    state = rule.init(x)
    step = jax.jit(lambda g, s, x: rule.update(g, s, x, value=jnp.ones(())))
    with jax.numpy_dtype_promotion("standard"):
        for i, grad in enumerate(grads):
            cuts = max(i, 0) // 4  # an improvement, three bad steps, then a cut
            theirs.param_groups[0]["lr"] = max(0.5 * 0.5**cuts, 1e-4)
            parameter.grad = torch.tensor(grad)
            theirs.step()
            update, state = step(jnp.asarray(grad), state, x)
            x = optax.apply_updates(x, update)
            np.testing.assert_allclose(x, parameter.detach().numpy(), rtol=2e-4, atol=1e-5)


def test_the_rate_has_a_floor():
    """Ten steps of a constant loss would halve it ten times, were it not at 1e-4 by then."""
    rule = optax.with_extra_args_support(radam_with_plateau(1e-3, 1))  # patience 0
    free = optax.with_extra_args_support(optax.radam(1e-3))
    x, updates = jnp.zeros(()), []
    for each in (rule, free):
        state, update = each.init(x), jnp.zeros(())
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(24):
                update, state = each.update(jnp.ones(()), state, x, value=jnp.ones(()))
        updates.append(jnp.asarray(update))
    assert float(updates[0] / updates[1]) == pytest.approx(0.1, rel=1e-4)


def test_settings():
    recipe = mct(steps=9, batch=6)
    assert (recipe.name, recipe.steps, recipe.batch) == ("mct", 9, 6)
    assert recipe.turns
    assert recipe.bounded
    wanted: dict[Variant, Any] = {"paper": (3e-7, 32), "code": (1e-5, 64)}
    for variant, (output, margin) in wanted.items():
        made = mct(variant=variant)
        assert {t.name: t.weight for t in made.terms} == {"BNS": 1.0, "output": output}
        assert made.source.init(KEY, (1, 8, 6, 3)).shape == (1, 8 + margin, 6 + margin, 3)
        assert made.settings["variant"] == variant
        assert made.settings["learning_rate"] == 16
    assert mct(output=0.5).settings["output"] == 0.5
