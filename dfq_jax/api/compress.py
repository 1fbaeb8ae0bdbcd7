"""`dfq.compress`: fewer channels and weights, then fewer bits; the original judges what is lost."""

import dataclasses
from pathlib import Path
from typing import Any, Unpack

from dfq_jax.api.deadline import in_time
from dfq_jax.api.delivered import calibrating, split_probes
from dfq_jax.api.given import GivenImages
from dfq_jax.api.joining import joined, require_joint_reach, with_bits
from dfq_jax.api.quantize import check_bits, making_for, quantized_on, seen_for
from dfq_jax.api.request import (
    Asked,
    Follow,
    Settings,
    check_synthesis,
    following,
    resolved,
    training_key,
)
from dfq_jax.api.result import Result
from dfq_jax.api.shrinking import (
    Shrinking,
    Shrunk,
    check_shrinking,
    demanded,
    price_of,
    shrunk,
    stays_float,
)
from dfq_jax.base.words import BitsByName, Channels, CriterionName, RestorationName, Rivals
from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.io.artifacts.artifact import weights_sha256
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.passes.before_quantization import Surgery
from dfq_jax.passes.select import Kept
from dfq_jax.pruning.choose import Floor
from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.prune import Pruning
from dfq_jax.pruning.restore import RESTORATIONS
from dfq_jax.pruning.sparse import Sparse, Zeros, zeros_of
from dfq_jax.quantization.node_by_node import on_grids
from dfq_jax.quantization.plan import FLOAT
from dfq_jax.quantization.rules import written
from dfq_jax.recipes.foresight import pruning_foreseen, training_foreseen
from dfq_jax.recipes.joint import JointAllocation
from dfq_jax.recipes.presets import ImageBudget, image_budget, makes_noise
from dfq_jax.recipes.rows import makes_rows
from dfq_jax.recipes.trainings import retraining_for
from dfq_jax.report.shapes import pruned_line
from dfq_jax.training.engine import TrainingReport, TrainingSetup
from dfq_jax.training.in_float import trained_in_float
from dfq_jax.training.method import Training
from dfq_jax.training.suits import check_images

OF_CODES = (
    "budget",
    "rules",
    "reconstruction",
    "observer",
    "weight_observer",
    "split",
    "value_aware",
    "reestimate",
)
"""Settings that say how something is quantized."""
IMAGES = 128
"""Images from which layers are fitted anew; those of `fast` would say too little."""


def compress(
    model: Model,
    images: GivenImages | None = None,
    *,
    prune: str | float | None = None,
    criterion: CriterionName | None = None,
    restore: RestorationName = "ridge",
    among: Rivals = "layer",
    channels: Channels = "inner",
    least: int = 1,
    round_to: int = 1,
    untouched: tuple[str, ...] = (),
    sparsity: str | None = None,
    bits: BitsByName = "scheme",
    train: int | None = None,
    watch: Watcher = SILENT,
    state_folder: str | Path | None = None,
    **settings: Unpack[Settings],
) -> Result:
    """Removes channels or single weights, makes up for them, quantizes the rest: without data.

    Args:
      model: with its batch norms in place.
      images: to restore and calibrate with, a quarter held out; None to make them.
      prune: share of the channels that may go, `30%` or 0.3; 30 % if nothing else is asked for.
      criterion: how channels are judged, one of `pruning.criteria.CRITERIA`: by default
        `reconstruction` (what others cannot make up for) where images restore, elsewhere `energy`.
      restore: what makes up for them, one of `pruning.restore.RESTORATIONS`: by default `ridge`
        (layers fitted anew on images, norms re-estimated).
      among: whose channels compete: a `layer`'s, all (`global`), or of one structure (`alike`).
      channels: which may go: `inner`, all but what sums carry from block to block, or `all`.
      least: channels that every layer keeps.
      round_to: channels kept are a multiple of it.
      untouched: patterns of layers that keep all.
      sparsity: weights at zero, `2:4` (2 of 4 inputs in a row stay) or `80%` of each layer, made
        up for on images unless `restore` is `none`; channels stay unless `prune` or a budget asks.
      bits: `joint`: decided with channels within a `budget` of bytes, `50% bytes` of the scheme's.
      train: steps in which what is left learns from the whole network, in float and without data,
        before it is quantized; zeros stay zero.
      watch: told what is being done.
      state_folder: keeps state here and resumes from it.
      **settings: of `quantize`; scheme `float` quantizes nothing; a `budget` may be what the
        smaller network takes: `50% MACs`, `20MMACs`, `40% params`, `2MB`, `3ms`.

    Returns:
      What `quantize` does, with how it got smaller; losses are those against `model`.

    Raises:
      UsageError: for a bad argument, or images of another contract.
      UnsupportedModelError: if no channel may go.
      DivergedError: if training diverged at every rate.
    """
    price = price_of(settings.get("scheme", "w8a8"))
    demand = demanded(prune, settings.get("budget"), sparsity, bits)
    settings["budget"] = demand.bits
    floor, criterion = Floor(least, round_to), criterion or criterion_for(restore)
    how = Pruning(demand.share, criterion, restore, among, channels, floor, untouched, price)
    taught = None if train is None else retraining_for(model, train, settings.get("task"))
    follow = following(watch, state_folder)
    return carried_out(model, images, demand.shrinking(how, taught), settings, follow)


