"""What a method of block reconstruction is, and the objective it gives to the one loop."""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple

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
from dfq_jax.reconstruction.batches import Rows, read
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.values import Bound, bound

FEWEST = 4
"""Images in steps that are cut by their size."""


class Phase(NamedTuple):
    """One optimisation of a unit.

    Attributes:
      steps: how many.
      kernels: whether rounding is learned.
      edges: whether scales of activations of fewer than 8 bits are learned.
      biases: whether biases are learned.
      quantized: share of the elements of activations that are quantized while learning, drawn
        anew each step (QDrop); 0 for activations in float.
      rough: share of the elements of the unit's input that come from the quantized network.
    """

    steps: int
    kernels: bool = True
    edges: bool = True
    biases: bool = False
    quantized: float = 0.5
    rough: float = 0.5


class Rates(NamedTuple):
    """Adam's learning rates; those of scales and biases fall to 0 along a cosine.

    Attributes:
      bits: of soft bits, divisors and codes.
      scale: of kernels' scales.
      edges: of activations' scales.
      biases: of biases.
      relative: whether rates of scales are in units of each scale. Adam's steps are as long as the
        rate, whatever they change: networks with some tiny scales among large ones need this.
      settling: whether the rate of bits falls likewise.
    """

    bits: float = 1e-3
    scale: float = 1e-4
    edges: float = 4e-5
    biases: float = 1e-3
    relative: bool = False
    settling: bool = False


class Penalty(NamedTuple):
    """What drives soft bits to a decision.

    Attributes:
      weight: of the sum over all weights.
      warmup: share of the steps without it.
      start: exponent after the warm-up.
      end: exponent at the last step.
      curve: how the exponent falls: `linear` or `cosine`.
    """

    weight: float = 0.01
    warmup: float = 0.2
    start: float = 20.0
    end: float = 2.0
    curve: str = "linear"

    def exponent(self, step: Array, steps: int) -> Float[Array, ""]:
        """`beta` at a step."""
        first = self.warmup * steps
        done = jnp.clip((step.astype(jnp.float32) - first) / max(steps - first, 1.0), 0.0, 1.0)
        left = 1 - done if self.curve == "linear" else (1 + jnp.cos(jnp.pi * done)) / 2
        return self.end + (self.start - self.end) * left

    def factor(self, step: Array, steps: int) -> Float[Array, ""]:
        """The weight at a step: 0 during the warm-up."""
        return jnp.where(step.astype(jnp.float32) < self.warmup * steps, 0.0, self.weight)


class UnitSeen(NamedTuple):
    """What a loss of reconstruction may look at.

    Attributes:
      outputs: of the unit at work.
      targets: of the float unit.
      power: mean squared norm of the targets over all images.
      slopes: of the divergence of predictions by the outputs, if the method asked for them.
    """

    outputs: Float[Array, "b ... c"]
    targets: Float[Array, "b ... c"]
    power: Float[Array, ""]
    slopes: Float[Array, "b ... c"] | None = None


Loss = Callable[[UnitSeen], Float[Array, ""]]


def squared_gap(seen: UnitSeen) -> Float[Array, ""]:
    """Squared distance over channels, mean over images and positions (BRECQ)."""
    return jnp.mean(jnp.sum((seen.outputs - seen.targets) ** 2, axis=-1))


def relative_gap(seen: UnitSeen) -> Float[Array, ""]:
    """`squared_gap` in units of the targets' own power: the same weights fit every unit."""
    return squared_gap(seen) / seen.power


def fisher_gap(seen: UnitSeen) -> Float[Array, ""]:
    """Squared distance weighted by `(|slope| + 1)^2` (BRECQ, its released code)."""
    weights = 1.0 if seen.slopes is None else (jnp.abs(seen.slopes) + 1) ** 2
    return jnp.mean(jnp.sum((seen.outputs - seen.targets) ** 2 * weights, axis=-1))


def predicted(rest: Model | None, outputs: Tensor) -> Tensor:
    """The network's first output, from a unit's."""
    return outputs if rest is None else evaluate(rest, outputs, apply=apply_tiled)[0][0]


