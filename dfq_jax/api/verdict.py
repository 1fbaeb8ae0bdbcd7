"""The verdict on a quantized network: what it loses, why, and whether learning was worth it."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from dfq_jax.api.delivered import check_contract
from dfq_jax.api.request import Asked, Follow
from dfq_jax.errors import DivergedError, ResourceError, UnsupportedModelError
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.numerics.affine import Grid
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.narrowing import output_gap
from dfq_jax.recipes.diagnose import blamed, loses_much
from dfq_jax.recipes.noise import NOISE_CHOSEN
from dfq_jax.recipes.probes import PROBES, probes_of
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.report.analyze import Report
from dfq_jax.report.trust import Estimate, estimate, judges_classes


class Judges(NamedTuple):
    """What the expected loss of a classifier is estimated from.

    Attributes:
      images: the probes; None where there are none.
      note: why there are none, if they should be.
    """

    images: Examples | None
    note: str = ""


def judges_of(model: Model, made: Quantized, asked: Asked, follow: Follow) -> Judges:
    """The probes of a classifier: those given, or made now."""
    if not judges_classes(made.reference, asked.task):
        follow.begins("judging")
        return Judges(None)
    try:
        probes = made_probes(model, asked, follow) if asked.probes is None else asked.probes
    except (DivergedError, ResourceError, UnsupportedModelError) as error:
        note = f"the loss on real images was not estimated: no probes could be made ({error})"
        follow.begins("judging")
        return Judges(None, note)
    check_contract(probes, model.contract)
    follow.begins("judging")
    follow.watch.says(f"estimating the loss from {len(probes)} probes")
    return Judges(probes)


def expected(
    made: Quantized, model: Model, judges: Judges, accuracy: float | None
) -> Estimate | None:
    """The expected loss of a classifier; None of what is none, or has no probes."""
    if judges.images is None:
        return None
    known = "low" if judges.images.guessed else "usual"
    shown, whole = judges.images.images, fold_batch_norm(model)  # nodes as the quantized one has
    return estimate(whole, made.quantized, shown, accuracy, confidence=known)


class Plain(NamedTuple):
    """Why rounding to nearest is kept, in words, and what that is expected to lose."""

    note: str
    loss: Estimate | None


def rather_plain(
    plain: Quantized,
    learned: Quantized,
    held_out: Examples,
    learned_loss: Estimate | None,
    loss_of: Callable[[Quantized], Estimate | None],
) -> Plain | None:
    """Rounding to nearest, where learning was not worth it.

    It was if the error of the outputs fell, or the expected loss of a classifier.

    Args:
      plain: rounded to nearest.
      learned: after learning.
      held_out: images that neither saw.
      learned_loss: expected after learning, if that is known.
      loss_of: what else finds the expected loss; asked only where outputs got worse.
    """
    gap = lambda made: output_gap(made.quantized, made.reference, held_out.array)
    before, after = gap(plain), gap(learned)
    if after <= before or not math.isfinite(before):
        return None
    told = f"{before:.2%} of their outputs' power is error, of those learned {after:.2%}"
    loss = loss_of(plain)
    if loss is not None and learned_loss is not None:
        before, after = 100 * loss.loss, 100 * learned_loss.loss
        if after <= before:
            return None
        told = f"they are expected to lose {before:.1f} points of top-1, those learned {after:.1f}"
    return Plain(f"kernels stay rounded to nearest: {told}", loss)


def judged(report: Report, judges: Judges, found: Estimate | None) -> Report:
    """The report of a classifier with its expected loss on real images."""
    if judges.note:
        report = dataclasses.replace(report, notes=(judges.note,))
    return dataclasses.replace(report, estimate=found) if report.finite else report


def with_costs(
    report: Report, made: Quantized, images: Examples, asked: Asked, follow: Follow
) -> Report:
    """The report with what each layer costs, where the network lost much, on grids."""
    grids = all(isinstance(spec.levels, Grid) for _, spec in made.quantized.plan.entries)
    if not (grids and report.finite and loses_much(report)):
        return report
    follow.watch.says("finding the layers that cost most")
    so_far = {layer.name: layer.sqnr for layer in report.layers}
    costs = blamed(made.reference, made.quantized, images.array, so_far, asked.task)
    return dataclasses.replace(report, costs=costs)


def made_probes(model: Model, asked: Asked, follow: Follow) -> Examples:
    """The probes of a network, or those of the run that is resumed."""
    follow.begins("making probes")
    follow.watch.says(f"making {PROBES} probes, to estimate the loss on real images")
    watch, place = follow.watch.without_words(), follow.place / "probes"
    return probes_of(model, memory=asked.memory, watch=watch, place=place)


def qualified(report: Report, images: Examples, note: str = "") -> Report:
    """A report with what the making of its images says about its numbers, and a note."""
    notes = (*images.provenance.get("notes", ()), *report.notes, *([note] if note else []))
    if not images.guessed:
        return dataclasses.replace(report, notes=notes)
    outputs = tuple(dataclasses.replace(output, noise=True) for output in report.outputs)
    told = notes or (NOISE_CHOSEN,)
    return dataclasses.replace(report, confidence="low", notes=told, outputs=outputs)
