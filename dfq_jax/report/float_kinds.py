"""What computes in float whatever the plan, and how much of a network that is."""

import dataclasses

from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import Activation, Op, Recurrent
from dfq_jax.graph.query import macs, recurrent_weights
from dfq_jax.graph.token_ops import Embed
from dfq_jax.quantization.sites import float_operators

CURVE_NAMES = {"gelu": "GELU", "gelu_tanh": "GELU", "elu": "ELU"}


@dataclasses.dataclass(frozen=True)
class FloatKind:
    """Operators of one kind that compute in float, whatever the plan, for one reason.

    Attributes:
      kind: what people call the operator.
      count: how many there are.
      reason: why they compute in float.
      macs: multiply-accumulates for one image, of recurrent layers.
      params: number of weights, of recurrent layers and tables that ids look up.
    """

    kind: str
    count: int
    reason: str
    macs: int = 0
    params: int = 0


def float_kinds(model: Model) -> tuple[FloatKind, ...]:
    """What computes in float under every plan, by kind and reason, with its work and weights."""
    reasons, work = float_operators(model.graph), macs(model)
    alike: dict[tuple[str, str], list[Node]] = {}
    for node in model.graph.nodes:
        if node.name in reasons:
            alike.setdefault((kind_of(node.op), reasons[node.name]), []).append(node)
    return tuple(
        FloatKind(
            kind,
            len(nodes),
            reason,
            sum(work.get(node.name, 0) for node in nodes),
            sum(float_weights(node, model) for node in nodes),
        )
        for (kind, reason), nodes in alike.items()
    )


def float_weights(node: Node, model: Model) -> int:
    """How many weights an operator has that computes in float: factors and biases count none."""
    slots = model.params.get(node.name, {})
    match node.op:
        case Recurrent() as op:
            return recurrent_weights(op, slots)
        case Embed():
            return slots["table"].size
        case _:
            return 0


def kind_of(op: Op) -> str:
    """What people call an operator."""
    if isinstance(op, Activation):
        return CURVE_NAMES.get(op.curve, op.curve.capitalize())
    return type(op).__name__
