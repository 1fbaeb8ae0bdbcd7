"""Block reconstruction: one engine for every method that learns rounding unit by unit.

Float and quantized images pass through the network side by side, one unit at a time; what enters
and leaves the unit at work lies in host memory, and steps are fed from there. A unit learns to
give the float unit's output from the quantized one's input; then it is rounded for good and its
output travels on, so later units make up for what earlier ones could not.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dfq_jax.errors import PlanError
from dfq_jax.graph.evaluate import Tensor, evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import Affine
from dfq_jax.numerics.rounding import POSITIVE, Rounding
from dfq_jax.optim.fit import FitResult, fit
from dfq_jax.optim.state import StateStore
from dfq_jax.quantize.closed_form import ClosedForm, solved
from dfq_jax.quantize.finished import Finished, UnitReport, load_unit, save_unit
from dfq_jax.quantize.learning import Given, Phase, Reconstruction, objective_of, optimizer_of
from dfq_jax.quantize.plan import Plan, Site
from dfq_jax.quantize.simulate import QuantizedModel, simulation_hook
from dfq_jax.quantize.units import (
    Host,
    Unit,
    layers_of,
    pieces,
    unit_model,
    unit_qparams,
    units_of,
    with_unit,
)

Method = Reconstruction | ClosedForm
MOST_STEPS = 50
"""Steps fed to the device at a time."""


def reconstruct(
    quantized: QuantizedModel,
    reference: Model,
    images: Host | Float[Array, "n h w c"],
    method: Method,
    key: Key[Array, ""],
    *,
    memory: int | None = None,
    folder: Path | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    on_unit: Callable[[int, int, UnitReport], None] | None = None,
) -> tuple[QuantizedModel, tuple[UnitReport, ...]]:
    """Learns the rounding of a calibrated network, unit by unit.

    Args:
      quantized: the network with its grids; kernels not rounded yet.
      reference: the float network, node for node the same.
      images: normalised.
      method: what is learned, and how.
      key: the only source of randomness.
      memory: bytes of images' data to feed to the device at a time; None for 1 GiB.
      folder: where finished units and unfinished states are kept, to resume from.
      fingerprint: what these depend on besides the arguments.
      on_unit: told (index, of how many, report) after each.

    Returns:
      The network with its kernels on their grids, and how each unit fared.

    Raises:
      PlanError: without images.
      UsageError: if the folder belongs to another run; names the difference.
    """
    if len(images) == 0:
        raise PlanError("reconstruct() needs at least one image.")
    if folder is not None:
        facts = facts_of(quantized, np.asarray(images), method, key)
        StateStore(folder, {**facts, **(fingerprint or {})})  # refuses a folder of another run
    merge = 1 if isinstance(method, ClosedForm) else method.merge
    units = units_of(reference.graph, quantized.plan, merge=merge)
    exact = rough = np.asarray(images)
    reports = []
    for index, unit in enumerate(units):
        float_unit = unit_model(unit, reference)
        targets = passed(float_unit, None, None, exact)
        plain, qparams = unit_model(unit, quantized.model), unit_qparams(unit, quantized.qparams)
        work = Work(unit, float_unit, plain, qparams, exact, rough, targets, memory or 2**30)
        if unit.plan.entries:
            place = None if folder is None else folder / f"unit-{index}"
            found = finished(work, method, jax.random.fold_in(key, index), place)
            quantized = with_unit(quantized, unit, found.model, found.qparams)
            reports.append(found.report)
            if on_unit is not None:
                on_unit(index, len(units), found.report)
            plain, qparams = found.model, found.qparams
        exact, rough = targets, passed(plain, qparams, unit.plan, rough)
    return quantized, tuple(reports)


def facts_of(
    quantized: QuantizedModel, images: Host, method: Method, key: Key[Array, ""]
) -> dict[str, Any]:
    """What a finished unit depends on, as plain data."""
    digest = lambda tree: hashlib.sha256(
        b"".join(np.asarray(v).tobytes() for v in jax.tree.leaves(tree))
    ).hexdigest()
    plan = quantized.plan
    settings: dict[str, Any] = method._asdict()
    if not isinstance(method, ClosedForm):
        settings |= {"rounding": method.rounding.name, "loss": method.loss.__name__}
    return {
        "method": repr(settings),
        "plan": hashlib.sha256(repr(plan).encode()).hexdigest(),
        "scheme": str(plan.scheme),
        "weights": digest((quantized.model.params, quantized.qparams)),
        "images": digest(images),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }


class Work(NamedTuple):
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
    """

    unit: Unit
    reference: Model
    model: Model
    qparams: Mapping[Site, Affine]
    exact: Host
    rough: Host
    targets: Host
    memory: int


def finished(work: Work, method: Method, key: Key[Array, ""], place: Path | None) -> Finished:
    """A unit after learning, from its file if it was done before."""
    file = None if place is None else place.with_suffix(".npz")
    found = None if file is None else load_unit(file, work.model, work.qparams)
    if found is None:
        found = learned(work, method, key, place)
        if file is not None:
            save_unit(file, found)
    return found


def learned(work: Work, method: Method, key: Key[Array, ""], place: Path | None) -> Finished:
    """A unit after learning, or rounded to nearest if that is better."""
    start, unit = time.monotonic(), work.unit
    error = lambda model, qparams: gap(passed(model, qparams, unit.plan, work.rough), work.targets)
    before = error(work.model, work.qparams)
    model, qparams = optimised(work, method, key, place)
    after = error(model, qparams)
    kept = after <= before
    report = UnitReport(unit.title, before, after, kept, time.monotonic() - start)
    if not kept:
        model, qparams = work.model, work.qparams
    return Finished(model, qparams, report)


