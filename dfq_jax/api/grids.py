"""The network on its grids: calibrated, with bits within a budget and sums within 32 bits."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax

from dfq_jax.allocation.costs import with_biases_of
from dfq_jax.api.request import Asked, Follow
from dfq_jax.base.words import Store
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.optim.progress import Watcher
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.smooth import smooth
from dfq_jax.quantization.plan import FLOAT, Rule, stored_as
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sums import LongSum, overflowing, smaller, told
from dfq_jax.recipes.dfq import at_one_width, dfq
from dfq_jax.recipes.mixed import Mixed, mixed
from dfq_jax.recipes.pipeline import Pipeline
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.training.in_float import NO_LEVELS


def calibrated(
    model: Model, seen: Examples, asked: Asked, follow: Follow
) -> tuple[Quantized, Mixed | None, tuple[str, ...]]:
    """The network on its grids, with bits chosen within a budget if there is one, and how.

    The last are layers that had to have smaller codes than asked for, in words.
    """
    follow.begins("calibrating")
    how, rules = asked.pipeline, asked.pipeline.rules
    if how.scheme == FLOAT:
        whole = fold_batch_norm(model)
        return Quantized(QuantizedModel(whole, NO_LEVELS, {}), whole, False), None, ()
    if how.smooth is not None:
        model = smooth(model, seen.array, how.smooth)
    make = partial(made_on_grids, model, seen, how, watch=follow.watch)
    stored = partial(in_form, store=how.store)
    made = make(rules=rules)
    if how.even:
        made, make = at_one_width(made, seen.array, partial(make, rules=rules))
    if how.budget is None:
        made, cut = within_sums(made, rules, make, follow)
        return stored(made), None, cut
    mix = mixed(
        with_biases_of(made.reference, made.quantized.model),
        seen.array,
        how,
        task=asked.task,
        key=jax.random.key(asked.seed),
        watch=follow.watch,
    )
    rules = (*rules, *mix.rules)
    made, cut = within_sums(make(rules=rules), rules, make, follow)
    return stored(made), mix, cut


def made_on_grids(
    model: Model,
    seen: Examples,
    how: Pipeline,
    *,
    rules: tuple[Rule, ...],
    watch: Watcher,
    level: float | None = None,
) -> Quantized:
    """The network on its grids, before anything is learned.

    Args:
      model: with its batch norms in place.
      seen: images to calibrate with.
      how: what is done.
      rules: instead of its own.
      watch: told what is being done.
      level: deviations by which channels get one width.
    """
    made = dfq(
        model,
        seen.array,
        how.scheme,
        layers=how.layers,
        rules=rules,
        surgery=how.surgery,
        level=level,
        bias="none" if how.methods else how.bias,
        reestimate=how.reestimate,
        peaks=seen.array if seen.evidence == "peaks" else None,
        statistics_suffice=how.spare,
        noise=seen.guessed,
        observers=how.observers,
        watch=watch,
    )
    for place in how.placed:
        made = place(made)
    return made


def in_form(made: Quantized, store: Store) -> Quantized:
    """The same network, its kernels in another form in the file."""
    plan = stored_as(made.quantized.plan, store)
    return made._replace(quantized=dataclasses.replace(made.quantized, plan=plan))


def within_sums(
    made: Quantized, rules: tuple[Rule, ...], on_grids: Callable[..., Quantized], follow: Follow
) -> tuple[Quantized, tuple[str, ...]]:
    """The network with smaller codes where sums of products could leave 32 bits, and which."""
    found: dict[str, LongSum] = {}
    while long := overflowing(made.quantized):
        found = {x.layer: x for x in long} | found
        rules = (*rules, *(smaller(made.quantized.plan, x) for x in long))
        made = on_grids(rules=rules)
    notes = told(found, made.quantized.plan)
    for note in notes:
        follow.watch.says(note)
    return made, notes
