"""What a unit trains, and the objective that a method gives to the one loop."""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree

from dfq_jax.graph.evaluate import Hook, Slots, Tensor, apply_tiled, evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.numerics.affine import Affine, fake_quantize
from dfq_jax.numerics.rounding import POSITIVE, Rounding
from dfq_jax.numerics.softmax import divergences
from dfq_jax.optim.chunk_data import Fed
from dfq_jax.optim.schedules import in_own_units
from dfq_jax.optim.steps import Now
from dfq_jax.quantization.plan import Plan, Site
from dfq_jax.reconstruction.batches import Rows, read_rows
from dfq_jax.reconstruction.borders import border_of, bordered
from dfq_jax.reconstruction.method import Penalty, Phase, Rates, Reconstruction, UnitSeen, predicted
from dfq_jax.values import Bound, bound


class Guide(NamedTuple):
    """A float unit that blocks are drawn to.

    Attributes:
      model: the unit.
      units: variances of what its blocks put out, by tensor.
    """

    model: Model
    units: Mapping[str, Float[Array, ""]]


class UnitContext(NamedTuple):
    """What an objective is given besides what it trains.

    Attributes:
      model: the unit, its kernels not rounded.
      qparams: its scales so far.
      fixed: what its rounding keeps, by layer.
      power: mean squared norm of the targets.
      rest: the float network behind the unit, for methods that look ahead.
      rows: of all images, where they lie on the device.
      guide: the float unit, for methods that are guided.
    """

    model: Model
    qparams: Mapping[Site, Affine]
    fixed: Mapping[str, Mapping[str, Array]]
    power: Float[Array, ""]
    rest: Model | None = None
    rows: Rows | None = None
    guide: Guide | None = None


def optimizer_of(rates: Rates, steps: int, factor: float = 1.0) -> optax.GradientTransformation:
    """Adam with a rate for each kind of variable, all by a factor."""
    falling = lambda rate: optax.adam(optax.cosine_decay_schedule(rate * factor, steps))
    own = lambda rate: optax.chain(falling(rate), in_own_units())
    sized = own if rates.relative else falling
    kinds: dict[Hashable, optax.GradientTransformation] = {
        "bits": falling(rates.bits) if rates.settling else optax.adam(rates.bits * factor),
        "scale": sized(rates.scale),
        "edges": sized(rates.edges),
        "biases": falling(rates.biases),
        "borders": falling(rates.borders),
    }

    def kind(path: tuple, leaf: Any) -> str:
        del leaf
        if path[0].key != "kernels":
            return path[0].key
        return "scale" if path[-1].key == "scale" else "bits"

    return optax.multi_transform(kinds, lambda x: jax.tree.map_with_path(kind, x))


Losses = tuple[Float[Array, ""], tuple[Mapping[str, Array], PyTree]]
"""What an objective gives: the sum, and its parts beside an empty memory."""


def objective_of(plan: Plan, method: Reconstruction, phase: Phase) -> Bound[Losses]:
    """The objective of a phase; units of equal structure have equal ones, and so compile once."""
    return bound(unit_loss, plan, method, phase)


def unit_loss(
    plan: Plan, method: Reconstruction, phase: Phase, x: PyTree, context: Fed, now: Now
) -> Losses:
    """The loss between a unit at work and in float, with what a method adds to it."""
    given: UnitContext = context.context
    rows = read_rows(given.rows, context.at(now.step))
    input_key, edge_key = jax.random.split(now.key)
    came = drawn(input_key, rows.rough.shape, phase.rough)
    shown = jnp.where(came, rows.rough, rows.exact)
    ahead = method.prediction is not None and rows.logits is not None
    if ahead:
        shown = jnp.concatenate([shown, rows.rough])
        came = jnp.concatenate([came, jnp.ones_like(came)])
    share = DrawnShare(edge_key, (shown, came) if phase.input_once else None)
    hook = training_hook(plan, method.rounding, phase, x, given, share)
    outputs = evaluate(given.model, shown, hook=hook, apply=apply_tiled)[0][0]
    outputs, last = outputs[: len(rows.exact)], outputs[len(rows.exact) :]
    parts = {"reconstruction": method.loss(seen(outputs, rows, given))}
    loss = parts["reconstruction"]
    if method.prediction is not None and rows.logits is not None:
        weight, temperature = method.prediction
        gaps = divergences(rows.logits, predicted(given.rest, last), temperature)
        parts["prediction"] = jnp.mean(gaps)
        loss += weight * parts["prediction"]
    parts["undecided"] = undecided(method.rounding, x["kernels"], method.penalty, now, phase)
    return loss + method.penalty.factor(now.step, phase.steps) * parts["undecided"], (parts, ())


