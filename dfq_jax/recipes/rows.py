"""Examples of networks that read no images: text that a language model samples, or random rows.

Text that a network writes itself is what it was trained on, as far as it has learned it: Liu et al.
2024, "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", section 3.1, who
draw all tokens but the first few from the network, as all but the first are here.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dfq_jax.errors import UsageError, check_choice
from dfq_jax.examples import Evidence, Examples
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import LanguageModel, Task, parts_of, task_of
from dfq_jax.quantization.outputs import classes_last, parts_outputs
from dfq_jax.types import InputContract, Tokens, in_words

SAMPLED = "sampled"
ROW_METHODS = ("best", SAMPLED, "noise")
ROWS: Mapping[str, int] = {"fast": 16, "balanced": 32, "best": 64}
"""Rows of a preset: a row has as many positions as a small image."""
AT_ONCE = 8
"""Rows that are sampled together."""
RANDOM_ROWS = (
    "this network reads {}, of which nothing is known: its ranges come from random ones. Expect "
    "less accuracy than from real ones, and try the result on data of your own"
)


def method_of(model: Model, method: str, task: Task | None = None) -> str:
    """How rows are made: as asked, or what suits the network.

    Args:
      model: the network.
      method: one of `ROW_METHODS`.
      task: what the network is for, as somebody says; None for what its graph says.

    Raises:
      UsageError: for another method, or for text of what predicts no tokens.
    """
    check_choice("method", method, ROW_METHODS)
    writes = isinstance(task or task_of(model), LanguageModel) and len(model.inputs) == 1
    writes = writes and isinstance(model.inputs[0], Tokens)
    if method == SAMPLED and not writes:
        raise UsageError(
            f"method {SAMPLED!r} is for networks that predict the next token; this one reads "
            f'{in_words(model.inputs)}. Say `method="noise"`, or `task="language"` if it does.'
        )
    return (SAMPLED if writes else "noise") if method == "best" else method


def makes_rows(model: Model) -> bool:
    """Whether examples of a network's inputs are made here: of all but one image."""
    return not (len(model.inputs) == 1 and isinstance(model.inputs[0], InputContract))


def rows_of(
    model: Model, method: str, n: int, key: Key[Array, ""], task: Task | None = None
) -> Examples:
    """So many examples of what a network reads.

    Args:
      model: the network.
      method: one of `ROW_METHODS`.
      n: how many.
      key: the only source of randomness.
      task: what the network is for, as somebody says.

    Raises:
      UsageError: as `method_of`.
    """
    chosen = method_of(model, method, task)
    if chosen == SAMPLED:
        arrays, evidence = (sampled(model, n, key),), "statistics"
    else:
        keys = jax.random.split(key, len(model.inputs))
        arrays = tuple(x.example(k, n) for x, k in zip(model.inputs, keys, strict=True))
        evidence = "noise"
    notes = {} if chosen == SAMPLED else {"notes": [RANDOM_ROWS.format(in_words(model.inputs))]}
    found: Evidence = evidence
    return Examples(arrays, model.inputs, {"method": chosen, **notes}, found)


def sampled(model: Model, n: int, key: Key[Array, ""]) -> Int[Array, "n length"]:
    """Text that a language model writes: each token is drawn from its own probabilities.

    Args:
      model: it reads one row of ids, and says at every place which comes next.
      n: how many rows.
      key: the only source of randomness; a row does not depend on how many there are.
    """
    keys = jax.random.split(key, -(-n // AT_ONCE))
    return jnp.concatenate([written(model, k) for k in keys])[:n]


@jax.jit
def written(model: Model, key: Key[Array, ""]) -> Int[Array, "rows length"]:
    """`AT_ONCE` rows.

    Chances are drawn first, as Gumbel noise on the scores of every place. A row is then what is
    left as it is when each of its tokens is chosen anew behind those before it. That is found by
    choosing all places at once until none changes: the first that was wrong is right each time, so
    it ends after as many rounds as there are places at the latest, and mostly long before.
    """
    read, part = model.input, parts_of(model, LanguageModel())[0]
    length, vocabulary = read.shape[0], len(part.where[0])
    first, rest = jax.random.split(key)
    noise = jax.random.gumbel(rest, (AT_ONCE, length, vocabulary))
    begin = jnp.full((AT_ONCE,), getattr(read, "begin", None) or 0, jnp.int32)
    if getattr(read, "begin", None) is None:
        begin = jax.random.randint(first, (AT_ONCE,), 0, vocabulary)
    chosen = partial(next_tokens, model, noise)
    state = jnp.broadcast_to(begin[:, None], (AT_ONCE, length)), jnp.array(True)

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        ids, _ = state
        new = jnp.concatenate([begin[:, None], chosen(ids)[:, :-1]], axis=1)
        return new, jnp.any(new != ids)

    return jax.lax.while_loop(lambda state: state[1], again, state)[0]


def next_tokens(
    model: Model, noise: Float[Array, "n length ids"], ids: Int[Array, "n length"]
) -> Int[Array, "n length"]:
    """The token behind every place, drawn by this noise from the network's probabilities."""
    part = parts_of(model, LanguageModel())[0]
    scores = classes_last(part, parts_outputs(model, ids, (part,))[0])
    return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)