def carried_out(
    model: Model, images: GivenImages | None, how: Shrinking, settings: Settings, follow: Follow
) -> Result:
    """The network made smaller and quantized as asked for."""
    subject = Subject(model)
    check_shrinking(subject, how)
    _ = model.input  # what reads several inputs is refused before anything is made
    check_synthesis(model, settings, given=images is not None)
    asked = requested(model, settings, joint=how.joint is not None)
    require_zeros_kept(how, asked)
    if how.together is not None:
        require_joint_reach(subject, how.together, asked)
    how, said = timed(subject, how, asked, follow.watch), asked
    making = making_for(model, asked)
    making = enough(model, making, how) if how.looks and asked.n is None else making
    if how.training is not None and images is None:
        check_images(how.training, calibrating(making.n))
    looked_at, follow = seen_for(model, images, making, asked, follow)
    if how.training is not None:
        check_images(how.training, calibrating(len(looked_at.images)))
    follow = with_foresight(model, looked_at.images, how, follow)
    both, asked = decided(subject, looked_at.images, how, asked, follow)
    kept = None if both is None else both.kept
    made = cut_down(subject, looked_at.images, how, follow, kept)
    made, report = taught_again(subject, made, looked_at.images, how.training, asked.seed, follow)
    looked_at = looked_at._replace(fitted=how.looks)
    result = quantized_on(made.model, looked_at, asked, follow, original=model)
    told = {**result.settings, **how.told, **told_bits(both, how, said)}
    if report is not None and not report.kept:
        told["trained"] += ", not kept"
    zeros = None if made.sparse is None else zeros_after(made.sparse, result)
    notes = () if both is None else both.notes
    if report is not None and how.training is not None:
        notes = (*notes, *report.notes, told_of(report, how.training.examples))
    told_in = dataclasses.replace(result.report, notes=(*result.report.notes, *notes))
    more: dict[str, Any] = {"pruned": made.pruned, "zeros": zeros, "joint": both}
    more |= {"settings": told, "report": told_in}
    more["original"] = weights_sha256(model)
    return dataclasses.replace(result, **more)


def requested(model: Model, settings: Settings, *, joint: bool) -> Asked:
    """What was asked for; with scheme `float` that nothing is quantized.

    Raises:
      UsageError: for a setting that says how to quantize what stays in float.
      PlanError: as of `check_bits`.
    """
    if not stays_float(settings.get("scheme", "w8a8")):
        asked = resolved(model, settings)
        check_bits(model, asked)
        return asked
    said = [name for name in OF_CODES if settings.get(name)] + ["bits"] * joint
    if said:
        raise UsageError(
            f"scheme float quantizes nothing, and {said[0]} says how to: leave it out, or give a "
            "scheme such as w8a8."
        )
    asked = resolved(model, {**settings, "scheme": "w8"}).without_learning()
    how = dataclasses.replace(asked.pipeline, scheme=FLOAT, surgery=Surgery(reach=None))
    return dataclasses.replace(asked, pipeline=how)


def timed(subject: Subject, how: Shrinking, asked: Asked, watch: Watcher) -> Shrinking:
    """The same with a budget of work in place of one of time, which is measured here."""
    if how.deadline is None or how.channels is None:
        return how
    watch.says(f"timing smaller networks in ONNX Runtime, for {how.deadline} an image")
    return how.within(in_time(subject, how.channels, how.deadline, asked, watch))


