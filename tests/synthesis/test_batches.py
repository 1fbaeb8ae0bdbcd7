from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.optim.alternating import whose_turn
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.state import Place
from dfq_jax.optim.steps import Now
from dfq_jax.recipes.best import best
from dfq_jax.synthesis.recipe import Memory, Recipe, Source, Stage, half_labelled
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective, finished
from dfq_jax.synthesis.sources.pixels import from_natural, gaussian
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.synthesis.terms.match import batch_norm_match
from dfq_jax.synthesis.terms.targets import batch_norm_targets

KEY = jax.random.key(5)


def adam(factor):
    return optax.adam(0.1 * factor)


def recipe(steps=4, optimizer=adam, **changes):
    base = Recipe(
        name="small",
        settings={},
        batch=2,
        source=Source(gaussian),
        stages=(Stage(steps, optimizer),),
        terms=(Term("bn", 1.0, batch_norm_match),),
    )
    return base._replace(**changes)


@pytest.fixture(scope="module")
def net(nets):
    return nets.stem()


def turns_of(count, turns):
    return [int(whose_turn(jnp.array(step, jnp.int32), turns)) for step in range(count)]


COUNT = Memory(
    start=lambda targets, turns, classes, features: {"steps": jnp.zeros(())},
    step=lambda o: {"steps": o.memory["steps"] + 1},
)


def remembered(o):
    """Shows the memory in the progress without pulling at the images."""
    return o.memory["steps"] + 0 * jnp.sum(o.images)


def progress(net, made, n, **how):
    seen = []
    found = synthesize_images(
        net, made, n, KEY, chunk=1, watch=Watcher(progress=seen.append), **how
    )
    return found, seen


def test_memory_passes_from_step_to_step_stage_to_stage_and_batch_to_batch(net):
    stages = (Stage(2, adam), Stage(1, adam))
    counted = recipe(stages=stages, terms=(Term("count", 1.0, remembered),), memory=COUNT)
    _, seen = progress(net, counted, 4)
    assert [(p.batch, p.step) for p in seen] == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert [p.parts["count"] for p in seen] == [0, 1, 2, 3, 4, 5]


def test_memory_starts_from_what_is_known_of_the_run(net):
    asked = {}

    def start(targets, turns, classes, features):
        asked.update(layers=list(targets), turns=turns, classes=classes, features=dict(features))
        return ()

    watch = lambda graph: {"pooled": "fc", "image": "conv1"}
    one = recipe(steps=1, memory=Memory(start=start), watch=watch)
    synthesize_images(net, one, 4, KEY)
    wanted = {"layers": ["bn1", "bn2"], "turns": 1, "classes": 5}
    assert asked == wanted | {"features": {"pooled": 5, "image": 3}}
    synthesize_images(net, one._replace(turns=True), 5, KEY)
    assert asked["turns"] == 3


def test_the_next_batch_remembers_finished_images(net):
    """Sums over all images finished so far, given to the next batch only."""
    sums = Memory(
        start=lambda *_: {"steps": jnp.zeros(())},
        batch=lambda o: {"steps": o.memory["steps"] + jnp.sum(o.natural)},
    )
    summed = recipe(
        terms=(Term("bn", 1.0, batch_norm_match), Term("sum", 0.0, remembered)), memory=sums
    )
    found, seen = progress(net, summed, 6)
    images = np.asarray(found.images)  # ImageNet's normalisation: natural units
    wanted = [0.0] * 4 + [images[:2].sum()] * 4 + [images[:4].sum()] * 4
    np.testing.assert_allclose([p.parts["sum"] for p in seen], wanted, atol=1e-3)
    assert abs(wanted[4]) > 0.1


def compiled(made, net, turns):
    """(variables, step, memory) -> the objective of a recipe and its slope."""
    context = Context(net, batch_norm_targets(net)[0], (), ())
    slope = jax.value_and_grad(build_objective(made, turns=turns), has_aux=True)
    at = lambda step: jnp.array(step, jnp.int32)
    run = jax.jit(lambda x, step, memory: slope(x, context, Now(KEY, step, memory)))
    return lambda x, step, memory=(): run(x, at(step), memory)


@pytest.fixture(scope="module")
def stacked():
    """Three batches of two images."""
    return jax.random.normal(KEY, (3, 2, 6, 6, 3))


