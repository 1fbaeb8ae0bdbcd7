"""`dfq.quantize`: images, grids, bits, learned rounding, and the verdict, in this order."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack, cast

import jax

from dfq_jax.allocation.allocate import limit_of
from dfq_jax.allocation.costs import Budget
from dfq_jax.api.delivered import deliverable, split_probes
from dfq_jax.api.given import GivenImages, image_set
from dfq_jax.api.grids import calibrated
from dfq_jax.api.request import (
    Asked,
    Configured,
    Follow,
    Settings,
    check_synthesis,
    configured,
    following,
    name_of_method,
    resolved,
)
from dfq_jax.api.result import Result
from dfq_jax.api.synthesize import synthesize
from dfq_jax.api.verdict import (
    expected,
    judged,
    judges_of,
    qualified,
    rather_plain,
    with_costs,
)
from dfq_jax.base.words import Preset
from dfq_jax.errors import ResourceError
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import name_of, noun_of
from dfq_jax.optim.progress import SILENT, UnitReport, Watcher
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.plan import resolve
from dfq_jax.quantization.rules import written
from dfq_jax.quantization.shared_grids import shared_grids
from dfq_jax.recipes.dfq_biases import with_biases_corrected
from dfq_jax.recipes.expense import length, manner
from dfq_jax.recipes.foresight import foreseen
from dfq_jax.recipes.mixed import Mixed, offered
from dfq_jax.recipes.pipeline import Pipeline
from dfq_jax.recipes.presets import (
    ImageBudget,
    budget_of_method,
    budget_of_stages,
    image_budget,
    makes_noise,
    mixed_budget,
    noise_budget,
)
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.recipes.reconstructions import (
    foretold,
    learns_in_stages,
    reconstructed,
)
from dfq_jax.recipes.rows import ROWS, makes_rows, method_of
from dfq_jax.report.analyze import analyze
from dfq_jax.report.trust import judges_classes
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.run.limits import host_bytes
from dfq_jax.synthesis.run.memory import in_units

JUDGED_BY_ITS_OWN = (
    "all images calibrate, as they are, and judge as well (`raw_images`): how often the "
    "networks agree, and the noise of outputs, are better here than on images of its users"
)
OWN = "own"
"""In reports, the preset of a pipeline that is no preset's."""


def quantize(
    model: Model,
    images: GivenImages | None = None,
    pipeline: Pipeline | None = None,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    watch: Watcher = SILENT,
    state_folder: str | Path | None = None,
    **settings: Unpack[Settings],
) -> Result:
    """Quantizes a network without data. One without batch-norm statistics gets noise images.

    Args:
      model: network with its batch norms in place.
      images: to calibrate with, a quarter held out (see `given.image_set`); None to make them.
      pipeline: how to quantize, instead of scheme, preset and the other names; `pipeline_for` says
        what names come to.
      config: settings from a TOML file with a table `[quantize]`, or from a dictionary of them;
        those given here win.
      watch: told what is being done, how it advances, how each unit fared, and which part of the
        run begins; the last is `verifying`, which `Result.verify` does.
      state_folder: keeps state here and resumes from it.
      **settings: any of
        scheme: `w{2..8}a{2..8}`, by default `w8a8`. `w8a16` has activations on 16-bit grids; `w8`,
          `w4` or `w4g64` (a scale for every 64 input channels) quantize weights alone: all of these
          compute in float. `w8ta8` has one scale a kernel.
        preset: `fast` (few images, rounding to nearest), `balanced` (many, layers solved in closed
          form) or `best` (gradient reconstruction on top, where images are small).
        layers: which layers stay at 8 bits.
        method: how to synthesize, instead of the preset's choice: a recipe or its name; a published
          one makes as many images in as many steps as its paper has; ranges end at images of `aac`.
        n, steps: how many images to make, and of a batch of them, instead.
        reconstruction: how kernels are rounded, one of `recipes.reconstructions.RECONSTRUCTIONS`;
          `reconstruction_steps` are of a unit, instead of the paper's.
        observer, weight_observer: how ranges of activations and of kernels are found
          (`quantization.observers.NAMED`), instead of BRECQ's search.
        equalize, relu6, absorb, split, value_aware: what is done to the float network first
          (`edits.Surgery`; `equalize` is its reach, or `none`).
        bias_correction, reestimate, raw_images: `bias`, `reestimate` and `raw` of `Pipeline`.
        budget: of bits by layer: `4.5bits` a weight, `600KB`, `2GBOPs`; makes 43 images or more.
        sensitivity: how that predicts what bits are worth: `kl` (ZeroQ), `fisher` or `trace`.
        rules: bits of particular layers, which a budget leaves as they are.
        accuracy: top-1 of the float network in (0, 1], if known: narrows its expected loss.
        probes: of `recipes.probes.probes_of`, if they are made; tell the expected loss.
        task: what the network is for: a `graph.tasks.Task` or its name (classifier, dense, image,
          embedding, detector, language, values), instead of what its graph says.
        store: form of kernels below 8 bits in the file: `packed`, `int8` or ONNX's `int4`.
        seed: of everything random but the probes.
        memory: bytes that a step may take: batches are split, too large blocks learn by layer.

    Raises:
      UsageError: for a bad argument or images of another contract; a budget out of reach.
    """
    told = Configured(None, {}) if config is None else configured(config)
    images = told.images if images is None else images
    chosen: dict[str, Any] = {**told.settings, **settings}
    check_synthesis(model, chosen, given=images is not None)
    asked = resolved(model, cast(Settings, chosen), pipeline)
    follow = following(watch, state_folder)
    return carried_out(model, images, asked, follow)


