"""Trains one network for all its widths at once (`quantization.vertical`)."""

import math
import time
from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float, Key

from dfq_jax.base.parallel import HERE, Machine
from dfq_jax.graph.graph import Model
from dfq_jax.numerics.bit_planes import TOP
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.optim.state import NOWHERE, Place
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.vertical import VerticalNetwork, as_cut, narrowed
from dfq_jax.training.distance import distance
from dfq_jax.training.engine import TrainingReport, learned_by, taught_of
from dfq_jax.training.images import Course
from dfq_jax.training.method import Training
from dfq_jax.training.on_machine import check_machine
from dfq_jax.training.student import finished, kernel_codes, share_changed, student_start
from dfq_jax.training.suits import check_classes, check_images
from dfq_jax.training.widths import vertical_network


def trained_vertically(
    quantized: QuantizedModel,
    teacher: Model,
    images: Float[Array, "n h w c"],
    held_out: Float[Array, "m h w c"],
    method: Training,
    key: Key[Array, ""],
    *,
    machine: Machine = HERE,
    place: Place = NOWHERE,
    watch: Watcher = SILENT,
) -> tuple[VerticalNetwork, TrainingReport]:
    """Trains a network of 8-bit kernels so that all its cuts are networks too.

    Args:
      quantized: where the student begins, its norms folded.
      teacher: the float network, node for node the same.
      images: normalised, as 8-bit pixels can tell them.
      held_out: others, that judge.
      method: whose kind of student has widths, and norms that are not live.
      key: the only source of randomness.
      machine: as of `trained`.
      place: keeps the state here and resumes from it.
      watch: told how far it is.

    Returns:
      The network of all widths, or the start merely cut where that is nearer to the teacher; and
      how it went. Distances are means over all widths, that of 8 bits included.

    Raises:
      UsageError: as of `trained`; for widths that are none, or a network without 8-bit kernels.
      DivergedError: likewise.
    """
    began, kind, plan = time.perf_counter(), method.student, quantized.plan
    plain = as_cut(quantized, kind.widths)
    check_images(method, len(images))
    check_classes(method, teacher)
    check_machine(machine, method.batch)
    start = student_start(kind, quantized, None)
    taught = taught_of(method, teacher, None, start, images, jax.random.fold_in(key, 2))
    learned = learned_by(Course(method, plan, machine), taught, key, place, watch)
    made = vertical_network(finished(kind, plan, learned.x, start, learned.ranges), learned.x)
    apart = partial(distance, teacher, images=held_out, directions=method.directions)
    each = tuple(gaps_of_widths(apart, network) for network in (plain, made))
    before, after = (sum(gaps.values()) / len(gaps) for gaps in each)
    kept = math.isfinite(after) and after <= before
    codes = [kernel_codes(kind, plan, x, start) for x in (learned.first, learned.x)]
    changed, seconds = float(share_changed(*codes)), time.perf_counter() - began
    notes = (*learned.notes, *(told_of_width(bits, *(g[bits] for g in each)) for bits in each[0]))
    told = (method.name, method.steps, before, after, kept, changed, seconds, notes)
    return made if kept else plain, TrainingReport(*told)


def gaps_of_widths(
    apart: Callable[[QuantizedModel], float], network: VerticalNetwork
) -> dict[int, float]:
    """{bits: how far that width's outputs are from the teacher's}, as `apart` tells it."""
    return {bits: apart(narrowed(network, bits)) for bits in (TOP, *network.widths)}


def told_of_width(bits: int, before: float, after: float) -> str:
    """How the outputs of a width have come nearer, in words."""
    return f"weights of {bits} bits: outputs {before:.4g} apart merely cut, {after:.4g} trained"
