"""Recurrent layers as ONNX nodes: steps before images there, and a direction of their own."""

from collections.abc import Mapping

import numpy as np

from dfq_jax.graph.ops import Recurrent
from dfq_jax.io.onnx.builder import Link, OnnxBuilder, WrittenNode

KINDS = {"lstm": "LSTM", "gru": "GRU", "tanh": "RNN", "relu": "RNN"}
FIRST_STEP = (1, 0, 2)
REMEMBERED = 2
"""Which output of ONNX's LSTM is its memory after the last step."""


def add_recurrent(b: OnnxBuilder, op: Recurrent, step: WrittenNode) -> None:
    """Adds one direction of a recurrent layer."""
    slots, name = step.slots, step.name
    how = {
        "hidden_size": step.result[-1],
        "direction": "reverse" if op.reverse else "forward",
    }
    if op.cell == "gru":
        how["linear_before_reset"] = int(op.reset_after)
    if op.cell == "relu":
        how["activations"] = ["Relu"]
    turned = Link("Transpose", (), {"perm": FIRST_STEP})
    weights = (slots["input"], slots["state"], slots["biases"])
    if op.remembers:
        layer = Link(KINDS[op.cell], weights, {**how, "place": REMEMBERED})
        links = (turned, layer, Link("Squeeze", (b.integers(f"{name}.direction", (0,)),)))
    else:
        only = Link("Squeeze", (b.integers(f"{name}.direction", (1,)),))
        links = (turned, Link(KINDS[op.cell], weights, how), only, turned)
    b.chain(name, step.args[0], links, step.output)


def filed_recurrent(slots: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of one direction as ONNX reads them: gates first, an axis for directions."""
    return {
        "input": slots["input"].T[None],
        "state": slots["state"].T[None],
        "biases": np.concatenate([slots["bias"], slots["state_bias"]])[None],
    }
