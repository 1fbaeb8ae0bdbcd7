"""Block reconstruction: one engine for every method that learns rounding unit by unit.

Float and quantized images pass through the network side by side, one unit at a time; what enters
and leaves the unit at work lies in host memory, and steps are fed from there. A unit learns to
give the float unit's output from the quantized one's input; then it is rounded for good and its
output travels on, so later units make up for what earlier ones could not.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key, Shaped

from dfq_jax.errors import PlanError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.optim.fit import Metrics
from dfq_jax.optim.progress import SILENT, UnitReport, Watcher
from dfq_jax.optim.state import NOWHERE, Place
from dfq_jax.quantization.plan import Plan
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.reconstruction.closed_form import ClosedForm, solved
from dfq_jax.reconstruction.corrected_inputs import corrected_inputs
from dfq_jax.reconstruction.effort import UnitProgress, closed_form_of, positions, shares
from dfq_jax.reconstruction.footprint import (
    FED,
    Method,
    layered,
    layers_instead,
    learned_units,
    looks_ahead,
)
from dfq_jax.reconstruction.method import Reconstruction, relative_gap
from dfq_jax.reconstruction.phases import Learned, in_phases
from dfq_jax.reconstruction.saved_units import Finished, load_unit, save_unit
from dfq_jax.reconstruction.unit_at_work import (
    Beyond,
    OnLayer,
    OnStep,
    UnitAtWork,
    error_of,
    flow,
    passed,
    slopes_of,
)
from dfq_jax.reconstruction.units import (
    Host,
    Unit,
    layers_of,
    rest_of,
    unit_model,
    unit_qparams,
    units_of,
    with_unit,
)
from dfq_jax.reconstruction.walks import UnitsRun, as_walked, walks_of
from dfq_jax.values import described


def reconstruct(
    quantized: QuantizedModel,
    reference: Model,
    images: Host | Shaped[Array, "n ..."],
    method: Method,
    key: Key[Array, ""],
    *,
    memory: int | None = None,
    place: Place = NOWHERE,
    watch: Watcher = SILENT,
) -> tuple[QuantizedModel, tuple[UnitReport, ...]]:
    """Learns the rounding of a calibrated network, unit by unit.

    Args:
      quantized: the network with its grids; kernels not rounded yet.
      reference: the float network, node for node the same.
      images: normalised.
      method: what is learned, and how.
      key: the only source of randomness.
      memory: bytes that a step may take: units that take more learn layer by layer, without a look
        at the prediction, and images' data are fed to the device in as many parts as it takes; None
        for as much as there is, and 1 GiB of images' data.
      place: where finished units and unfinished states are kept, to resume from.
      watch: told how far the steps of a unit are, and of each unit that is done.

    Returns:
      The network with its kernels on their grids, and how each unit fared.

    Raises:
      PlanError: without images, or for kernels on levels that are not learned.
      UsageError: if `place` belongs to another run, and names the difference, or is in use, or
        a function of the method has no name (`values.bound`).
    """
    if len(images) == 0:
        raise PlanError("reconstruct() needs at least one image.")
    check_kernels(quantized.plan, method)
    if isinstance(method, Reconstruction) and method.layers:
        method = layered(method)
    split = layers_instead(quantized.plan, reference, method, memory)
    run = UnitsRun(reference, images, method, key, memory or FED, split, place, watch)
    with place.owned():
        if place.folder is not None:
            facts = facts_of(quantized, np.asarray(images), method, key)
            place.knowing(facts | {"units layer by layer": sorted(split)}).store()
        return in_walks(quantized, run)


def in_walks(
    quantized: QuantizedModel, run: UnitsRun
) -> tuple[QuantizedModel, tuple[UnitReport, ...]]:
    """`reconstruct` in a folder that is ours, walk by walk."""
    reports: tuple[UnitReport, ...] = ()
    for walk in walks_of(run.method):
        found, told = unit_by_unit(as_walked(quantized, walk), run.within(walk))
        quantized = dataclasses.replace(found, plan=quantized.plan)
        reports += told
    return quantized, reports


def check_kernels(plan: Plan, method: Method) -> None:
    """Refuses kernels on levels that a method does not learn to round to.

    Raises:
      PlanError: naming the first.
    """
    if isinstance(method, ClosedForm):
        return
    for site, spec in plan.entries:
        if site.argument is None and spec.grid.group is not None:
            raise PlanError(
                f"the kernel of {site.node!r} has scales of {spec.grid.group} input channels each, "
                "which no method learns by gradients: reconstruct 'nearest' or 'closed_form', or "
                "give each output channel one scale."
            )


def unit_by_unit(
    quantized: QuantizedModel, run: UnitsRun
) -> tuple[QuantizedModel, tuple[UnitReport, ...]]:
    """One walk through the network."""
    reference, method, watch = run.reference, run.method, run.watch
    units = learned_units(reference, quantized.plan, method)
    exact = rough = np.asarray(run.images)
    logits = passed(reference, None, None, exact) if looks_ahead(method) else None
    reports, spread = [], shares(units, reference, method, len(exact))
    for index, unit in enumerate(units):
        float_unit = unit_model(unit, reference)
        targets = passed(float_unit, None, None, exact)
        plain, qparams = unit_model(unit, quantized.model), unit_qparams(unit, quantized.qparams)
        at = UnitProgress(watch, spread[index], index, len(units))
        work = UnitAtWork(unit, float_unit, plain, qparams, exact, rough, targets, run.memory)
        work = work._replace(on_step=at.learned, on_layer=at.solved)
        work = work._replace(still=still_in(unit, reference, method))
        own = layered(method) if index in run.split else method
        if logits is not None and looks_ahead(own):
            work = work._replace(beyond=Beyond(rest_of(reference, units[index + 1 :]), logits))
        if unit.plan.entries:
            key, place = jax.random.fold_in(run.key, index), run.place / f"unit-{index}"
            found = finished(work, own, key, place)
            quantized = with_unit(quantized, unit, found.model, found.qparams)
            reports.append(found.report)
            watch.ends_unit(index, len(units), found.report)
            plain, qparams = found.model, found.qparams
        exact, rough = targets, passed(plain, qparams, unit.plan, rough)
    return quantized, tuple(reports)


def still_in(unit: Unit, reference: Model, method: Method) -> frozenset[str]:
    """Canonical names of the layers of a unit that learn nothing: the network's first, if so."""
    if isinstance(method, ClosedForm) or not method.skip_first:
        return frozenset()
    first = weighted_nodes(reference.graph)[0].name
    return frozenset(new for old, new in unit.names.items() if old == first)


