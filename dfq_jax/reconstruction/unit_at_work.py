"""A unit at work: what enters it, what should leave it, and what becomes of that in the network."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import Tensor, evaluate
from dfq_jax.graph.graph import Edge, Model
from dfq_jax.numerics.affine import Affine
from dfq_jax.numerics.softmax import divergences
from dfq_jax.optim.fit import Metrics
from dfq_jax.quantization.plan import Plan, Site
from dfq_jax.quantization.second_moments import pieces
from dfq_jax.quantization.simulate import simulation_hook
from dfq_jax.reconstruction.method import Loss, UnitSeen, predicted
from dfq_jax.reconstruction.units import Host, Unit

BATCH = 32
"""Images that pass through a unit at a time."""


class Beyond(NamedTuple):
    """What follows a unit, for methods that look at the network's prediction.

    Attributes:
      rest: the float network from the unit's output on; None behind the last unit.
      logits: the float network's first output for all images.
    """

    rest: Model | None
    logits: Host


OnStep = Callable[[int, int, Metrics], None]
OnLayer = Callable[[int, int], None]


def unheard(*told: object) -> None:
    """What is told to nobody."""
    del told


class UnitAtWork(NamedTuple):
    """A unit before learning, with all that passes through it.

    Attributes:
      unit: the piece.
      reference: in float.
      model: with the kernels it has, not rounded.
      qparams: its scales so far.
      exact: its inputs in the float network.
      rough: its inputs in the quantized network.
      targets: its outputs in the float network.
      memory: bytes that may be fed to the device at a time.
      on_step: told (step, of how many, parts of the loss) while it learns.
      on_layer: told (layers, of how many) while they are solved.
      beyond: what follows, if the method asks.
      slopes: of the divergence of predictions by the unit's outputs, if the method asks.
      still: its layers whose kernels learn nothing.
    """

    unit: Unit
    reference: Model
    model: Model
    qparams: Mapping[Site, Affine]
    exact: Host
    rough: Host
    targets: Host
    memory: int
    on_step: OnStep = unheard
    on_layer: OnLayer = unheard
    beyond: Beyond | None = None
    slopes: Host | None = None
    still: frozenset[str] = frozenset()


def flow(
    model: Model,
    qparams: Mapping[Site, Affine] | None,
    plan: Plan | None,
    data: Host,
    tap: str | None = None,
) -> Iterator[Host]:
    """A unit's first output, or what one of its nodes reads, a batch of images at a time."""
    for x in pieces(data, BATCH):
        yield np.asarray(run(model, qparams, x, plan, tap))


def passed(
    model: Model,
    qparams: Mapping[Site, Affine] | None,
    plan: Plan | None,
    data: Host,
    tap: str | None = None,
) -> Host:
    """All of `flow`, as one array."""
    whole, done = np.empty(0, np.float32), 0
    for part in flow(model, qparams, plan, data, tap):
        if done == 0:
            whole = np.empty((len(data), *part.shape[1:]), part.dtype)
        whole[done : done + len(part)] = part
        done += len(part)
    return whole


@partial(jax.jit, static_argnames=("plan", "tap"))
def run(
    model: Model,
    qparams: Mapping[Site, Affine] | None,
    x: Tensor,
    plan: Plan | None,
    tap: str | None,
) -> Tensor:
    """A unit's first output, or the first argument of one of its nodes; float without a plan."""
    hook = None if plan is None or qparams is None else simulation_hook(plan, qparams)
    edges = () if tap is None else (Edge(tap),)
    outputs, taps = evaluate(model, x, hook=hook, taps=edges)
    return taps[edges[0]] if edges else outputs[0]


def error_of(work: UnitAtWork, model: Model, qparams: Mapping[Site, Affine], loss: Loss) -> float:
    """A loss of a unit's outputs, in this form, over all images; with slopes, if there are any."""
    power, total = power_of(work.targets), 0.0
    outputs = flow(model, qparams, work.unit.plan, work.rough)
    for start, found in zip(range(0, len(work.rough), BATCH), outputs, strict=True):
        part = slice(start, start + BATCH)
        slopes = None if work.slopes is None else jax.device_put(work.slopes[part])
        seen = UnitSeen(jax.device_put(found), jax.device_put(work.targets[part]), power, slopes)
        total += len(found) * float(loss(seen))
    return total / len(work.rough)


def power_of(targets: Host) -> Float[Array, ""]:
    """Mean squared norm of targets over channels, positive."""
    total = sum(float(np.sum(np.square(part))) for part in pieces(targets, BATCH))
    return jnp.float32(max(total * targets.shape[-1] / targets.size, 1e-30))


def slopes_of(beyond: Beyond, outputs: Host) -> Host:
    """Gradients of `KL(float prediction || prediction from these outputs)` by the outputs.

    Each image's own, as large whatever the batch.

    Reference:
      Li et al. 2021, "BRECQ" (its diagonal).
    """
    pairs = zip(pieces(outputs, BATCH), pieces(beyond.logits, BATCH), strict=True)
    return np.concatenate([np.asarray(slopes(beyond.rest, o, t)) for o, t in pairs])


@jax.jit
def slopes(rest: Model | None, outputs: Tensor, logits: Tensor) -> Tensor:
    """`slopes_of` one batch."""
    return jax.grad(lambda o: jnp.sum(divergences(logits, predicted(rest, o))))(outputs)