def carried_out(model: Model, given: GivenImages | None, asked: Asked, follow: Follow) -> Result:
    """The network as asked for."""
    check_bits(model, asked)
    looked_at, follow = seen_for(model, given, making_for(model, asked), asked, follow)
    return quantized_on(model, looked_at, asked, follow)


class LookedAt(NamedTuple):
    """The images of a run.

    Attributes:
      images: as a camera could deliver them, unless the pipeline takes them raw.
      making: how they were made; None if somebody brought them.
      fitted: whether the network was fitted to three quarters of them before it is quantized: then
        only the others judge.
    """

    images: Examples
    making: ImageBudget | None
    fitted: bool = False


def seen_for(
    model: Model, given: GivenImages | None, making: ImageBudget, asked: Asked, follow: Follow
) -> tuple[LookedAt, Follow]:
    """The images of a run, brought or made now, and those who follow it, told how long it takes."""
    brought = None if given is None else image_set(given, model.input, follow.watch.says)
    follow = with_foresight(follow, model, making, brought, asked)
    images = made_images(model, making, asked, follow) if brought is None else brought
    images = images if asked.pipeline.raw else deliverable(images, model.input)
    return LookedAt(images, making if brought is None else None), follow


def quantized_on(
    model: Model, looked_at: LookedAt, asked: Asked, follow: Follow, original: Model | None = None
) -> Result:
    """The network as asked for.

    Args:
      model: the network.
      looked_at: the images.
      asked: how.
      follow: who is told.
      original: what the network was before others changed what it computes; what is lost is
        judged against that.
    """
    images, making, fitted = looked_at
    whole = model if original is None else original
    if images.guessed and asked.pipeline.doubt:  # no evidence of how to round
        asked = asked.without_learning()
    raw = asked.pipeline.raw
    seen, probes = (images, deliverable(images, model.input)) if raw else split_probes(images)
    made, mix, cut = calibrated(model, seen, asked, follow)
    plain, (made, units) = made, learned(model, made, seen, asked, follow)
    used = fitted or made.used_images or mix is not None
    probes = probes if used or raw else images
    judges = judges_of(whole, made, asked, follow)
    loss_of = partial(expected, model=whole, judges=judges, accuracy=asked.accuracy)
    unseen = making is None and not used
    note, loss = "", loss_of(made)
    if units and asked.pipeline.doubt:
        plain = with_biases_corrected(plain, seen.array)
        kept = rather_plain(plain, made, probes, loss, loss_of)
        if kept is not None:
            made, units, (note, loss) = plain, (), kept
            asked = asked.without_learning()
    what = f"{noun_of(model.inputs[0])}s"
    follow.watch.says(f"judging on {len(probes)} {'of these' if raw else 'held-out'} {what}")
    right = None if original is None else fold_batch_norm(original)
    found = analyze(made.reference, made.quantized, probes.array, task=asked.task, original=right)
    shared = shared_grids(made.quantized, probes.array)
    found = dataclasses.replace(found, units=units, shared_grids=shared, given=images.given)
    found = judged(found, judges, loss)
    found = with_costs(found, made, probes, asked, follow)
    report = qualified(found, images, note)
    more = (unlooked_at(images, asked, what), *cut) if unseen else cut
    more = (JUDGED_BY_ITS_OWN, *more) if raw and used else more
    report = dataclasses.replace(report, notes=(*report.notes, *more))
    settings = resolved_settings(asked, mix)
    settings["images"] = f"{len(images)} ({images.provenance.get('method', 'given')})"
    if making is not None and making.steps:
        method = asked.method or making.method
        settings["synthesis"] = manner(model, method, making, asked.preset or OWN)
    settings["held out"] = 0 if raw or probes is seen else len(probes)
    follow.begins("verifying")
    return Result(made.quantized, model, images, probes, report, settings, mix, judges.images)


