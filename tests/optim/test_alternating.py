from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.optim.alternating import own, taking_turns, whose_turn
from dfq_jax.optim.schedules import reduce_on_plateau

TURNS = 3


def turn_at(step, turns=TURNS):
    return int(whose_turn(jnp.array(step, jnp.int32), turns))


@pytest.fixture(scope="module")
def visits():
    """Whose turn it is in twelve rounds."""
    steps = jnp.arange(12 * TURNS, dtype=jnp.int32)
    return np.asarray(jax.jit(jax.vmap(lambda step: whose_turn(step, TURNS)))(steps))


def test_every_round_visits_all_in_an_order_of_its_own(visits):
    rounds = visits.reshape(12, TURNS)
    np.testing.assert_array_equal(np.sort(rounds, axis=1), np.tile(np.arange(TURNS), (12, 1)))
    assert len({tuple(order) for order in rounds}) > 3


def test_turns_depend_on_the_step_alone(visits):
    assert [turn_at(step) for step in (0, 7, 20)] == [visits[step] for step in (0, 7, 20)]


def test_one_turn_is_always_the_same():
    assert [turn_at(step, 1) for step in range(3)] == [0, 0, 0]


def test_own_part_of_a_stacked_tree():
    tree = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.arange(3)}
    mine = own(tree, jnp.array(2), 3)
    assert mine["a"].tolist() == [4, 5]
    assert int(mine["b"]) == 2
    alone = {"a": jnp.ones((1, 2))}
    assert own(alone, jnp.array(0), 1) is alone


def rule():
    """An optimizer with moments, a count and a reaction to the loss."""
    return optax.chain(optax.adam(0.1), reduce_on_plateau(factor=0.5, patience=1))


def test_each_moves_as_it_would_alone(visits):
    """Three optimizers in turn: the same values as three runs of their own, bit for bit."""
    rng = np.random.default_rng(0)
    steps = 7 * TURNS
    grads = jnp.asarray(rng.normal(size=(steps, TURNS, 4)), jnp.float32)
    losses = jnp.asarray(rng.uniform(1, 2, steps), jnp.float32)
    start = jnp.asarray(rng.normal(size=(TURNS, 4)), jnp.float32)
    together, single = taking_turns(rule(), TURNS), optax.with_extra_args_support(rule())
    move = jax.jit(lambda g, s, x, v: together.update(g, s, x, value=v))
    alone = jax.jit(lambda g, s, x, v: single.update(g, s, x, value=v))
    with jax.numpy_dtype_promotion("standard"):
        x: Any = start
        state: Any = together.init(start)
        each: list[Any] = [(start[i], single.init(start[i])) for i in range(TURNS)]
        for step in range(steps):
            change, state = move(grads[step], state, x, losses[step])
            turn = int(visits[step])
            others = np.delete(np.asarray(change), turn, axis=0)
            np.testing.assert_array_equal(others, 0)
            x = optax.apply_updates(x, change)
            value, own_state = each[turn]
            change, own_state = alone(grads[step, turn], own_state, value, losses[step])
            each[turn] = (optax.apply_updates(value, change), own_state)
    wanted = np.stack([np.asarray(value) for value, _ in each])
    np.testing.assert_array_equal(x, wanted)
    assert np.abs(wanted - start).min() > 0
    assert int(state.step) == steps
    scales = {float(s[1].scale) for _, s in each}
    assert min(scales) < 1  # the rule saw plateaus in its own losses


def test_gradients_of_others_are_not_looked_at():
    """A gradient that is no number moves only whose it is."""
    together = taking_turns(optax.sgd(1.0), TURNS)
    x = jnp.zeros((TURNS, 2))
    turn = turn_at(0)
    grads = jnp.full((TURNS, 2), jnp.nan).at[turn].set(1.0)
    change, _ = together.update(grads, together.init(x), x)
    wanted = np.zeros((TURNS, 2))
    wanted[turn] = -1
    np.testing.assert_array_equal(change, wanted)
