"""Several sets of variables in one optimisation: at each step it is the turn of one of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from dfq_jax.optim.steps import Optimizer


def whose_turn(step: Int[Array, ""], turns: int) -> Int[Array, ""]:
    """Whose turn it is: every round visits all, in an order of its own.

    Args:
      step: steps taken so far.
      turns: how many take turns (static).

    Returns:
      0..turns-1.
    """
    if turns == 1:
        return jnp.zeros((), jnp.int32)
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), step // turns), turns)
    return order[step % turns]


def own(tree: PyTree, turn: Int[Array, ""], turns: int) -> PyTree:
    """The part of a stacked tree whose turn it is; a tree of one turn is not stacked."""
    if turns == 1:
        return tree
    return jax.tree.map(lambda v: jax.lax.dynamic_index_in_dim(v, turn, keepdims=False), tree)


def of_each(optimizer: Optimizer, turns: int) -> optax.GradientTransformationExtraArgs:
    """`taking_turns` of an optimizer that is yet to be made."""
    return taking_turns(optimizer(), turns)


class TurnsState(NamedTuple):
    """Steps taken so far, and the state of each optimizer, stacked."""

    step: Int[Array, ""]
    each: PyTree


def taking_turns(
    optimizer: optax.GradientTransformation, turns: int
) -> optax.GradientTransformationExtraArgs:
    """One optimizer for each of `turns` sets of variables, stacked along the first axis.

    At each step only the one whose turn it is (`whose_turn`) sees its gradient and moves.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> TurnsState:
        return TurnsState(jnp.zeros((), jnp.int32), jax.vmap(inner.init)(params))

    def update(updates, state, params=None, **extra):
        turn = whose_turn(state.step, turns)
        mine = lambda tree: own(tree, turn, turns)
        change, moved = inner.update(mine(updates), mine(state.each), mine(params), **extra)
        put = lambda whole, part: whole.at[turn].set(part)
        nothing = jax.tree.map(jnp.zeros_like, updates)
        each = jax.tree.map(put, state.each, moved)
        return jax.tree.map(put, nothing, change), TurnsState(state.step + 1, each)

    return optax.GradientTransformationExtraArgs(init, update)
