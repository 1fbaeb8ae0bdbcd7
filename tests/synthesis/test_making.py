"""Batches that diverge: noticed soon, made again at half the learning rate, told of."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.base.parallel import Machine
from dfq_jax.errors import DivergedError
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.state import Place
from dfq_jax.synthesis.recipe import Memory, Recipe, Source, Stage
from dfq_jax.synthesis.run.attempts import key_of
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.values import bound

KEY = jax.random.key(5)
STEPS = 40
UNIT = 0.05
"""What a step at the full rate adds; forty of them stay within what pixels can be."""


@pytest.fixture(scope="module")
def net(nets):
    return nets.stem()


def steady(factor):
    """One unit a step at the full rate."""
    return optax.sgd(UNIT * factor)


class Rates(list):
    """The learning-rate factors with which steps were taken, in order, without repetition."""

    def sgd(self, factor):
        plain = steady(factor)

        def note(_):
            if self[-1:] != [factor]:
                self.append(factor)

        def update(updates, state, params=None):
            jax.debug.callback(note, jax.tree.leaves(updates)[0].ravel()[0])
            return plain.update(updates, state, params)

        return optax.GradientTransformation(plain.init, update)


def below_zero(key, shape):
    return -jax.random.uniform(key, shape)


def start(key, shape):
    return -jax.random.uniform(key, shape).at[0, 0, 0, 0].set(0.0)


def climb(limit, o):
    wild = jnp.max(o.natural) > limit * UNIT
    return jnp.where(wild, jnp.nan, -jnp.sum(o.natural))


def climber(limit, rates=None, stages=(STEPS,), **changes):
    """Goes up by the learning rate at each step, from 0; NaN beyond `limit` units."""
    sgd = steady if rates is None else rates.sgd
    base = Recipe(
        name="climber",
        settings={},
        batch=2,
        source=Source(start),
        stages=tuple(Stage(steps, sgd) for steps in stages),
        terms=(Term("climb", 1.0, bound(climb, limit)),),
    )
    return base._replace(**changes)


def top(found):
    """Where the highest pixel ended, in units."""
    return float(np.max(np.asarray(found.images))) / UNIT


def again(step, *halvings):
    """The notes on batch 0."""
    words = "batch 0 diverged at step {} and was made again at 1/{} of the learning rate"
    return tuple(words.format(s, 2**n) for n, s in enumerate((step, *halvings), 1))


@pytest.mark.parametrize("limit", [1.5, 12.5, 19.5])
def test_divergence_is_noticed_within_ten_steps(limit, net):
    """The step after the limit fails; the host, which visits every 10 steps, begins anew."""
    seen, failing = [], int(limit) + 1
    wild = climber(limit, stages=(30,))
    look = lambda p: seen.append(p.step)
    try:
        found = synthesize_images(net, wild, 2, KEY, watch=Watcher(progress=look))
    except DivergedError:
        assert limit == 1.5  # thirty steps of an eighth are still too many
        found = None
    visits = [b for a, b in itertools.pairwise(seen) if b <= a]
    assert visits[0] == 10
    noticed = seen[seen.index(10, 1) - 1]
    assert failing <= noticed <= failing + 10
    if found is not None:
        assert found.notes[0] == again(failing)[0]


@pytest.mark.parametrize(
    ("limit", "wanted", "steps"),
    [
        (41.0, [1.0], []),
        (30.2, [1.0, 0.5], [31]),
        (15.2, [1.0, 0.5, 0.25], [16, 31]),
        (7.2, [1.0, 0.5, 0.25, 0.125], [8, 15, 29]),
    ],
)
def test_the_rate_is_halved_until_it_works(limit, wanted, steps, net):
    rates = Rates()
    found = synthesize_images(net, climber(limit, rates), 2, KEY)
    jax.effects_barrier()
    assert rates == wanted
    assert top(found) == pytest.approx(STEPS * wanted[-1], rel=1e-4)
    assert found.notes == (again(*steps) if steps else ())
    assert np.isfinite(found.losses).all()


def test_after_three_restarts_it_is_an_error(net):
    rates = Rates()
    message = (
        r"climber: the loss became NaN or infinite at step 9 in each of 4 attempts, the last at "
        r"1/8 of the learning rate"
    )
    with pytest.raises(DivergedError, match=message) as caught:
        synthesize_images(net, climber(1.01, rates), 2, KEY)
    jax.effects_barrier()
    assert rates == [1.0, 0.5, 0.25, 0.125]
    assert caught.value.exit_code == 4


def test_steps_are_counted_over_all_stages(net):
    found = synthesize_images(net, climber(14.5, stages=(10, 10)), 2, KEY)
    assert found.notes == again(15)
    assert top(found) == pytest.approx(15, rel=1e-4)  # the first stage keeps its rate
    with pytest.raises(DivergedError, match="at step 13 in each of 4"):
        synthesize_images(net, climber(10.3, stages=(10, 10)), 2, KEY)


def stop_at(call):
    """A progress callback that is interrupted at its so manieth call."""
    calls = []

    def on_progress(_):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    return on_progress


@pytest.mark.parametrize("call", [1, 2, 5, 7])
def test_a_run_killed_before_or_after_divergence_ends_the_same(call, net, tmp_path):
    """Calls 1-2 are the first attempt, 3-6 the second, 7 is of the next batch."""
    wild = climber(15.0, stages=(20,), source=Source(below_zero))
    whole = synthesize_images(net, wild, 4, KEY)
    assert [note[:22] for note in whole.notes] == [
        "batch 0 diverged at st",
        "batch 1 diverged at st",
    ]
    with pytest.raises(KeyboardInterrupt):
        synthesize_images(
            net, wild, 4, KEY, place=Place(tmp_path), watch=Watcher(progress=stop_at(call))
        )
    found = synthesize_images(net, wild, 4, KEY, place=Place(tmp_path))
    np.testing.assert_array_equal(found.images, whole.images)
    assert (found.losses, found.notes) == (whole.losses, whole.notes)


@pytest.mark.parametrize("mode", ["apart", "together"])
def test_several_devices_tell_the_same(mode, net):
    one = synthesize_images(net, climber(30.0), 4, KEY)
    found = synthesize_images(
        net, climber(30.0), 4, KEY, machine=Machine(2, together=mode == "together")
    )
    assert len(found.notes) == 2
    assert found.notes == one.notes
    np.testing.assert_allclose(found.images, one.images, rtol=1e-6, atol=1e-6)


def test_batches_that_take_turns_are_told_of_as_one(net):
    still = Memory(start=lambda *_: jnp.zeros(()))
    wild = climber(5.5, stages=(10,), turns=True, memory=still)
    found = synthesize_images(net, wild, 6, KEY)
    (note,) = found.notes
    assert note.startswith("the optimisation of 3 batches diverged at step 1")
    assert note.endswith(" and was made again at 1/2 of the learning rate")


def test_keys_of_attempts_are_all_different():
    """Also from those that the first attempt splits off, which `fold_in` finds as well."""
    split = jax.random.split(KEY, 3)
    np.testing.assert_array_equal(
        jax.random.key_data(split[1]), jax.random.key_data(jax.random.fold_in(KEY, 1))
    )
    keys = [*split, *(key_of(KEY, attempt) for attempt in range(4))]
    assert len({tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}) == 7
    assert key_of(KEY, 0) is KEY
