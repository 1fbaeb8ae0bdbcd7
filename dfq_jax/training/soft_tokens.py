"""Language models on levels that learn without text: from soft tokens of a generator in turn.

Tokens let no gradient pass. A generator's chances of tokens do, times a table of what tokens stand
for: such rows are shown to teacher and student in place of what their own tables give.

Reference:
  Zhu et al. 2023, "Zero-Shot Sharpness-Aware Quantization for Pre-trained Language Models".
"""

import math
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from dfq_jax.errors import DivergedError, UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import Constant
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.tasks import predicts_tokens
from dfq_jax.graph.token_ops import Embed
from dfq_jax.numerics.softmax import divergence
from dfq_jax.optim.fit import fit
from dfq_jax.optim.steps import Among, Now, Player, Step, descent, in_turn
from dfq_jax.quantization.plan import Plan
from dfq_jax.quantization.simulate import QuantizedModel, simulation_hook
from dfq_jax.training.engine import TrainingReport
from dfq_jax.training.student import (
    StudentKind,
    StudentStart,
    finished,
    float_student,
    kernel_codes,
    share_changed,
    student_hook,
    student_start,
    trained_at_first,
)
from dfq_jax.training.wrappers import Heard, LossParts, at_sharpest
from dfq_jax.types import Tokens
from dfq_jax.values import bound

STUDENT, GENERATOR = "student", "generator"
AT_ONCE = 8
"""Rows that are judged together."""


class SoftTokenTraining(NamedTuple):
    """How a language model on levels learns from soft tokens.

    Attributes:
      name: of the method.
      steps: of the student, and of the generator.
      batch: rows of a step.
      student: what it is.
      learning_rate: of the student's Adam.
      generator_rate: of the generator's.
      reach: rho, how far the student's variables are moved to where the loss grows.
    """

    name: str
    steps: int
    batch: int
    student: StudentKind
    learning_rate: float
    generator_rate: float
    reach: float


class TokensTaught(NamedTuple):
    """What both players are given, and neither trains.

    Attributes:
      teacher: the float network.
      start: what of the student is not trained.
      seeds: rows of ids that the generator goes on from.
    """

    teacher: Model
    start: StudentStart
    seeds: Int[Array, "n length"]


def trained_on_soft_tokens(
    quantized: QuantizedModel,
    teacher: Model,
    rows: Int[Array, "n length"],
    held_out: Int[Array, "m length"],
    method: SoftTokenTraining,
    key: Key[Array, ""],
) -> tuple[QuantizedModel, TrainingReport]:
    """Trains a language model on its levels without text.

    Args:
      quantized: where the student begins.
      teacher: the float network, node for node the same.
      rows: ids that seed the generator, e.g. of `recipes.rows.rows_of`.
      held_out: others, that judge.
      method: how they learn, e.g. `recipes.zsaq`.
      key: the only source of randomness.

    Returns:
      The trained network, or the one it began as where that is nearer to the teacher; and how it
      went, distances being KL of the next token in nats.

    Raises:
      UnsupportedModelError: for a network that predicts no tokens, or reads ids in another way than
        by one table.
      UsageError: if there are fewer rows than a step takes.
      DivergedError: if a loss was no number.
    """
    began = time.perf_counter()
    if len(rows) < method.batch:
        raise UsageError(
            f"{method.name} takes {method.batch} rows a step and there are {len(rows)}: make more, "
            "or give it a smaller batch."
        )
    table = table_of(teacher)
    start = student_start(method.student, quantized, None)
    first = trained_at_first(method.student, quantized.plan, start)
    begun = {STUDENT: first, GENERATOR: generator_at_first(teacher, table)}
    taught, step = TokensTaught(teacher, start, rows), step_of_tokens(method, quantized.plan)
    forgetful = dict.fromkeys(begun, ())
    result = fit(step, begun, taught, steps=method.steps, key=key, memory=forgetful)
    if result.status == "diverged":
        raise DivergedError(
            f"training by {method.name} diverged at step {result.steps}: use more bits, or a lower "
            "learning rate."
        )
    learned = result.x[STUDENT]
    made = finished(method.student, quantized.plan, learned, start, {})
    before, after = (token_distance(teacher, each, held_out) for each in (quantized, made))
    kept = math.isfinite(after) and after <= before
    codes = partial(kernel_codes, method.student, quantized.plan, start=start)
    changed = float(share_changed(codes(first), codes(learned)))
    seconds = time.perf_counter() - began
    told = (method.name, method.steps, before, after, kept, changed, seconds, ())
    return made if kept else quantized, TrainingReport(*told)


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