def facts_of(
    quantized: QuantizedModel, images: Host, method: Method, key: Key[Array, ""]
) -> dict[str, Any]:
    """What a finished unit depends on, as plain data."""
    digest = lambda tree: hashlib.sha256(
        b"".join(np.asarray(v).tobytes() for v in jax.tree.leaves(tree))
    ).hexdigest()
    plan = quantized.plan
    return {
        "method": described(method, "the method"),
        "plan": hashlib.sha256(repr(plan).encode()).hexdigest(),
        "layers": plan.layers,
        "bits": {f"{site.node} {site.slot}": spec.levels.bits for site, spec in plan.entries},
        "observers": sorted({repr(spec.observer) for _, spec in plan.entries}),
        "scheme": str(plan.scheme),
        "weights": digest(quantized.model.params),
        "ranges": digest(quantized.qparams),
        "images": digest(images),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }


def finished(work: UnitAtWork, method: Method, key: Key[Array, ""], place: Place) -> Finished:
    """A unit after learning, from its file if it was done before."""
    file = None if place.folder is None else place.folder.with_suffix(".npz")
    found = None if file is None else load_unit(file, work.model, work.qparams)
    if found is None:
        found = learned(work, method, key, place)
        if file is not None:
            save_unit(file, found)
    place.remove()  # states on the way here
    return found


def learned(work: UnitAtWork, method: Method, key: Key[Array, ""], place: Place) -> Finished:
    """A unit after learning: where it learned from, or as it came, if that is better.

    What judges is the method's loss, with the slopes it weighs errors by, on inputs and targets as
    they are: corrected ones only serve to learn from, and so does the prediction of PD-Quant.
    """
    start, unit = time.monotonic(), work.unit
    loss = relative_gap if isinstance(method, ClosedForm) else method.loss
    ready = prepared(work, method, key)
    judged = work._replace(slopes=ready.slopes)
    before = error_of(judged, work.model, work.qparams, loss)
    tried = [
        (error_of(judged, attempt.model, attempt.qparams, loss), attempt)
        for attempt in attempts(ready, method, key, place)
    ]
    after, attempt = min(tried, key=lambda found: found[0])
    kept = after <= before
    spent, notes = time.monotonic() - start, sum((a.notes for _, a in tried), ())
    report = UnitReport(unit.title, method.name, before, after, kept, spent, notes)
    model, qparams = attempt[:2] if kept else (work.model, work.qparams)
    return Finished(model, qparams, report)


def prepared(work: UnitAtWork, method: Method, key: Key[Array, ""]) -> UnitAtWork:
    """A unit with what a method wants to know of its inputs and outputs."""
    if isinstance(method, ClosedForm):
        return work
    if method.correction is not None:
        exact = corrected_inputs(work.reference, work.exact, method.correction, key)
        work = work._replace(exact=exact, targets=passed(work.reference, None, None, exact))
    if method.fisher and work.beyond is not None:
        outputs = passed(work.model, work.qparams, work.unit.plan, work.rough)
        work = work._replace(slopes=slopes_of(work.beyond, outputs))
    return work