def test_only_the_batch_whose_turn_it_is_has_a_slope(net, stacked):
    together, single = compiled(recipe(), net, 3), compiled(recipe(), net, 1)
    for step, turn in enumerate(turns_of(3, 3)):
        (loss, _), slope = together(stacked, step)
        alone = single(stacked[turn], step)
        assert float(loss) == pytest.approx(float(alone[0][0]), rel=1e-5)
        np.testing.assert_allclose(slope[turn], alone[1], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(np.delete(np.asarray(slope), turn, axis=0), 0)


def test_a_finished_memory_looks_at_the_last_turns_finished_images(net, stacked):
    """And it is refreshed before the terms look at it."""
    bright = Memory(
        start=lambda *_: (),
        step=lambda o: {"sum": jnp.sum(o.images), "turn": o.turn},
        finished=True,
    )
    made = recipe(
        source=Source(gaussian, render=lambda x: 2 * x, finish=lambda x: x + 1),
        stages=(Stage(4, adam, lambda key, images: images * 100),),
        terms=(Term("sum", 1.0, lambda o: o.memory["sum"] + 0 * jnp.sum(o.images)),),
        memory=bright,
    )
    order = turns_of(6, 3)
    start = {"sum": jnp.zeros(()), "turn": jnp.zeros((), jnp.int32)}
    at = compiled(made, net, 3)
    for step, last in [(0, order[0]), (1, order[0]), (5, order[4])]:
        (loss, (_, memory)), slope = at(stacked, step, start)
        wanted = (2 * np.asarray(stacked[last], float) + 1).sum()
        assert float(memory["sum"]) == pytest.approx(wanted, rel=1e-4)
        assert int(memory["turn"]) == last
        assert float(loss) == float(memory["sum"])
        np.testing.assert_array_equal(slope, 0)  # memory is not differentiated


def test_a_memory_of_what_was_shown_looks_at_this_turns_images(net, stacked):
    shown = Memory(start=lambda *_: (), step=lambda o: {"sum": jnp.sum(o.images)})
    made = recipe(stages=(Stage(4, adam, lambda key, images: images * 100),), memory=shown)
    (_, (_, memory)), _ = compiled(made, net, 3)(stacked, 4, {"sum": jnp.zeros(())})
    wanted = 100 * np.asarray(stacked[turns_of(5, 3)[4]], float).sum()
    assert float(memory["sum"]) == pytest.approx(wanted, rel=1e-4)


def test_finished_images_are_clipped_where_the_recipe_says_so(net):
    dark = jnp.full((1, 2, 2, 3), -9.0)
    assert float(finished(recipe(), dark, net.contract).min()) == -9
    pixels = np.asarray(finished(recipe(bounded=True), dark, net.contract)) * net.contract.std
    np.testing.assert_allclose(pixels + np.asarray(net.contract.mean), 0, atol=1e-6)


IN_TURNS = {"turns": True, "memory": COUNT}


def test_all_batches_move_as_often_as_the_recipe_says(net):
    """Each turn of plain descent on a constant slope takes one batch a step of 1."""
    climb = Term("climb", 1.0, lambda o: -jnp.sum(o.natural))
    made = recipe(steps=4, optimizer=lambda factor: optax.sgd(1.0), terms=(climb,), **IN_TURNS)
    start = gaussian(KEY, (2, 6, 6, 3))
    made = made._replace(source=Source(lambda key, shape: start))
    found, seen = progress(net, made, 5)
    wanted = jnp.concatenate([start, start, start])[:5] + 4
    np.testing.assert_allclose(found.images, from_natural(wanted, net.contract), atol=1e-5)
    assert [(p.batch, p.batches, p.step, p.steps) for p in seen] == [
        (0, 1, step, 12) for step in range(1, 13)
    ]
    assert len(found.losses) == 1


def test_turns_start_from_images_of_their_own(net):
    still = recipe(steps=1, optimizer=lambda factor: optax.sgd(0.0), **IN_TURNS)
    images = np.asarray(synthesize_images(net, still, 6, KEY).images)
    init_key = jax.random.split(jax.random.fold_in(KEY, 0), 3)[0]
    wanted = [gaussian(k, (2, 6, 6, 3)) for k in jax.random.split(init_key, 3)]
    np.testing.assert_array_equal(images, jnp.concatenate(wanted))


def no_trace(targets, turns, classes, features):
    return {
        "steps": jnp.zeros(()),
        "rows": jnp.zeros((turns, 2)),
        "seen": jnp.zeros(turns, bool),
    }


def traced(o):
    return {
        "steps": 0.5 * o.memory["steps"] + jnp.mean(o.stats["bn2"].mean),
        "rows": o.memory["rows"].at[o.turn].set(jnp.mean(o.natural, (1, 2, 3))),
        "seen": o.memory["seen"].at[o.turn].set(True),
    }


def handed_on(o):
    return o.memory | {"steps": o.memory["steps"] + jnp.mean(o.natural)}


TRACE = Memory(start=no_trace, step=traced, batch=handed_on)


def drawn(o):
    """A term that depends on everything remembered."""
    past = (
        o.memory["steps"]
        + jnp.sum(o.memory["rows"])
        + jnp.sum(o.memory["seen"]).astype(jnp.float32)
    )
    return jnp.mean((o.natural - past) ** 2)


@pytest.mark.parametrize("turns", [False, True], ids=["batches", "turns"])
def test_resumes_with_its_memory_bit_for_bit(turns, net, tmp_path):
    """Killed inside the second of three batches, or in the middle of a round of turns."""
    terms = (Term("bn", 1.0, batch_norm_match), Term("past", 1.0, drawn))
    memory = TRACE._replace(finished=turns)
    made = recipe(steps=2, terms=terms, memory=memory, turns=turns)
    whole, all_of = progress(net, made, 6)
    how: dict[str, Any] = {"place": Place(tmp_path, {"seed": 5})}
    seen = []

    def stop(p):
        seen.append((p.batch, p.step))
        if seen[-1] == ((0, 5) if turns else (1, 1)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize_images(net, made, 6, KEY, chunk=1, watch=Watcher(progress=stop), **how)
    again, rest = progress(net, made, 6, **how)
    np.testing.assert_array_equal(again.images, whole.images)
    assert again.losses == whole.losses
    assert seen + [(p.batch, p.step) for p in rest] == [(p.batch, p.step) for p in all_of]
    assert [p.parts for p in rest] == [p.parts for p in all_of[-len(rest) :]]
    assert len(rest) == (1 if turns else 3)


def test_recipes_that_differ_in_labels_alone_share_their_programs():
    """Those of the probes, half of them labelled, are those of images that `best` makes."""
    whole = best(steps=5)
    half = whole._replace(condition=half_labelled, name="probes", batch=3)
    assert half != whole
    assert build_objective(half) == build_objective(whole)
    assert build_objective(best(steps=5, labels=0.5)) != build_objective(whole)