def discrepancy(
    how: tuple[StudentKind, Plan],
    x: PyTree,
    taught: TokensTaught,
    rows: Float[Array, "b length width"],
) -> Float[Array, ""]:
    """D: KL of the student's next tokens from the teacher's, meant over rows and places."""
    kind, plan = how
    table = table_of(taught.teacher)
    exact = evaluate(behind_table(taught.teacher, table), rows)[0][0]
    hook = student_hook(kind, plan, x, taught.start, {})
    student = behind_table(float_student(kind, x, taught.start), table)
    return divergence(exact, evaluate(student, rows, hook=hook)[0][0])


def drawn_seeds(taught: TokensTaught, batch: int, key: Key[Array, ""]) -> Int[Array, "b length"]:
    """Rows of ids for a step."""
    return taught.seeds[jax.random.permutation(key, len(taught.seeds))[:batch]]


def step_of_tokens(method: SoftTokenTraining, plan: Plan) -> Step:
    """A round: the generator climbs the discrepancy, the student descends it where it is worst."""
    how = (method.student, plan)
    climbing = descent(
        bound(generator_loss, how, method.batch), bound(optax.adam, method.generator_rate)
    )
    descending = descent(
        bound(student_loss, how, method.batch, method.reach),
        bound(optax.adam, method.learning_rate),
    )
    return in_turn(Player(GENERATOR, climbing), Player(STUDENT, descending))


def generator_loss(
    how: tuple[StudentKind, Plan], batch: int, x: PyTree, among: Among, now: Now
) -> tuple[Float[Array, ""], tuple[dict[str, Array], PyTree]]:
    """`-D` of what the generator makes."""
    taught: TokensTaught = among.context
    rows = soft_tokens(x, taught.teacher, drawn_seeds(taught, batch, now.key))
    apart = discrepancy(how, among.others[STUDENT], taught, rows)
    return -apart, ({"D": apart}, ())


def student_loss(
    how: tuple[StudentKind, Plan], batch: int, reach: float, x: PyTree, among: Among, now: Now
) -> tuple[Float[Array, ""], tuple[dict[str, Array], PyTree]]:
    """`D` at the variables moved to where it grows (SAM)."""
    taught: TokensTaught = among.context
    seeds = drawn_seeds(taught, batch, now.key)
    rows = jax.lax.stop_gradient(soft_tokens(among.others[GENERATOR], taught.teacher, seeds))

    def loss(variables: PyTree, shown: Array) -> LossParts:
        return discrepancy(how, variables, taught, shown), Heard({}, {})

    worst, _ = at_sharpest(reach, loss, x, rows)
    return worst, ({"D": worst}, ())


def token_distance(
    teacher: Model, quantized: QuantizedModel, rows: Int[Array, "n length"]
) -> float:
    """KL of the next token from the teacher's in nats, meant over rows of ids and places."""
    parts = [rows[at : at + AT_ONCE] for at in range(0, len(rows), AT_ONCE)]
    each = [float(token_gap(teacher, quantized, part)) * len(part) for part in parts]
    return sum(each) / len(rows)


@jax.jit
def token_gap(
    teacher: Model, quantized: QuantizedModel, rows: Int[Array, "n length"]
) -> Float[Array, ""]:
    """`token_distance` of some rows."""
    hook = simulation_hook(quantized.plan, quantized.qparams)
    rough = evaluate(quantized.model, rows, hook=hook)[0][0]
    return divergence(evaluate(teacher, rows)[0][0], rough)
