"""LSTM, GRU and plain recurrent layers of PyTorch and ONNX: one node for each direction.

They begin with a state of zeros; the state after the last step is the output there, and what an
LSTM keeps to itself then is a second node, which runs the layer again where somebody reads it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Cell, Recurrent
from dfq_jax.io.importing import arrange
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.values import Dim, Value, new_dim

Array = np.ndarray
RecurrentOutputs = tuple[Value | None, ...]
GATES: dict[Cell, int] = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
ORDER: dict[Cell, tuple[int, ...]] = {
    "lstm": (0, 3, 1, 2),
    "gru": (1, 0, 2),
    "tanh": (0,),
    "relu": (0,),
}
"""ONNX's order of gates, as indices into PyTorch's."""


class CellWeights(NamedTuple):
    """One direction: (gates x hidden, in), (gates x hidden, hidden), and two biases."""

    given: Array
    state: Array
    bias: Array
    state_bias: Array


class Ran(NamedTuple):
    """One direction: (steps, batch, hidden); the last state and memory, (1, batch, hidden)."""

    outputs: Value
    state: Value
    memory: Value | None


def run(
    b: Builder, x: Value, ops: Sequence[Recurrent], weights: Sequence[CellWeights]
) -> list[Ran]:
    """Each direction over (steps, batch, features)."""
    steps, batch, features = x.dims
    if b.inner(batch):
        raise UnsupportedModelError(f"it reads shape {x.shape}, whose batch is not its own axis.")
    source = b.stored(x, (steps, features))
    made = []
    for op, w in zip(ops, weights, strict=True):
        if w.given.shape[1] != x.shape[2]:
            raise UnsupportedModelError(
                f"it reads {x.shape[2]} features; its weights have {w.given.shape[1]}."
            )
        weight = {"input": w.given.T, "state": w.state.T}
        slots = {**weight, "bias": w.bias, "state_bias": w.state_bias}
        hidden: Dim = new_dim(w.state.shape[1])
        y = Value(b.add(op, (source,), slots), (steps, hidden), (steps, batch, hidden))
        state = arrange.unsqueezed(arrange.selected(b, y, 0, 0 if op.reverse else -1), 0)
        made.append(Ran(y, state, remembered(b, source, op, slots, batch)))
    return made


def remembered(
    b: Builder, source: str, op: Recurrent, slots: Mapping[str, Array], batch: Dim
) -> Value | None:
    """What an LSTM keeps to itself after its last step, (1, batch, hidden)."""
    if op.cell != "lstm":
        return None
    hidden = new_dim(slots["state"].shape[0])
    name = b.add(dataclasses.replace(op, remembers=True), (source,), slots)
    return Value(name, (hidden,), ((), batch, hidden))


def joined(b: Builder, parts: Sequence[Value | None], axis: int) -> Value | None:
    """The parts beside each other; None if there are none."""
    known = [part for part in parts if part is not None]
    return arrange.joined(b, known, axis) if known else None


def zeros_only(state: Any, what: str) -> None:
    """Refuses a first state other than zeros.

    Raises:
      UnsupportedModelError: if it is computed, or not zero.
    """
    if state is None or (isinstance(state, np.ndarray) and not state.any()):
        return
    raise UnsupportedModelError(f"{what} other than zeros; leave it out when exporting.")


def torch_layer(
    cell: Cell,
    b: Builder,
    x: Value,
    hx: Any,
    params: Sequence[Array],
    has_biases: bool,
    num_layers: int,
    dropout: float | int,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> RecurrentOutputs:
    """lstm.input, gru.input, rnn_tanh.input, rnn_relu.input."""
    for state in hx if isinstance(hx, tuple) else (hx,):
        zeros_only(state, "a first state")
    if train and dropout:
        raise UnsupportedModelError("dropout in training mode; call model.eval() first.")
    if len(x.dims) != 3:
        raise UnsupportedModelError(f"it reads shape {x.shape}; expected one with a batch.")
    ways = 2 if bidirectional else 1
    count = 4 if has_biases else 2
    if len(params) != num_layers * ways * count:
        raise UnsupportedModelError("projected states, or weights in an unknown number.")
    y = arrange.swapped(x, 0, 1) if batch_first else x
    ran: list[Ran] = []
    ops = [Recurrent(cell, reverse) for reverse in (False, True)[:ways]]
    for layer in range(num_layers):
        first = layer * ways * count
        groups = [params[i : i + count] for i in range(first, first + ways * count, count)]
        made = run(b, y, ops, [of_torch(cell, group) for group in groups])
        ran += made
        y = arrange.joined(b, [m.outputs for m in made], 2)
    shown = arrange.joined(b, [m.state for m in ran], 0)
    kept = joined(b, [m.memory for m in ran], 0)
    return arrange.swapped(y, 0, 1) if batch_first else y, shown, kept


def of_torch(cell: Cell, group: Sequence[Array]) -> CellWeights:
    """One direction's parameters with their gates in ONNX's order."""
    if not all(isinstance(p, np.ndarray) for p in group):
        raise UnsupportedModelError("weights that the network computes.")
    rows = group[0].shape[0]
    none = np.zeros(rows, np.float32)
    parts = [*group, none, none][:4]
    turned = (
        p.reshape(GATES[cell], -1, *p.shape[1:])[list(ORDER[cell])].reshape(p.shape) for p in parts
    )
    return CellWeights(*turned)


def onnx_layer(
    kind: str,
    b: Builder,
    x: Value,
    weight: Any,
    state: Any,
    biases: Any = None,
    lengths: Any = None,
    first: Any = None,
    kept: Any = None,
    peepholes: Any = None,
    direction: str = "forward",
    activations: Sequence[str] | None = None,
    linear_before_reset: int = 0,
    layout: int = 0,
) -> RecurrentOutputs:
    """LSTM, GRU, RNN of ONNX."""
    if not all(isinstance(p, np.ndarray) for p in (weight, state)):
        raise UnsupportedModelError("weights that the network computes.")
    for value, what in (
        (first, "a first state"),
        (kept, "a first state"),
        (peepholes, "peepholes"),
    ):
        zeros_only(value, what)
    x = arrange.swapped(x, 0, 1) if layout else x
    if lengths is not None and not (
        isinstance(lengths, np.ndarray) and (lengths == x.shape[0]).all()
    ):
        raise UnsupportedModelError("sequences of different lengths.")
    ways = weight.shape[0]
    cell = cell_of(kind, activations, ways)
    turns = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
    ops = [Recurrent(cell, reverse, bool(linear_before_reset)) for reverse in turns]
    rows = weight.shape[1]
    both = np.zeros((ways, 2 * rows), np.float32) if biases is None else biases
    weights = [
        CellWeights(weight[i], state[i], both[i, :rows], both[i, rows:]) for i in range(len(ops))
    ]
    made = run(b, x, ops, weights)
    y = arrange.joined(b, [arrange.unsqueezed(m.outputs, 1) for m in made], 1)
    states = [arrange.joined(b, [m.state for m in made], 0), joined(b, [m.memory for m in made], 0)]
    if layout:
        ends = (s if s is None else arrange.swapped(s, 0, 1) for s in states)
        return arrange.permuted(y, (2, 0, 1, 3)), *ends
    return y, *states


def cell_of(kind: str, activations: Sequence[str] | None, ways: int) -> Cell:
    """Which cell an ONNX operator with these activations is.

    Raises:
      UnsupportedModelError: if it has others than the usual ones.
    """
    usual: dict[str, dict[tuple[str, ...], Cell]] = {
        "LSTM": {("Sigmoid", "Tanh", "Tanh"): "lstm"},
        "GRU": {("Sigmoid", "Tanh"): "gru"},
        "RNN": {("Tanh",): "tanh", ("Relu",): "relu"},
    }
    known = usual[kind]
    given = tuple(activations) if activations else next(iter(known)) * ways
    for names, cell in known.items():
        if given == names * ways:
            return cell
    raise UnsupportedModelError(f"activations {given}.")
