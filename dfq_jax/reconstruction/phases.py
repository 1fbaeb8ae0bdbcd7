"""The optimisations of a unit: what trains, what it is fed, and how it is rounded for good."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dfq_jax.graph.graph import Model
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import Affine
from dfq_jax.numerics.rounding import POSITIVE, Rounding
from dfq_jax.optim.attempts import at_lower_rates, rate_of, retold
from dfq_jax.optim.fit import FitResult, Metrics, fit
from dfq_jax.optim.state import Place, StateStore
from dfq_jax.optim.steps import descent
from dfq_jax.quantization.plan import Plan, Site
from dfq_jax.reconstruction.batches import Rows, supply
from dfq_jax.reconstruction.borders import absorbed, borders_at_first
from dfq_jax.reconstruction.guided import CHUNK, guided_objective_of, variances
from dfq_jax.reconstruction.method import Phase, Reconstruction, batch_of
from dfq_jax.reconstruction.objective import Guide, UnitContext, objective_of, optimizer_of
from dfq_jax.reconstruction.unit_at_work import OnStep, UnitAtWork, power_of
from dfq_jax.values import bound


class Learned(NamedTuple):
    """A unit after an attempt to make it better.

    Attributes:
      model: the unit.
      qparams: its scales.
      notes: what went wrong on the way, in words that follow its name.
    """

    model: Model
    qparams: Mapping[Site, Affine]
    notes: tuple[str, ...] = ()


def in_phases(
    work: UnitAtWork, method: Reconstruction, key: Key[Array, ""], place: Place
) -> Learned:
    """A unit after all optimisations of a method."""
    done, steps, notes = 0, sum(phase.steps for phase in method.phases), ()
    for number, phase in enumerate(method.phases):
        store = (place / f"phase-{number}").store()
        tell = partial(counted, work.on_step, done, steps)
        found = phase_of(work, method, phase, jax.random.fold_in(key, number), store, tell)
        done, notes = done + phase.steps, notes + found.notes
        work = work._replace(model=found.model, qparams=found.qparams)
    return Learned(work.model, work.qparams, notes)


def counted(tell: OnStep, done: int, steps: int, step: int, parts: Metrics) -> None:
    """Tells of a step behind so many of earlier phases."""
    tell(done + step, steps, parts)


def phase_of(
    work: UnitAtWork,
    method: Reconstruction,
    phase: Phase,
    key: Key[Array, ""],
    store: StateStore | None,
    on_chunk: Callable[[int, Metrics], None],
) -> Learned:
    """The unit after one optimisation: kernels on their grids, scales of activations learned.

    Where it diverges it is made again at half the rates; after `RESTARTS` times it is left as it
    was.
    """
    plan, model, qparams = work.unit.plan, work.model, work.qparams
    rounding = method.rounding if phase.kernels else None
    kernels, fixed = begun(model, qparams, plan, rounding, work.still)
    edges = coarse_edges(plan, qparams) if phase.edges else {}
    biases = biases_of(model) if phase.biases else {}
    borders = borders_at_first(model, plan) if phase.borders else {}
    trained = {"kernels": kernels, "edges": edges, "biases": biases, "borders": borders}
    if not jax.tree.leaves(trained):
        return Learned(model, qparams)
    rest = work.beyond.rest if work.beyond is not None and method.prediction else None
    rows = rows_of(work, method)
    batch = batch_of(method, work.exact.shape)
    given = supply(rows, batch, int(jax.random.bits(key)), work.memory)
    context = UnitContext(model, qparams, fixed, power_of(work.targets), rest, given.resident)
    if method.guided:
        units = variances(work.reference, work.exact)
        context = context._replace(guide=Guide(work.reference, units))
    objective = (guided_objective_of if method.guided else objective_of)(plan, method, phase)
    attempt = lambda number: fit(
        descent(objective, bound(optimizer_of, method.rates, phase.steps, rate_of(number))),
        trained,
        context,
        steps=phase.steps,
        key=key,
        chunk=min(given.chunk, CHUNK) if method.guided else given.chunk,
        on_chunk=on_chunk,
        store=store if number == 0 else None,
        feed=given.feed,
    )
    found, failed = at_lower_rates(attempt)
    if found.status == "diverged":
        left = f"diverged in each of {len(failed)} attempts and was left as it was"
        return Learned(model, qparams, (left,))
    return Learned(*hardened(found, model, qparams, fixed, plan, method.rounding), retold(failed))


def coarse_edges(plan: Plan, qparams: Mapping[Site, Affine]) -> dict[str, Array]:
    """{tensor: scale} of the grids of activations that learn: those of fewer than 8 bits.

    At 8 bits ranges cost nothing worth learning, and the steps of Adam are as long as such a scale
    itself: a synthetic image whose values stay in a part of the range would pull the grid there,
    and images of the world would be clipped.
    """
    table = plan.table
    return {
        tensor: qparams[sites[0]].scale
        for tensor, sites in plan.groups
        if table[sites[0]].levels.bits < 8
    }


def begun(
    model: Model,
    qparams: Mapping[Site, Affine],
    plan: Plan,
    rounding: Rounding | None,
    still: frozenset[str] = frozenset(),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What kernels train and what stays, by layer; nothing trains without a rounding.

    Those of layers that are `still` are rounded to nearest.
    """
    trained, fixed = {}, {}
    for site, spec in plan.entries:
        if site.argument is None and rounding is not None and site.node not in still:
            kernel = model.params[site.node]["kernel"]
            trained[site.node], fixed[site.node] = rounding.init(kernel, qparams[site], spec.grid)
    return trained, fixed


def hardened(
    found: FitResult,
    model: Model,
    qparams: Mapping[Site, Affine],
    fixed: Mapping[str, Any],
    plan: Plan,
    rounding: Rounding,
) -> tuple[Model, Mapping[Site, Affine]]:
    """The unit with what was learned, rounded for good."""
    scales, kernels = dict(qparams), {}
    for node, trained in found.x["kernels"].items():
        site = Site(node)
        scales[site], kernel = rounding.hard(trained, fixed[node], plan.table[site].grid)
        kernels[node] = {"kernel": kernel}
    groups = dict(plan.groups)
    for tensor, scale in found.x["edges"].items():
        zero_point = qparams[groups[tensor][0]].zero_point
        affine = Affine(jnp.maximum(scale, POSITIVE), zero_point)
        scales |= dict.fromkeys(groups[tensor], affine)
    biases = {node: {"bias": bias} for node, bias in found.x["biases"].items()}
    learned = with_params(with_params(model, kernels), biases)
    return absorbed(learned, scales, plan, found.x["borders"])


def biases_of(model: Model) -> dict[str, Array]:
    """{layer: bias} where there is one."""
    return {n: slots["bias"] for n, slots in model.params.items() if "bias" in slots}


def rows_of(work: UnitAtWork, method: Reconstruction) -> Rows:
    """All that the steps of a method read."""
    ahead = work.beyond is not None and method.prediction is not None
    logits = work.beyond.logits if ahead and work.beyond else None
    host: Any = (work.exact, work.rough, work.targets, work.slopes, logits)
    return Rows(*host)