def with_foresight(
    follow: Follow, model: Model, making: ImageBudget, brought: Examples | None, asked: Asked
) -> Follow:
    """Those who follow, with how long each part of the run is foreseen to take."""
    if follow.watch.phase is None:
        return follow
    made, count = (making, making.n) if brought is None else (None, len(brought))
    judges = asked.probes is None and judges_classes(model, asked.task)
    seconds = foreseen(model, made, count, methods=asked.pipeline.methods, judges=judges)
    return dataclasses.replace(follow, foreseen=seconds)


def unlooked_at(images: Examples, asked: Asked, what: str) -> str:
    """What to say of images or rows that were brought, and that a preset did not look at."""
    return (
        f"preset {asked.preset or OWN} takes the ranges of {asked.pipeline.scheme} from "
        f"batch-norm statistics: the {len(images)} {what} you gave only judge the result; "
        '`preset="balanced"` looks at them'
    )


def learned(
    model: Model, made: Quantized, seen: Examples, asked: Asked, follow: Follow
) -> tuple[Quantized, tuple[UnitReport, ...]]:
    """The network after learned rounding, if it was asked for, and how each unit fared."""
    methods, enlarge = asked.pipeline.methods, asked.pipeline.enlarge
    if not methods:
        return made, ()
    count = len(seen) * (enlarge.times if enlarge else 1)
    follow.begins("learning")
    needed = foretold(made, count, methods, asked.memory)
    require_memory(needed, count)
    about = f"about {in_units(needed)} of memory"
    follow.watch.says(f"reconstructing ({asked.pipeline.reconstruction}), {about}")
    return reconstructed(
        made,
        seen.array,
        methods,
        jax.random.key(asked.seed),
        enlarge=enlarge,
        memory=asked.memory,
        place=follow.place,
        watch=follow.watch,
    )


def resolved_settings(asked: Asked, mix: Mixed | None) -> dict[str, Any]:
    """What was resolved, for reports."""
    how = asked.pipeline
    settings = {"scheme": str(how.scheme), "preset": asked.preset or OWN, "layers": how.layers}
    settings |= {"seed": asked.seed, "reconstruction": how.reconstruction, "store": how.store}
    if asked.task is not None:
        settings["task"] = name_of(asked.task)
    if how.rules:
        settings["rules"] = ", ".join(map(written, how.rules))
    if mix is not None:
        settings["budget"] = f"{mix.chosen.cost} of {how.budget} ({how.sensitivity})"
    return settings