def attempts(
    work: UnitAtWork, method: Method, key: Key[Array, ""], place: Place
) -> Iterator[Learned]:
    """A unit as a method would have it, after what it would learn from."""
    closed = closed_form_of(method, work.targets.shape)
    if closed is not None:
        solution = in_closed_form(work, closed)
        yield solution
        work = work._replace(model=solution.model, qparams=solution.qparams)
    if isinstance(method, ClosedForm):
        return
    kernels = {site.node for site, _ in work.unit.plan.entries if site.argument is None}
    bytes_alone = all(spec.levels.bits == 8 for _, spec in work.unit.plan.entries)
    if (method.spare and bytes_alone) or (work.still and kernels <= work.still):
        yield Learned(work.model, work.qparams)
        return
    learn = learned_by_layers if method.layers else in_phases
    yield learn(work, method, key, place)


def in_closed_form(work: UnitAtWork, method: ClosedForm) -> Learned:
    """A unit whose layers are solved one after the other, block by block.

    What blocks read is kept, as that of units is; what layers read is made again for each.
    """
    seen = method.images(len(work.exact), positions(work.targets.shape))
    few = len(seen) < len(work.exact)
    exact, rough = (work.exact[seen], work.rough[seen]) if few else (work.exact, work.rough)
    whole = QuantizedModel(work.model, work.unit.plan, work.qparams)
    layers, done = len(layers_of(work.unit)), 0
    for block in units_of(work.model.graph, work.unit.plan):
        part = work._replace(unit=block, reference=unit_model(block, work.reference))
        part = part._replace(exact=exact, rough=rough, model=unit_model(block, whole.model))
        part = part._replace(qparams=unit_qparams(block, whole.affines))
        part = part._replace(on_layer=partial(later, work.on_layer, done, layers))
        model, qparams, _ = block_in_closed_form(part, method)
        done += len(layers_of(block))
        whole = with_unit(whole, block, model, qparams)
        exact = passed(part.reference, None, None, exact)
        rough = passed(model, qparams, block.plan, rough)
    return Learned(whole.model, whole.affines)


def block_in_closed_form(work: UnitAtWork, method: ClosedForm) -> Learned:
    """A block whose layers are solved, each behind those before it."""

    def solve(layer: Unit, whole: QuantizedModel, number: int):
        name = layer.block.names[0]
        rough = flow(whole.model, whole.affines, whole.plan, work.rough, name)
        exact = flow(work.reference, None, None, work.exact, name)
        model, qparams = unit_model(layer, whole.model), unit_qparams(layer, whole.affines)
        flows = zip(rough, exact, strict=True)
        found = Learned(*solved(model, qparams, layer.plan, flows, method))
        work.on_layer(number + 1, 0)
        return found

    return layer_by_layer(work, solve)


def later(tell: OnLayer, done: int, layers: int, number: int, _: int) -> None:
    """Tells of a layer of a block behind so many of earlier ones."""
    tell(done + number, layers)


def learned_by_layers(
    work: UnitAtWork, method: Reconstruction, key: Key[Array, ""], place: Place
) -> Learned:
    """A unit whose layers learn one after the other."""
    layers = len(layers_of(work.unit))

    def learn(layer: Unit, whole: QuantizedModel, number: int):
        name = layer.block.names[0]
        exact = passed(work.reference, None, None, work.exact, name)
        rough = passed(whole.model, whole.affines, whole.plan, work.rough, name)
        float_layer = unit_model(layer, work.reference)
        targets = passed(float_layer, None, None, exact)
        model, qparams = unit_model(layer, whole.model), unit_qparams(layer, whole.affines)
        part = UnitAtWork(layer, float_layer, model, qparams, exact, rough, targets, work.memory)
        part = part._replace(on_step=partial(in_layer, work.on_step, number, layers))
        part = part._replace(still=frozenset(layer.names[n] for n in work.still & set(layer.names)))
        return in_phases(part, method, jax.random.fold_in(key, number), place / f"layer-{number}")

    return layer_by_layer(work, learn)


def in_layer(tell: OnStep, number: int, layers: int, step: int, steps: int, parts: Metrics) -> None:
    """Tells of a step of one of the layers of a unit, each of which takes as many."""
    tell(number * steps + step, layers * steps, parts)


def layer_by_layer(
    work: UnitAtWork,
    treat: Callable[[Unit, QuantizedModel, int], Learned],
) -> Learned:
    """A unit whose layers are treated one after the other, each behind those that are done.

    Args:
      work: the unit.
      treat: (layer, the unit so far, number of the layer) -> the layer.
    """
    whole, notes = QuantizedModel(work.model, work.unit.plan, work.qparams), ()
    for number, layer in enumerate(layers_of(work.unit)):
        found = treat(layer, whole, number)
        whole = with_unit(whole, layer, found.model, found.qparams)
        notes += tuple(f"{layer.title}: {note}" for note in found.notes)
    return Learned(whole.model, whole.affines, notes)