def seen(outputs: Tensor, rows: Rows, given: UnitContext) -> UnitSeen:
    """What the loss looks at."""
    return UnitSeen(outputs, rows.targets, given.power, rows.slopes)


def undecided(
    rounding: Rounding, kernels: Mapping[str, PyTree], penalty: Penalty, now: Now, phase: Phase
) -> Float[Array, ""]:
    """How far soft bits are from a decision, summed over all weights."""
    exponent = penalty.exponent(now.step, phase.steps)
    return sum((rounding.undecided(t, exponent) for t in kernels.values()), jnp.zeros(()))


class DrawnShare(NamedTuple):
    """Which elements of activations are quantized in a step, where not all are.

    Attributes:
      key: of the draws.
      entering: what the unit reads, with which of its elements come from the quantized network;
        None to draw these too.
    """

    key: Key[Array, ""]
    entering: tuple[Tensor, Bool[Array, "..."]] | None = None


def training_hook(
    plan: Plan, rounding: Rounding, phase: Phase, x: PyTree, given: UnitContext, share: DrawnShare
) -> Hook:
    """Soft kernels, and activations of which a drawn share is quantized.

    Args:
      plan: of the unit.
      rounding: of its kernels.
      phase: what learns, and how much is quantized.
      x: what is trained.
      given: what is not.
      share: which elements are quantized.
    """
    table, snap = plan.table, activations_snapped(plan, phase, x, given, share)

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        args = tuple(snap(Site(node.name, i), v) for i, v in enumerate(args))
        kernel = Site(node.name)
        if node.name in x["kernels"]:
            fixed = given.fixed[node.name]
            soft = rounding.soft(x["kernels"][node.name], fixed, table[kernel].grid)
            slots = {**slots, "kernel": soft}
        elif kernel in table:
            snapped = fake_quantize(slots["kernel"], given.qparams[kernel], table[kernel].grid)
            slots = {**slots, "kernel": snapped}
        if node.name in x["biases"]:
            slots = {**slots, "bias": x["biases"][node.name]}
        return slots, args

    return hook


def activations_snapped(
    plan: Plan, phase: Phase, x: PyTree, given: UnitContext, share: DrawnShare
) -> Callable[[Site, Tensor], Tensor]:
    """(site, tensor) -> the tensor, a share of it quantized; see `training_hook`."""
    table = plan.table
    tensors = {site: tensor for tensor, sites in plan.groups for site in sites}
    numbers = {tensor: number for number, (tensor, _) in enumerate(plan.groups)}
    done: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # each tensor is rounded once

    def snap(site: Site, value: Tensor) -> Tensor:
        if site not in tensors or phase.quantized == 0:
            return value
        known = (tensors[site], id(value))
        if known not in done:
            done[known] = value, snapped_share(site, value)
        return done[known][1]

    def snapped_share(site: Site, value: Tensor) -> Tensor:
        tensor, affine = tensors[site], given.qparams[site]
        if tensor in x["edges"]:
            affine = Affine(jnp.maximum(x["edges"][tensor], POSITIVE), affine.zero_point)
        if tensor in x["borders"]:
            value = bordered(value, border_of(x["borders"][tensor]), affine.scale)
        rounded = fake_quantize(value, affine, table[site].grid)
        if share.entering is not None and value is share.entering[0]:
            return jnp.where(share.entering[1], rounded, value)
        return blended(
            jax.random.fold_in(share.key, numbers[tensor]), rounded, value, phase.quantized
        )

    return snap


def blended(key: Key[Array, ""], first: Tensor, second: Tensor, share: float) -> Tensor:
    """Elements of `first` with a probability, in 256ths, of `share`; else of `second`.

    Reference:
      Wei et al. 2022, "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training
      Quantization".
    """
    if share in (0, 1):
        return first if share else second
    return jnp.where(drawn(key, first.shape, share), first, second)


def drawn(key: Key[Array, ""], shape: tuple[int, ...], share: float) -> Bool[Array, "..."]:
    """True with a probability, in 256ths, of `share`; one random bit each where that is a half."""
    if share in (0, 1):
        return jnp.full(shape, bool(share))
    if share == 0.5:
        count = math.prod(shape)
        words = jax.random.bits(key, (-(-count // 32), 1), jnp.uint32)
        coins = (words >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return (coins.reshape(-1)[:count] == 1).reshape(shape)
    return jax.random.bits(key, shape, jnp.uint8) < jnp.uint8(min(round(share * 256), 255))
