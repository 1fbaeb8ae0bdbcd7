"""Trains one network for all its widths at once (`quantization.vertical`)."""

import time
from collections.abc import Callable
from functools import partial

from dfq_jax.graph.graph import Model
from dfq_jax.numerics.bit_planes import TOP
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.vertical import VerticalNetwork, as_cut, narrowed
from dfq_jax.training.distance import distance
from dfq_jax.training.engine import (
    TrainingReport,
    TrainingSetup,
    check_setup,
    learned_by,
    report_of,
    taught_of,
)
from dfq_jax.training.images import Course
from dfq_jax.training.method import Training
from dfq_jax.training.student import finished, kernel_codes, share_changed, student_start
from dfq_jax.training.widths import vertical_network


def trained_vertically(
    quantized: QuantizedModel,
    teacher: Model,
    method: Training,
    setup: TrainingSetup,
) -> tuple[VerticalNetwork, TrainingReport]:
    """Trains a network of 8-bit kernels so that all its cuts are networks too.

    Args:
      quantized: where the student begins, its norms folded.
      teacher: the float network, node for node the same.
      method: whose kind of student has widths, and norms that are not live.
      setup: as of `trained`.

    Returns:
      The network of all widths, or the start merely cut where that is nearer to the teacher; and
      how it went. Distances are means over all widths, that of 8 bits included.

    Raises:
      UsageError: as of `trained`; for widths that are none, or a network without 8-bit kernels.
      DivergedError: likewise.
    """
    began, kind, plan = time.perf_counter(), method.student, quantized.plan
    plain = as_cut(quantized, kind.widths)
    check_setup(method, teacher, setup)
    start = student_start(kind, quantized, None)
    taught = taught_of(method, teacher, None, start, setup.images, setup.terms_key)
    learned = learned_by(Course(method, plan, setup.machine), taught, setup)
    made = vertical_network(finished(kind, plan, learned.x, start, learned.ranges), learned.x)
    apart = partial(distance, teacher, images=setup.held_out, directions=method.directions)
    each = tuple(gaps_of_widths(apart, network) for network in (plain, made))
    before, after = (sum(gaps.values()) / len(gaps) for gaps in each)
    codes = [kernel_codes(kind, plan, x, start) for x in (learned.first, learned.x)]
    changed = float(share_changed(*codes))
    notes = (*learned.notes, *(told_of_width(bits, *(g[bits] for g in each)) for bits in each[0]))
    report = report_of(method, began, (before, after), notes, changed)
    return made if report.kept else plain, report


def gaps_of_widths(
    apart: Callable[[QuantizedModel], float], network: VerticalNetwork
) -> dict[int, float]:
    """{bits: how far that width's outputs are from the teacher's}, as `apart` tells it."""
    return {bits: apart(narrowed(network, bits)) for bits in (TOP, *network.widths)}


def told_of_width(bits: int, before: float, after: float) -> str:
    """How the outputs of a width have come nearer, in words."""
    return f"weights of {bits} bits: outputs {before:.4g} apart merely cut, {after:.4g} trained"
