"""Recurrent layers: what a step computes from its input and the state before it."""

from collections.abc import Mapping
from typing import assert_never

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dfq_jax.graph.ops import Recurrent

CellState = tuple[Float[Array, "n hidden"], Float[Array, "n hidden"]]
"""What is shown to the next layer, and what an LSTM remembers beside it."""


def recurrent(
    op: Recurrent, p: Mapping[str, Array], x: Float[Array, "n t cin"]
) -> Float[Array, "n *t hidden"]:
    """The outputs of all steps, from a state of zeros, or what is remembered after the last.

    Args:
      op: which cell, and the direction in which it runs.
      p: its parameters.
      x: one row for each step.

    Returns:
      One row for each step, in the order of the input; one row in all of what is remembered.
    """
    given = jnp.moveaxis(x @ p["input"] + p["bias"], 1, 0)
    zeros = jnp.zeros((x.shape[0], p["state"].shape[0]), x.dtype)

    def step(
        state: CellState, row: Float[Array, "n gates"]
    ) -> tuple[CellState, Float[Array, "n hidden"]]:
        state = following(op, p, state, row)
        return state, state[0]

    last, outputs = lax.scan(step, (zeros, zeros), given, reverse=op.reverse)
    return last[1] if op.remembers else jnp.moveaxis(outputs, 0, 1)


def following(
    op: Recurrent, p: Mapping[str, Array], state: CellState, row: Float[Array, "n gates"]
) -> CellState:
    """The state after a step.

    Args:
      op: which cell.
      p: its parameters.
      state: before it.
      row: the product of the step's input and `input`, with `bias`.

    Reference:
      Hochreiter & Schmidhuber 1997 for the LSTM, Cho et al. 2014 for the GRU.
    """
    shown, kept = state
    match op.cell:
        case "lstm":
            gates = row + shown @ p["state"] + p["state_bias"]
            enter, leave, stay, new = jnp.split(gates, 4, axis=-1)
            kept = jax.nn.sigmoid(stay) * kept + jax.nn.sigmoid(enter) * jnp.tanh(new)
            return jax.nn.sigmoid(leave) * jnp.tanh(kept), kept
        case "gru":
            width = shown.shape[-1]
            weight, bias = p["state"], p["state_bias"]
            gates = row[:, : 2 * width] + shown @ weight[:, : 2 * width] + bias[: 2 * width]
            update, reset = jnp.split(jax.nn.sigmoid(gates), 2, axis=-1)
            if op.reset_after:
                told = reset * (shown @ weight[:, 2 * width :] + bias[2 * width :])
            else:
                told = (reset * shown) @ weight[:, 2 * width :] + bias[2 * width :]
            new = jnp.tanh(row[:, 2 * width :] + told)
            return (1.0 - update) * new + update * shown, kept
        case "tanh":
            return jnp.tanh(row + shown @ p["state"] + p["state_bias"]), kept
        case "relu":
            return jax.nn.relu(row + shown @ p["state"] + p["state_bias"]), kept
        case _:
            assert_never(op.cell)