def optimised(
    work: Work, method: Method, key: Key[Array, ""], place: Path | None
) -> tuple[Model, Mapping[Site, Affine]]:
    """A unit as a method would have it."""
    if isinstance(method, ClosedForm):
        solve = lambda part, number: solved(
            part.model, part.qparams, part.unit.plan, part.exact, part.rough, method
        )
        return layer_by_layer(work, solve)
    if not method.layers:
        return in_phases(work, method, key, place)

    def learn(part: Work, number: int) -> tuple[Model, Mapping[Site, Affine]]:
        where = None if place is None else place / f"layer-{number}"
        return in_phases(part, method, jax.random.fold_in(key, number), where)

    return layer_by_layer(work, learn)


def in_phases(
    work: Work, method: Reconstruction, key: Key[Array, ""], place: Path | None
) -> tuple[Model, Mapping[Site, Affine]]:
    """A unit after all optimisations of a method."""
    for number, phase in enumerate(method.phases):
        store = None if place is None else StateStore(place / f"phase-{number}", {})
        found = phase_of(work, method, phase, jax.random.fold_in(key, number), store)
        work = work._replace(model=found[0], qparams=found[1])
    return work.model, work.qparams


def layer_by_layer(
    work: Work, treat: Callable[[Work, int], tuple[Model, Mapping[Site, Affine]]]
) -> tuple[Model, Mapping[Site, Affine]]:
    """A unit whose layers are treated one after the other, each behind those that are done."""
    whole = QuantizedModel(work.model, work.unit.plan, work.qparams)
    for number, layer in enumerate(layers_of(work.unit)):
        name = layer.block.names[0]
        exact = passed(work.reference, None, None, work.exact, name)
        rough = passed(whole.model, whole.qparams, whole.plan, work.rough, name)
        float_layer = unit_model(layer, work.reference)
        targets = passed(float_layer, None, None, exact)
        model, qparams = unit_model(layer, whole.model), unit_qparams(layer, whole.qparams)
        part = Work(layer, float_layer, model, qparams, exact, rough, targets, work.memory)
        whole = with_unit(whole, layer, *treat(part, number))
    return whole.model, whole.qparams


def phase_of(
    work: Work,
    method: Reconstruction,
    phase: Phase,
    key: Key[Array, ""],
    store: StateStore | None,
) -> tuple[Model, Mapping[Site, Affine]]:
    """The unit after one optimisation: kernels on their grids, scales of activations learned."""
    plan, model, qparams = work.unit.plan, work.model, work.qparams
    kernels, fixed = begun(model, qparams, plan, method.rounding if phase.kernels else None)
    edges = {t: qparams[sites[0]].scale for t, sites in plan.groups} if phase.edges else {}
    power = jnp.float32(np.mean(np.sum(np.square(work.targets), axis=-1)))
    found = fit(
        objective_of(plan, method, phase),
        {"kernels": kernels, "edges": edges},
        Given(model, qparams, fixed, jnp.maximum(power, 1e-30)),
        optimizer=optimizer_of(method.rates, phase.steps),
        steps=phase.steps,
        key=key,
        chunk=chunk_within(work, method.batch),
        store=store,
        feed=partial(fed, work, method.batch, int(jax.random.bits(key))),
    )
    if store is not None:
        store.clear()
    return hardened(found, model, qparams, fixed, plan, method.rounding)


def begun(
    model: Model, qparams: Mapping[Site, Affine], plan: Plan, rounding: Rounding | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What kernels train and what stays, by layer; nothing trains without a rounding."""
    trained, fixed = {}, {}
    for site, spec in plan.entries:
        if site.argument is None and rounding is not None:
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
        site = Site(node, "kernel")
        scales[site], kernel = rounding.hard(trained, fixed[node], plan.table[site].grid)
        kernels[node] = {"kernel": kernel}
    groups = dict(plan.groups)
    for tensor, scale in found.x["edges"].items():
        zero_point = qparams[groups[tensor][0]].zero_point
        affine = Affine(jnp.maximum(scale, POSITIVE), zero_point)
        scales |= dict.fromkeys(groups[tensor], affine)
    return with_params(model, kernels), scales


def fed(work: Work, batch: int, seed: int, step: int, length: int) -> tuple[Host, Host, Host]:
    """(float inputs, quantized inputs, targets) of the batches of some steps."""
    count = len(work.exact)
    draw = lambda i: np.random.default_rng([seed, i]).choice(count, batch, replace=count < batch)
    rows = np.stack([draw(i) for i in range(step, step + length)])
    return work.exact[rows], work.rough[rows], work.targets[rows]


def chunk_within(work: Work, batch: int) -> int:
    """Steps whose data fit into the memory allowed, at least one."""
    each = sum(v[0].nbytes for v in (work.exact, work.rough, work.targets)) * batch
    return int(np.clip(work.memory // max(each, 1), 1, MOST_STEPS))


def passed(
    model: Model,
    qparams: Mapping[Site, Affine] | None,
    plan: Plan | None,
    data: Host,
    tap: str | None = None,
) -> Host:
    """A unit's first output for all images, or what one of its nodes reads, a batch at a time."""
    done = [np.asarray(run(model, qparams, x, plan, tap)) for x in pieces(data, 32)]
    return np.concatenate(done)


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
    outputs, taps = evaluate(model, x, hook=hook, taps=() if tap is None else (tap,))
    return outputs[0] if tap is None else taps[tap]


def gap(outputs: Host, targets: Host) -> float:
    """Squared error of outputs, in units of the squared norm of the targets."""
    error = np.sum(np.square(outputs - targets, dtype=np.float64))
    return float(error / max(float(np.sum(np.square(targets, dtype=np.float64))), 1e-30))