def require_zeros_kept(how: Shrinking, asked: Asked) -> None:
    """Refuses a rounding that would move weights that became zero.

    Raises:
      UsageError: naming it.
    """
    rounding = asked.pipeline.reconstruction
    if how.zeros is not None and rounding != "nearest":
        raise UsageError(
            f"sparsity {how.zeros} stays only where weights are rounded to nearest, and "
            f"reconstruction {rounding!r} would move zeros: take preset 'fast' or "
            "reconstruction 'nearest', or leave sparsity out."
        )


def zeros_after(sparse: Sparse, result: Result) -> Zeros:
    """Which weights are zero before quantization and after it."""
    return zeros_of(sparse.model, on_grids(result.quantized), sparse.pattern)


def with_foresight(model: Model, images: Examples, how: Shrinking, follow: Follow) -> Follow:
    """Those who follow, with how long it is foreseen to take to make the network smaller."""
    expected = pruning_foreseen(model, calibrating(len(images)) if how.looks else 0)
    if how.training is not None:
        expected |= training_foreseen(model, how.training.steps * how.training.batch)
    return dataclasses.replace(follow, foreseen={**follow.foreseen, **expected})


def decided(
    subject: Subject, images: Examples, how: Shrinking, asked: Asked, follow: Follow
) -> tuple[JointAllocation | None, Asked]:
    """Bits and channels, if they are decided together, and the request with these bits."""
    if how.together is None:
        return None, asked
    seen, _ = split_probes(images)
    found = joined(subject.showing(seen.array), seen, how.together, asked, follow.watch)
    return found, with_bits(asked, found)


def told_bits(both: JointAllocation | None, how: Shrinking, said: Asked) -> dict[str, str]:
    """How bits and channels were decided together, for reports: rules are those somebody said."""
    if both is None:
        return {}
    chosen = {"budget": f"{both.chosen.cost} of {how.joint} (joint, {said.pipeline.sensitivity})"}
    return chosen | {"rules": ", ".join(map(written, said.pipeline.rules))}


def cut_down(
    subject: Subject, images: Examples, how: Shrinking, follow: Follow, kept: Kept | None
) -> Shrunk:
    """The smaller network, restored on the images that do not judge it."""
    seen, _ = split_probes(images)
    follow.begins("pruning")
    watch = follow.watch
    watch.says(f"making the network smaller: {'; '.join(how.told.values())}")
    made = shrunk(subject.showing(seen.array if how.looks else None), how, kept)
    for note in () if made.pruned is None else (pruned_line(made.pruned), *made.pruned.notes):
        watch.says(f"  {note}")
    return made


def taught_again(
    subject: Subject,
    made: Shrunk,
    images: Examples,
    method: Training | None,
    seed: int,
    follow: Follow,
) -> tuple[Shrunk, TrainingReport | None]:
    """A smaller network that has learned from the whole one, if it is to; and how that went."""
    if method is None:
        return made, None
    seen, held_out = split_probes(images)
    follow.begins("training")
    steps = f"{method.steps} steps of {method.batch} {method.examples}"
    follow.watch.says(f"training what is left: {steps}")
    kept = {"place": follow.place, "watch": follow.watch}
    setup = TrainingSetup(seen.array, held_out.array, training_key(seed), **kept)
    shapes = {"stays": made.stays(subject), "masks": made.masks}
    learned, report = trained_in_float(made.model, subject.model, method, setup, **shapes)
    follow.watch.says(f"  {told_of(report, method.examples)}")
    return made.with_weights(learned), report


def told_of(report: TrainingReport, what: str) -> str:
    """How training went on images or rows, in a sentence."""
    gap = f"on held-out {what} outputs went from {report.before:.4g} to {report.after:.4g} apart"
    if report.kept:
        return f"what is left was trained {report.steps} steps: {gap}"
    return f"what is left stays as it was before training, which made it worse ({gap})"


def enough(model: Model, budget: ImageBudget, how: Shrinking) -> ImageBudget:
    """As many images as restoration and training need, if they are not noise, which costs nothing.

    Those to learn from are made as they are for learned rounding.
    """
    if makes_rows(model) or makes_noise(model, budget.method):
        return budget
    if how.training is not None:
        budget = image_budget("best", model.contract, learned=True)
        return dataclasses.replace(budget, n=how.training.n or budget.n)
    return dataclasses.replace(budget, n=max(budget.n, IMAGES))


def criterion_for(restore: str) -> CriterionName:
    """How channels are judged where nobody says: on images if these restore as well."""
    found = {str(name): how for name, how in RESTORATIONS.items()}.get(restore)
    return "reconstruction" if found is not None and found.looks else "energy"
