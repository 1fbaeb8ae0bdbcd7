"""What a method of block reconstruction is, and the objective it gives to the one loop."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import Tensor, apply_tiled, evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.numerics.rounding import Rounding
from dfq_jax.reconstruction.closed_form import ClosedForm

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
      weights_alone: activations are in float meanwhile, in the whole network: a walk of its own
        (`reconstruction.walks`).
      input_once: those elements of the input are rounded, and no others: quantizers sit behind
        activations, as QDrop's do. Else the input is one more activation, rounded as `quantized`
        says, wherever its elements come from (GENIE's sit before layers).
      borders: whether borders of rounding are learned, of the channels of activations of fewer
        than 8 bits (`reconstruction.borders`).
    """

    steps: int
    kernels: bool = True
    edges: bool = True
    biases: bool = False
    quantized: float = 0.5
    rough: float = 0.5
    weights_alone: bool = False
    input_once: bool = False
    borders: bool = False


class Rates(NamedTuple):
    """Adam's learning rates; those of scales and biases fall to 0 along a cosine.

    Attributes:
      bits: of soft bits, divisors and codes.
      scale: of kernels' scales.
      edges: of activations' scales.
      biases: of biases.
      borders: of borders, in steps.
      relative: whether rates of scales are in units of each scale. Adam's steps are as long as the
        rate, whatever they change: networks with some tiny scales among large ones need this.
      settling: whether the rate of bits falls likewise.
    """

    bits: float = 1e-3
    scale: float = 1e-4
    edges: float = 4e-5
    biases: float = 1e-3
    borders: float = 1e-3
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
      skip_first: the first layer with a kernel is rounded to nearest and learns nothing.
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
    skip_first: bool = False
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
