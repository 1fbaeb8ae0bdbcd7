"""How often a method walks through a network, and what of it is quantized meanwhile.

Phases that quantize weights alone learn in a walk of their own: every unit reads what others make
of activations in float. Phases beside them, and all others, walk together.
"""

import dataclasses
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import jax
from jaxtyping import Array, Key, Shaped

from dfq_jax.graph.graph import Model
from dfq_jax.optim.progress import Progress, UnitReport, Watcher
from dfq_jax.optim.state import Place
from dfq_jax.quantization.plan import Plan
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.footprint import Method
from dfq_jax.reconstruction.units import Host


class UnitsWalk(NamedTuple):
    """One walk through all units.

    Attributes:
      method: with the phases of this walk alone.
      number: from 0.
      of: how many there are.
      before: share of all steps that are done when it begins.
      part: share of all steps that it takes.
    """

    method: Method
    number: int = 0
    of: int = 1
    before: float = 0.0
    part: float = 1.0

    @property
    def weights_alone(self) -> bool:
        """Whether activations are in float meanwhile, in the whole network."""
        if isinstance(self.method, ClosedForm):
            return False
        return any(phase.weights_alone for phase in self.method.phases)


class UnitsRun(NamedTuple):
    """What one walk through all units is given beside the network on its levels.

    Attributes:
      reference: the float network.
      images: normalised.
      method: what is learned, and how.
      key: the only source of randomness.
      memory: bytes of images' data that the device may hold.
      split: numbers of the units that learn layer by layer.
      place: where finished units and unfinished states are kept.
      watch: told how far it is.
    """

    reference: Model
    images: Host | Shaped[Array, "n ..."]
    method: Method
    key: Key[Array, ""]
    memory: int
    split: frozenset[int]
    place: Place
    watch: Watcher

    def within(self, walk: UnitsWalk) -> "UnitsRun":
        """What a walk of this run is given: the first walk has its key and its place."""
        own = self._replace(method=walk.method, watch=watched(self.watch, walk))
        if walk.number == 0:
            return own
        key = jax.random.fold_in(self.key, walk.number)
        return own._replace(key=key, place=self.place / f"walk-{walk.number}")


def walks_of(method: Method) -> Iterator[UnitsWalk]:
    """The walks of a method, in order."""
    if isinstance(method, ClosedForm) or not method.phases:
        yield UnitsWalk(method)
        return
    runs = [tuple(run) for _, run in groupby(method.phases, key=lambda p: p.weights_alone)]
    steps = [sum(phase.steps for phase in run) for run in runs]
    for number, run in enumerate(runs):
        before = sum(steps[:number]) / max(sum(steps), 1)
        part = steps[number] / max(sum(steps), 1)
        yield UnitsWalk(method._replace(phases=run), number, len(runs), before, part)


def as_walked(quantized: QuantizedModel, walk: UnitsWalk) -> QuantizedModel:
    """The network as a walk has it: on all its grids, or on those of kernels alone."""
    if not walk.weights_alone:
        return quantized
    return dataclasses.replace(quantized, plan=kernels_alone(quantized.plan))


def kernels_alone(plan: Plan) -> Plan:
    """The plan with activations in float."""
    kernels = tuple((site, spec) for site, spec in plan.entries if site.argument is None)
    return dataclasses.replace(plan, entries=kernels, groups=())


def watched(watch: Watcher, walk: UnitsWalk) -> Watcher:
    """Who follows a walk, told of the whole."""
    if walk.of == 1:
        return watch

    def advances(at: Progress) -> None:
        batch, batches = at.batch + walk.number * at.batches, at.batches * walk.of
        part = walk.before + walk.part * at.done
        watch.advances(dataclasses.replace(at, batch=batch, batches=batches, part=part))

    def ends(index: int, units: int, report: UnitReport) -> None:
        watch.ends_unit(index + walk.number * units, units * walk.of, report)

    return dataclasses.replace(watch, progress=advances, unit=ends)
