"""Recurrent layers as ONNX nodes: steps before images there, and a direction of their own."""

from collections.abc import Mapping

import numpy as np

from dfq_jax.graph.ops import Recurrent
from dfq_jax.io.onnx_builder import Link, OnnxBuilder, Step

KINDS = {"lstm": "LSTM", "gru": "GRU", "tanh": "RNN", "relu": "RNN"}
FIRST_STEP = (1, 0, 2)


def add_recurrent(b: OnnxBuilder, op: Recurrent, step: Step) -> None:
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
    turned = {"perm": FIRST_STEP}
    links = (
        Link("Transpose", (), turned),
        Link(KINDS[op.cell], (slots["input"], slots["state"], slots["biases"]), how),
        Link("Squeeze", (b.integers(f"{name}.direction", (1,)),)),
        Link("Transpose", (), turned),
    )
    b.chain(name, step.args[0], links, step.output)


def filed_recurrent(slots: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of one direction as ONNX reads them: gates first, an axis for directions."""
    return {
        "input": slots["input"].T[None],
        "state": slots["state"].T[None],
        "biases": np.concatenate([slots["bias"], slots["state_bias"]])[None],
    }