def require_memory(needed: int, images: int) -> None:
    """Refuses to learn what the machine cannot hold: data of all images stay in its memory.

    Raises:
      ResourceError: with the bytes.
    """
    there = host_bytes()
    if there is not None and needed > there:
        raise ResourceError(
            f"learning from {images} images takes about {in_units(needed)} of memory ({needed} "
            f"bytes), and there are {in_units(there)}: give fewer images, or reconstruct "
            "'nearest', which keeps none."
        )


def check_bits(model: Model, asked: Asked) -> None:
    """Refuses bits that a network cannot have, before anything is made or learned.

    Rules of a network that value-aware surgery takes apart wait for that: they may name the parts.

    Raises:
      PlanError: for a rule that matches no layer.
      BudgetError: for a budget out of reach.
    """
    how = asked.pipeline
    if how.budget is not None:
        require_bit_reach(model, how.budget, how)
    if not how.surgery.value_aware:
        folded = jax.eval_shape(fold_batch_norm, model).graph
        resolve(folded, how.scheme, how.layers, how.rules)


def require_bit_reach(model: Model, budget: Budget, how: Pipeline) -> None:
    """Refuses a budget out of reach before images are made; biases that come later do not count.

    Raises:
      BudgetError: naming the smallest budget within reach.
    """
    reference = fold_batch_norm(model)
    limit_of(reference, offered(reference.graph, how, budget.unit), budget)


def making_for(model: Model, asked: Asked) -> ImageBudget:
    """How many images are made, and how: as asked, as published for a named method, or by preset.

    A rounding that was named and learns gets as many as preset `best` makes. More of them where
    they are noise and cost nothing.
    """
    methods = asked.pipeline.methods
    if makes_rows(model):
        chosen = method_of(model, name_of_method(asked.method or "best"), asked.task)
        return ImageBudget(chosen, asked.n or ROWS[asked.preset or "fast"], 0)
    found = image_budget(preset_of_images(asked), model.input, learned=bool(methods))
    found = budget_of_stages(found) if learns_in_stages(methods) else found
    if makes_noise(model, asked.method or found.method):
        found = noise_budget(found)
    elif asked.method is not None:
        found = budget_of_method(asked.method, model)
    if asked.pipeline.budget is not None and not asked.pipeline.raw:
        found = mixed_budget(found)
    n, steps = asked.n or found.n, found.steps and (asked.steps or found.steps)
    return dataclasses.replace(found, n=n, steps=steps)


def preset_of_images(asked: Asked) -> Preset:
    """Whose number of images is made where no method is named: `best`'s for a named rounding."""
    return "best" if learns_as_named(asked) else asked.preset or "fast"


def learns_as_named(asked: Asked) -> bool:
    """Whether somebody, not a preset, chose that rounding is learned."""
    return bool(asked.pipeline.methods) and not asked.pipeline.doubt


def made_images(model: Model, budget: ImageBudget, asked: Asked, follow: Follow) -> Examples:
    """The images to calibrate with."""
    follow.begins("making images")
    chosen = asked.method or budget.method
    shown = name_of_method(chosen if budget.steps else budget.method)
    what = f"{noun_of(model.inputs[0])}s"
    follow.watch.says(f"synthesizing {budget.n} {what} ({shown})")
    if budget.steps and (asked.method or asked.n or asked.steps):
        how = manner(model, chosen, budget, asked.preset or OWN)
        follow.watch.says(f"  {how}{length(model, budget)}")
    elif learns_as_named(asked):
        rounding = asked.pipeline.reconstruction
        follow.watch.says(f"  as many as preset best makes, since {rounding} learns from them")
    images = synthesize(
        model,
        chosen,
        budget.n,
        seed=asked.seed,
        steps=None if isinstance(chosen, Recipe) else budget.steps or None,
        memory=asked.memory,
        task=asked.task,
        watch=follow.watch.without_words(),
        state_folder=follow.place.folder,
    )
    for note in images.provenance.get("notes", ()):
        follow.watch.says(note)
    return images
