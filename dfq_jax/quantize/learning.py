"""What a method of block reconstruction is, and the objective it gives to the one loop."""

from collections.abc import Callable, Hashable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.graph.evaluate import Hook, Slots, Tensor, apply_tiled, evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.numerics.affine import Affine, fake_quantize
from dfq_jax.numerics.rounding import POSITIVE, Rounding
from dfq_jax.optim.feed import Fed
from dfq_jax.optim.fit import Now, Objective
from dfq_jax.quantize.plan import Plan, Site


class Phase(NamedTuple):
    """One optimisation of a unit.

    Attributes:
      steps: how many.
      kernels: whether rounding is learned.
      edges: whether scales of activations are learned.
      quantized: share of the elements of activations that are quantized while learning, drawn
        anew each step (QDrop); 0 for activations in float.
      rough: share of the elements of the unit's input that come from the quantized network.
    """

    steps: int
    kernels: bool = True
    edges: bool = True
    quantized: float = 0.5
    rough: float = 0.5


class Rates(NamedTuple):
    """Adam's learning rates; those of scales fall to 0 along a cosine.

    Attributes:
      bits: of soft bits and divisors.
      scale: of kernels' scales.
      edges: of activations' scales.
    """

    bits: float = 1e-3
    scale: float = 1e-4
    edges: float = 4e-5


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


class Seen(NamedTuple):
    """What a loss of reconstruction may look at.

    Attributes:
      outputs: of the unit at work.
      targets: of the float unit.
      power: mean squared norm of the targets over all images.
    """

    outputs: Float[Array, "b ... c"]
    targets: Float[Array, "b ... c"]
    power: Float[Array, ""]


Loss = Callable[[Seen], Float[Array, ""]]


def squared_gap(seen: Seen) -> Float[Array, ""]:
    """Squared distance over channels, mean over images and positions (BRECQ, eq. 10)."""
    return jnp.mean(jnp.sum((seen.outputs - seen.targets) ** 2, axis=-1))


def relative_gap(seen: Seen) -> Float[Array, ""]:
    """`squared_gap` in units of the targets' own power: the same weights fit every unit."""
    return squared_gap(seen) / seen.power


class Reconstruction(NamedTuple):
    """A method: how units are cut, what they learn, and by which loss.

    Attributes:
      name: as in the literature.
      rounding: how codes of kernels are chosen.
      phases: one after the other.
      rates: learning rates.
      penalty: of soft bits.
      loss: between outputs and targets.
      batch: images a step.
      merge: blocks that make a unit.
      layers: learn the layers of a unit one by one instead.
    """

    name: str
    rounding: Rounding
    phases: tuple[Phase, ...]
    rates: Rates = Rates()
    penalty: Penalty = Penalty()
    loss: Loss = squared_gap
    batch: int = 32
    merge: int = 1
    layers: bool = False


class Given(NamedTuple):
    """What an objective is given besides what it trains."""

    model: Model
    qparams: Mapping[Site, Affine]
    fixed: Mapping[str, Mapping[str, Array]]
    power: Float[Array, ""]


@cache
def optimizer_of(rates: Rates, steps: int) -> optax.GradientTransformation:
    """Adam with a rate for each kind of variable."""
    falling = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, steps))
    kinds: dict[Hashable, optax.GradientTransformation] = {
        "bits": optax.adam(rates.bits),
        "scale": falling(rates.scale),
        "edges": falling(rates.edges),
    }

    def kind(path: tuple, leaf: Any) -> str:
        del leaf
        if path[0].key == "edges":
            return "edges"
        return "scale" if path[-1].key == "scale" else "bits"

    return optax.multi_transform(kinds, lambda x: jax.tree.map_with_path(kind, x))


@cache
def objective_of(plan: Plan, method: Reconstruction, phase: Phase) -> Objective:
    """The objective of a phase; units of equal structure share it, and so compile once."""

    def objective(x: PyTree, context: Fed, now: Now):
        given: Given = context.context
        exact, rough, targets = context.at(now.step)
        input_key, edge_key = jax.random.split(now.key)
        shown = blended(input_key, rough, exact, phase.rough)
        hook = training_hook(plan, method.rounding, phase, x, given, edge_key)
        outputs = evaluate(given.model, shown, hook=hook, apply=apply_tiled)[0][0]
        loss = method.loss(Seen(outputs, targets, given.power))
        penalty = method.penalty
        exponent = penalty.exponent(now.step, phase.steps)
        undecided = sum(
            (method.rounding.undecided(t, exponent) for t in x["kernels"].values()), jnp.zeros(())
        )
        factor = penalty.factor(now.step, phase.steps)
        return loss + factor * undecided, ({"reconstruction": loss, "undecided": undecided}, ())

    return objective


def training_hook(
    plan: Plan,
    rounding: Rounding,
    phase: Phase,
    x: PyTree,
    given: Given,
    key: Key[Array, ""],
) -> Hook:
    """Soft kernels, and activations of which a drawn share is quantized."""
    table = plan.table
    tensors = {site: tensor for tensor, sites in plan.groups for site in sites}
    numbers = {tensor: number for number, (tensor, _) in enumerate(plan.groups)}

    def snap(site: Site, value: Tensor) -> Tensor:
        if site not in tensors or phase.quantized == 0:
            return value
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
        return slots, args

    return hook


def blended(key: Key[Array, ""], first: Tensor, second: Tensor, share: float) -> Tensor:
    """Elements of `first` with a probability, in 256ths, of `share`; else of `second`.

    Reference:
      Wei et al. 2022, "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training
      Quantization", eq. 11.
    """
    if share in (0, 1):
        return first if share else second
    draws = jax.random.bits(key, first.shape, jnp.uint8)
    return jnp.where(draws < jnp.uint8(min(round(share * 256), 255)), first, second)
