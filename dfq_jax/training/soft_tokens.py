"""Soft tokens: what a generator makes of rows of ids, for students that learn without text.

Tokens let no gradient pass. A generator's chances of tokens do, times a table of what tokens stand
for: such rows are shown to teacher and student in place of what their own tables give.

Reference:
  Zhu et al. 2023, "Zero-Shot Sharpness-Aware Quantization for Pre-trained Language Models".
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import Constant
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.tasks import predicts_tokens
from dfq_jax.graph.token_ops import Embed
from dfq_jax.types import Tokens


def table_of(model: Model) -> str:
    """The node that looks up what tokens stand for.

    Raises:
      UnsupportedModelError: if the network predicts no tokens, or reads its ids otherwise.
    """
    alone = len(model.inputs) == 1 and isinstance(model.inputs[0], Tokens)
    readers = [node for node in model.graph.nodes if set(node.inputs) & set(model.graph.inputs)]
    looked_up = len(readers) == 1 and isinstance(readers[0].op, Embed)
    if not (alone and looked_up and predicts_tokens(model)):
        raise UnsupportedModelError(
            "soft tokens are for networks that read one row of ids by one table and predict the "
            f"next; this one's ids are read by {[node.name for node in readers]}. Take GPTQ's "
            'rounding instead (`dfq.quantize(model, preset="balanced")`).'
        )
    return readers[0].name


def behind_table(model: Model, table: str) -> Model:
    """The network without its table: it reads what tokens stand for, Float[b length width]."""
    nodes = tuple(node for node in model.graph.nodes if node.name != table)
    graph = Graph(nodes, (table,), model.graph.outputs)
    params = {name: slots for name, slots in model.params.items() if name != table}
    return Model(graph, params, ())


def generator_at_first(model: Model, table: str) -> dict[str, PyTree]:
    """A generator before its first step: the network itself, and its table.

    Returns:
      `weights`: {node: {slot: array}} of the network; `tokens`: what soft tokens are made of.
    """
    trained = [node.name for node in model.graph.nodes if not isinstance(node.op, Constant)]
    real = lambda v: jnp.issubdtype(v.dtype, jnp.floating)
    weights = {
        name: {slot: v for slot, v in model.params[name].items() if real(v)}
        for name in trained
        if name in model.params
    }
    return {"weights": weights, "tokens": model.params[table]["table"]}


def soft_tokens(
    generator: PyTree, model: Model, ids: Int[Array, "b length"]
) -> Float[Array, "b length width"]:
    """Rows that a generator makes of ids: its chances of every next token, times its table.

    A(G(z)) = softmax(scores of G at z) E
    """
    scores = evaluate(with_params(model, generator["weights"]), ids)[0][0]
    return jax.nn.softmax(scores) @ generator["tokens"]