class Prediction(NamedTuple):
    """How much the whole network's prediction counts while a unit learns (PD-Quant).

    Attributes:
      weight: of the divergence from the float prediction.
      temperature: of both.
    """

    weight: float = 10.0
    temperature: float = 4.0


class Correction(NamedTuple):
    """How a unit's inputs are drawn to the statistics it was trained on (PD-Quant).

    Attributes:
      closeness: weight of the statistics against the squared distance from the inputs.
      steps: of Adam.
      learning_rate: its first.
    """

    closeness: float = 0.02
    steps: int = 500
    learning_rate: float = 1e-3


class Reconstruction(NamedTuple):
    """A method: how units are cut, what they learn, and by which loss.

    Attributes:
      name: as in the literature.
      rounding: how codes of kernels are chosen.
      phases: one after the other.
      rates: learning rates.
      penalty: of soft bits.
      loss: between outputs and targets.
      batch: images a step, at most.
      lines: of positions in a step's images, at most; 0 for any number.
      merge: blocks that make a unit, 0 for the whole network, or those of a `stage`
        (`graph.cuts.stage_sizes`).
      layers: learn the layers of a unit one by one instead, without prediction or slopes.
      start: solve its layers in closed form first.
      start_positions: what a unit puts out has this many positions an image at least, or it starts
        as it is: with few, layers are solved for the images at hand alone.
      spare: learn nothing where every grid of a unit has 8 bits.
      prediction: what the network's prediction counts beside the loss.
      correction: how inputs are corrected first.
      fisher: whether the loss is given slopes of the prediction.
      guided: learn from what every block of the unit puts out, not the unit alone
        (`reconstruction.guided`).
    """

    name: str
    rounding: Rounding
    phases: tuple[Phase, ...]
    rates: Rates = Rates()
    penalty: Penalty = Penalty()
    loss: Loss = squared_gap
    batch: int = 32
    lines: int = 0
    merge: int | Literal["stage"] = 1
    layers: bool = False
    start: ClosedForm | None = None
    start_positions: int = 0
    spare: bool = False
    prediction: Prediction | None = None
    correction: Correction | None = None
    fisher: bool = False
    guided: bool = False


def batch_of(method: Reconstruction, entering: tuple[int, ...]) -> int:
    """Images a step of a unit, at least `FEWEST` unless the method says fewer.

    Args:
      method: what is learned.
      entering: shape of what the unit reads, images first.
    """
    if method.lines == 0:
        return method.batch
    side = math.isqrt(math.prod(entering[1:-1]))
    return min(method.batch, max(FEWEST, method.lines // max(side, 1)))


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
    rows = read(given.rows, context.at(now.step))
    input_key, edge_key = jax.random.split(now.key)
    shown = blended(input_key, rows.rough, rows.exact, phase.rough)
    ahead = method.prediction is not None and rows.logits is not None
    shown = jnp.concatenate([shown, rows.rough]) if ahead else shown
    hook = training_hook(plan, method.rounding, phase, x, given, edge_key)
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


def training_hook(
    plan: Plan,
    rounding: Rounding,
    phase: Phase,
    x: PyTree,
    given: UnitContext,
    key: Key[Array, ""],
) -> Hook:
    """Soft kernels, and activations of which a drawn share is quantized."""
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
        rounded = fake_quantize(value, affine, table[site].grid)
        return blended(jax.random.fold_in(key, numbers[tensor]), rounded, value, phase.quantized)

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        args = tuple(snap(Site(node.name, f"input{i}"), v) for i, v in enumerate(args))
        kernel = Site(node.name, "kernel")
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
    if share == 0.5:
        count = math.prod(shape)
        words = jax.random.bits(key, (-(-count // 32), 1), jnp.uint32)
        coins = (words >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return (coins.reshape(-1)[:count] == 1).reshape(shape)
    return jax.random.bits(key, shape, jnp.uint8) < jnp.uint8(min(round(share * 256), 255))
