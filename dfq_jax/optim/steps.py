"""What a step does: one descent, or several players in turn, each with a part of the variables.

A step is a value, as all it is made of are: equal ones share their compiled programs.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from dfq_jax.values import bound


class Now(NamedTuple):
    """Where in a run an objective is evaluated.

    Attributes:
      key: fresh randomness for this step.
      step: steps taken so far.
      memory: what the objective returned as its memory a step ago.
    """

    key: Key[Array, ""]
    step: Int[Array, ""]
    memory: PyTree = ()


Objective = Callable[
    [PyTree, PyTree, Now], tuple[Float[Array, ""], tuple[Mapping[str, Any], PyTree]]
]
"""`objective(x, context, now) -> (loss, (parts, memory))`; only `x` is differentiated."""
Optimizer = Callable[[], optax.GradientTransformation]
"""Makes an optimizer, so that equal ones are equal values: `bound(optax.adam, 1e-3)`."""


class Moving(NamedTuple):
    """What a step changes.

    Attributes:
      x: variables.
      opt: what optimizers remember.
      memory: what objectives do.
    """

    x: PyTree
    opt: PyTree
    memory: PyTree


class Step(NamedTuple):
    """A way to take steps.

    Attributes:
      begin: variables -> what optimizers remember before the first.
      take: (what changes, context, now) -> what it is a step later, the loss before it, its parts.
    """

    begin: Callable[[PyTree], PyTree]
    take: Callable[
        [Moving, PyTree, Now], tuple[Moving, Float[Array, ""], Mapping[str, Float[Array, "..."]]]
    ]


def descent(objective: Objective, optimizer: Optimizer) -> Step:
    """Steps down the gradient of an objective.

    Args:
      objective: pure; of a module, or `bound`, so that equal ones compile once.
      optimizer: makes the optax transform, which receives `value=loss`, so plateau rules work.
    """
    return Step(bound(begun, optimizer), bound(descended, objective, optimizer))


def begun(optimizer: Optimizer, x: PyTree) -> PyTree:
    """What an optimizer remembers before the first step."""
    return optimizer().init(x)


def descended(
    objective: Objective, optimizer: Optimizer, state: Moving, context: PyTree, now: Now
) -> tuple[Moving, Float[Array, ""], Mapping[str, Any]]:
    """One step of `descent`."""
    update = optax.with_extra_args_support(optimizer()).update
    slope = jax.value_and_grad(objective, has_aux=True)
    (loss, (parts, memory)), grads = slope(state.x, context, now)
    with jax.numpy_dtype_promotion("standard"):  # Adam raises floats to integer powers
        updates, opt = update(grads, state.opt, state.x, value=loss)
        x = optax.apply_updates(state.x, updates)
    return Moving(x, opt, memory), loss, parts


class Player(NamedTuple):
    """One of several that move in turn, each its own variables.

    Attributes:
      name: under which the variables, what optimizers and objectives remember, and parts of the
        loss are its own.
      step: how it moves; its context is `Among`.
      times: steps it takes while the others take theirs.
      after: rounds before it moves: until then its objective is heard and remembers, no more.
    """

    name: str
    step: Step
    times: int = 1
    after: int = 0


class Among(NamedTuple):
    """What a player is given.

    Attributes:
      context: what all are given.
      others: {player: its variables}, which stand still meanwhile.
    """

    context: PyTree
    others: Mapping[str, PyTree]


def in_turn(*players: Player) -> Step:
    """Players who move one after the other, each where the ones before it in the round have got to.

    Variables and memory are `{player: its own}`. A step is a round; its loss is the sum of the
    last losses of all, its parts are theirs, as `player/part`.

    Raises:
      ValueError: for two players of one name, or one that never moves.
    """
    names = [player.name for player in players]
    if len(set(names)) < len(names) or any(p.times < 1 or p.after < 0 for p in players):
        raise ValueError(
            "in_turn() needs names that differ, times >= 1 and after >= 0, got "
            f"{[(player.name, player.times, player.after) for player in players]}."
        )
    return Step(bound(all_begun, players), bound(round_of, players))


def all_begun(players: tuple[Player, ...], x: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """What the optimizers of all players remember before the first round."""
    return {player.name: player.step.begin(x[player.name]) for player in players}


def round_of(
    players: tuple[Player, ...], state: Moving, context: PyTree, now: Now
) -> tuple[Moving, Float[Array, ""], Mapping[str, Float[Array, "..."]]]:
    """One step of `in_turn`."""
    total, told = jnp.zeros(()), {}
    for index, player in enumerate(players):
        own = now._replace(key=jax.random.fold_in(now.key, index))
        state, (losses, parts) = moved(player, state, context, own)
        total += losses[-1]
        told |= {f"{player.name}/{name}": value[-1] for name, value in parts.items()}
        told[f"{player.name}/loss"] = losses[-1]
    return state, total, told


def moved(
    player: Player, state: Moving, context: PyTree, now: Now
) -> tuple[Moving, tuple[Float[Array, " times"], Mapping[str, Float[Array, "times ..."]]]]:
    """All after the steps of one player in a round, and its losses and their parts by step."""
    name, mine = player.name, Moving(*(each[player.name] for each in state))
    given = Among(context, {k: v for k, v in state.x.items() if k != name})

    def one(own: Moving, time: Int[Array, ""]):
        key, step = jax.random.fold_in(now.key, time), now.step * player.times + time
        own, loss, parts = player.step.take(own, given, Now(key, step, own.memory))
        return own, (loss, parts)

    mine, told = jax.lax.scan(one, mine, jnp.arange(player.times))
    if player.after:
        moves = lambda new, old: jnp.where(now.step < player.after, old, new)
        still = jax.tree.map(moves, mine[:2], tuple(each[name] for each in state[:2]))
        mine = Moving(still[0], still[1], mine.memory)
    return Moving(*({**all_, name: own} for all_, own in zip(state, mine, strict=True))), told
