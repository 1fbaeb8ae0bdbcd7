"""How the work of a reconstruction spreads over its units, to tell how much of it is done."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dfq_jax.graph.channels import groups_of
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import macs, output_shapes
from dfq_jax.optim.progress import Metrics, Progress, Watcher
from dfq_jax.quantization.second_moments import WindowLayer
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.footprint import Method
from dfq_jax.reconstruction.method import batch_of
from dfq_jax.reconstruction.units import Unit

STEP = 3
"""Passes through a unit in a step: forward, backward at twice the work; one more with a guide."""
PASSING = 6
"""Passes of all images through a unit: for its targets, its errors and its output."""
SOLVING = 2
"""Passes of images through a unit for each of its layers that is solved."""
COMPILING = 5e9
"""Multiply-accumulates in the time that compiling a node takes, on one CPU core."""

Shape = tuple[int, ...]


class EffortShare(NamedTuple):
    """What a unit takes of all the work, which is 1.

    Attributes:
      before: is done when it begins.
      solving: of its layers in closed form.
      learning: of its steps.
    """

    before: float
    solving: float
    learning: float

    def solved(self, part: float) -> float:
        """What is done when a part of its layers is solved."""
        return self.before + part * self.solving

    def learned(self, part: float) -> float:
        """What is done when a part of its steps is."""
        return self.before + self.solving + part * self.learning


class UnitProgress(NamedTuple):
    """Tells how far a unit is, as a part of all the work.

    Attributes:
      watch: who is told.
      share: of the unit.
      unit: its number, from 0.
      units: how many there are.
    """

    watch: Watcher
    share: EffortShare
    unit: int
    units: int

    def learned(self, step: int, steps: int, parts: Metrics) -> None:
        """Tells how far its steps are."""
        done = self.share.learned(step / max(steps, 1))
        at = Progress(self.unit, self.units, step, steps, parts, "learning", done)
        self.watch.advances(at)

    def solved(self, layer: int, layers: int) -> None:
        """Tells how many of its layers are solved."""
        done = self.share.solved(layer / max(layers, 1))
        at = Progress(self.unit, self.units, layer, layers, {}, "solving", done)
        self.watch.advances(at)


def shares(
    units: Sequence[Unit], reference: Model, method: Method, images: int
) -> tuple[EffortShare, ...]:
    """Shares of the units of a network, by multiply-accumulates.

    Args:
      units: in order.
      reference: the float network.
      method: what is learned or solved.
      images: how many there are.
    """
    work, shapes = macs(reference), output_shapes(reference)
    parts = []
    for unit in units:
        each = sum(work.get(name, 0) for name in unit.block.names)
        entering, leaving = (
            shapes[n[0]] for n in (unit.block.graph.inputs, unit.block.graph.outputs)
        )
        closed = closed_form_of(method, leaving)
        seen = 0 if closed is None else len(closed.images(images, positions(leaving)))
        moments = moments_in(unit, reference, shapes)
        solving = sum(seen * (own + SOLVING * each) for own in moments)
        parts.append((solving, learning(unit, method, entering, each), PASSING * each * images))
    total, done, found = sum(map(sum, parts)) or 1.0, 0.0, []
    for solving, learned, passing in parts:
        found.append(EffortShare(done / total, solving / total, learned / total))
        done += solving + learned + passing
    return tuple(found)


def closed_form_of(method: Method, leaving: Shape) -> ClosedForm | None:
    """How the layers of a unit are solved, before it learns or instead; None if they are not.

    Args:
      method: what is learned or solved.
      leaving: shape of what the unit puts out, images first.
    """
    if isinstance(method, ClosedForm):
        return method
    return method.start if positions(leaving) >= method.start_positions else None


def positions(leaving: Shape) -> int:
    """Of what a unit puts out, an image; 1 for a vector."""
    return math.prod(leaving[1:-1])


def learning(unit: Unit, method: Method, entering: Shape, each: int) -> float:
    """Work of the steps of a unit of so many multiply-accumulates an image."""
    levels = [spec.levels.bits for _, spec in unit.plan.entries]
    if isinstance(method, ClosedForm) or not levels or (method.spare and set(levels) == {8}):
        return 0.0
    steps = sum(phase.steps for phase in method.phases)
    passes = (STEP + method.guided) * steps * batch_of(method, entering)
    return passes * each + COMPILING * len(unit.block.names)


def moments_in(unit: Unit, reference: Model, shapes: Mapping[str, Shape]) -> Iterator[int]:
    """Work of the two second moments of what each layer of a unit reads, an image."""
    rounded = {site.node for site, _ in unit.plan.entries if site.argument is None}
    for name, canonical in unit.names.items():
        op = reference.graph.by_name[name].op if canonical in rounded else None
        if isinstance(op, WindowLayer):
            *window, _ = reference.params[name]["kernel"].shape
            yield 2 * positions(shapes[name]) * groups_of(op) * math.prod(window) ** 2
