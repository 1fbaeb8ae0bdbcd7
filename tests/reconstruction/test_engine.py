"""The engine of block reconstruction."""

import dataclasses
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.base.files import this_process
from dfq_jax.errors import PlanError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.ops import Relu
from dfq_jax.numerics.affine import fake_quantize
from dfq_jax.numerics.rounding import adaround, nearest, rescaled
from dfq_jax.numerics.softmax import divergence
from dfq_jax.optim import state
from dfq_jax.optim.chunk_data import Fed
from dfq_jax.optim.fit import run_chunk
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.state import Place, StateStore
from dfq_jax.optim.steps import Now
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Plan, Rule, Scheme, resolve
from dfq_jax.quantization.simulate import simulate
from dfq_jax.reconstruction import engine as engine
from dfq_jax.reconstruction import phases
from dfq_jax.reconstruction.batches import Rows
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.corrected_inputs import corrected_inputs, statistics_gap
from dfq_jax.reconstruction.engine import reconstruct
from dfq_jax.reconstruction.footprint import by_layers, step_bytes, values_of
from dfq_jax.reconstruction.method import (
    Correction,
    Penalty,
    Phase,
    Prediction,
    Rates,
    Reconstruction,
    relative_gap,
    squared_gap,
)
from dfq_jax.reconstruction.objective import UnitContext, objective_of
from dfq_jax.reconstruction.unit_at_work import Beyond, passed, slopes_of
from dfq_jax.reconstruction.units import Unit, layers_of, rest_of, unit_model, units_of
from dfq_jax.types import InputContract
from dfq_jax.values import bound

KEY = jax.random.key(7)
QUICK = Reconstruction(
    "quick",
    adaround(scale=True),
    (Phase(60),),
    rates=Rates(bits=3e-2, scale=1e-3, edges=1e-3),
    penalty=Penalty(0.01),
    loss=relative_gap,
    batch=8,
)


@pytest.fixture(scope="module")
def reference(nets):
    return fold_batch_norm(nets.tiny())


@pytest.fixture(scope="module")
def images(reference, nets):
    return np.asarray(nets.images(reference, 24))


@pytest.fixture(scope="module")
def quantized(reference, images):
    plan = resolve(reference.graph, Scheme(2, 8))
    return calibrate(reference, plan, jnp.asarray(images))


@pytest.fixture(scope="module")
def learned(quantized, reference, images):
    return reconstruct(quantized, reference, images, QUICK, KEY)


def same(first, second):
    """Whether all parameters and scales of two networks are equal, bit for bit."""
    pairs = zip(
        *(jax.tree.leaves((q.model.params, q.qparams)) for q in (first, second)), strict=True
    )
    return all(np.array_equal(a, b) for a, b in pairs)


def error(quantized, reference, x):
    """Squared error of the output, relative."""
    wanted = np.asarray(evaluate(reference, jnp.asarray(x))[0][0])
    found = np.asarray(jax.jit(simulate)(quantized, jnp.asarray(x)))
    return np.sum((found - wanted) ** 2) / np.sum(wanted**2)


def test_a_network_gets_better_on_images_it_has_not_seen(learned, quantized, reference, nets):
    found, reports = learned
    assert [r.name for r in reports] == ["conv1", "depthwise +1", "conv2", "fc"]
    assert all(r.after <= r.before for r in reports if r.kept)
    assert sum(r.kept for r in reports) >= 3
    fresh = nets.images(reference, 32, seed=5)
    assert error(found, reference, fresh) < 0.8 * error(quantized, reference, fresh)


def test_kernels_that_were_learned_lie_on_their_grids(learned):
    found, reports = learned
    units = units_of(found.model.graph, found.plan)
    kept = {r.name for r in reports if r.kept}
    inside = {name for unit in units if unit.title in kept for name in unit.block.names}
    assert len(inside) > 4
    for site, spec in found.plan.entries:
        if site.argument is None and site.node in inside:
            kernel = found.model.params[site.node]["kernel"]
            snapped = fake_quantize(kernel, found.qparams[site], spec.grid)
            np.testing.assert_allclose(snapped, kernel, atol=1e-6)


def test_sites_of_a_tensor_still_share_its_grid(learned):
    found, _ = learned
    moved = 0
    for _, sites in found.plan.groups:
        scales = {float(found.qparams[site].scale) for site in sites}
        assert len(scales) == 1
        moved += len(sites)
    assert moved


def test_the_same_key_gives_the_same_bits(learned, quantized, reference, images):
    """Whether anybody is told how far the steps of a unit are or not."""
    told = []
    again, reports = reconstruct(
        quantized, reference, images, QUICK, KEY, watch=Watcher(progress=told.append)
    )
    assert same(again, learned[0])
    ends = [at for at in told if at.step == at.steps]
    assert [at.batch for at in ends] == list(range(len(reports)))
    assert {(at.batches, at.steps, at.what) for at in told} == {(len(reports), 60, "learning")}
    assert len(told) > len(ends)
    assert set(told[0].parts) == {"loss", "reconstruction", "undecided"}
    other, _ = reconstruct(quantized, reference, images, QUICK, jax.random.key(8))
    assert not same(other, learned[0])


def test_steps_of_all_phases_and_layers_of_a_unit_are_counted(
    quantized, reference, images, monkeypatch
):
    def phase_of(work, method, phase, key, store, on_chunk):
        on_chunk(phase.steps, {})
        return phases.Learned(work.model, work.qparams)

    monkeypatch.setattr(phases, "phase_of", phase_of)
    told, wanted = [], []
    method = QUICK._replace(phases=(Phase(6), Phase(4)), layers=True)
    reconstruct(quantized, reference, images, method, KEY, watch=Watcher(progress=told.append))
    for number, unit in enumerate(units_of(reference.graph, quantized.plan)):
        layers = len(layers_of(unit))
        steps = [10 * layer + done for layer in range(layers) for done in (6, 10)]
        wanted += [(number, step, 10 * layers) for step in steps]
    assert [(at.batch, at.step, at.steps) for at in told] == wanted
    assert {at.steps for at in told} == {10, 20}


def test_little_memory_feeds_fewer_steps_and_changes_nothing(
    learned, quantized, reference, images, monkeypatch
):
    monkeypatch.setattr(engine, "FED", 12 * 8 * images[0].nbytes)
    found, _ = reconstruct(quantized, reference, images, QUICK, KEY)
    assert same(found, learned[0])


def test_units_too_large_for_memory_learn_layer_by_layer(quantized, reference, images, tmp_path):
    """Said in their reports; those with one layer, and those that fit, learn as a whole."""
    values = values_of(reference)
    units = units_of(reference.graph, quantized.plan)
    steps = [step_bytes(unit, values, QUICK) for unit in units]
    memory = sorted(steps)[-1] - 1
    run = lambda **k: reconstruct(
        quantized, reference, images, QUICK, KEY, place=Place(tmp_path), **k
    )
    _, reports = run(memory=memory)
    with pytest.raises(UsageError, match="units layer by layer: saved"):
        run()
    split = by_layers(units, reference, QUICK, memory)
    several = [steps[i] > memory and len(layers_of(u)) > 1 for i, u in enumerate(units)]
    assert split == {i for i, both in enumerate(several) if both}
    assert len(split) == 1
    names = [r.method for r in reports]
    assert [name.endswith(", layer by layer") for name in names] == several
    assert names.count(QUICK.name) == len(names) - 1
    assert all(r.after <= r.before for r in reports if r.kept)
    assert not by_layers(units, reference, QUICK, max(steps))


def test_grids_of_eight_bits_stay_as_calibrated(reference, images):
    """The image's above all: images that use half of its range must not have others clipped."""
    plan = resolve(reference.graph, Scheme(3, 4))
    calibrated = calibrate(reference, plan, jnp.asarray(images))
    found, reports = reconstruct(calibrated, reference, images / 2, QUICK, KEY)
    changed = lambda site: found.affines[site].scale != calibrated.affines[site].scale
    edges = {s: spec.grid.bits for s, spec in plan.entries if s.argument is not None}
    assert not any(changed(site) for site, bits in edges.items() if bits == 8)
    assert any(changed(site) for site, bits in edges.items() if bits == 4)
    assert any(r.kept for r in reports)


def test_a_phase_without_anything_to_learn_takes_no_step(quantized, reference, images, monkeypatch):
    monkeypatch.setattr(phases, "fit", None)
    idle = QUICK._replace(phases=(Phase(5, kernels=False),))
    found, _ = reconstruct(quantized, reference, images, idle, KEY)
    jax.tree.map(np.testing.assert_array_equal, found.qparams, quantized.qparams)


def test_a_unit_that_gets_worse_stays_as_it_was(quantized, reference, images):
    wild = QUICK._replace(rates=Rates(bits=1e3, scale=10.0, edges=10.0), phases=(Phase(6),))
    found, reports = reconstruct(quantized, reference, images, wild, KEY)
    assert not all(r.kept for r in reports)
    assert error(found, reference, images) <= 1.5 * error(quantized, reference, images)
    untouched = [r.name.split()[0] for r in reports if not r.kept]
    for name in untouched:
        old = quantized.model.params[name]["kernel"]
        np.testing.assert_array_equal(found.model.params[name]["kernel"], old)


def test_a_unit_that_learning_makes_worse_stays_as_it_was_solved(quantized, reference, images):
    """No step is as good as none; what the closed form gained is not lost with it."""
    solution = ClosedForm(sweeps=1)
    rates = Rates(bits=1e3, scale=10.0, edges=10.0)
    wild = QUICK._replace(
        rates=rates, phases=(Phase(6),), start=solution, loss=relative_gap, merge=0
    )
    found, (report,) = reconstruct(quantized, reference, images, wild, KEY)
    whole = QUICK._replace(rates=Rates(0, 0, 0), phases=(), start=solution, merge=0)
    solved, _ = reconstruct(quantized, reference, images, whole, KEY)
    assert report.kept
    assert report.after < report.before
    jax.tree.map(np.testing.assert_array_equal, found.qparams, solved.qparams)
    jax.tree.map(np.testing.assert_array_equal, found.model.params, solved.model.params)


def test_stopped_anywhere_it_goes_on(learned, quantized, reference, images, tmp_path, monkeypatch):
    """Between units and inside one."""
    calls, fed, real = [], [], phases.fit

    def stopping(*args, **how):
        calls.append(1)
        feed = how["feed"]
        how["feed"] = lambda step, length: fed.append((len(calls), step)) or feed(step, length)
        if len(calls) == 2:

            def stop(step, metrics):
                if step >= 20:
                    raise KeyboardInterrupt

            return real(*args, **{**how, "chunk": 10, "on_chunk": stop})
        return real(*args, **how)

    monkeypatch.setattr(phases, "fit", stopping)
    monkeypatch.setattr(state, "StateStore", lambda *given: StateStore(*given, every_seconds=0.0))
    given: dict[str, Any] = {"place": Place(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        reconstruct(quantized, reference, images, QUICK, KEY, **given)
    assert [p.name for p in sorted(tmp_path.glob("*.npz"))] == ["unit-0.npz"]
    found, reports = reconstruct(quantized, reference, images, QUICK, KEY, **given)
    assert same(found, learned[0])
    assert len(calls) == 2 + 3  # the first unit was there
    begun = {call: min(step for c, step in fed if c == call) for call in range(1, 6)}
    assert begun == {1: 0, 2: 0, 3: 20, 4: 0, 5: 0}
    assert [r._replace(seconds=0) for r in reports] == [r._replace(seconds=0) for r in learned[1]]
    for name, other in (
        ("key", (images, QUICK, jax.random.key(8))),
        ("method", (images, QUICK._replace(batch=7), KEY)),
        ("images", (images + 1, QUICK, KEY)),
    ):
        with pytest.raises(UsageError, match=f"(?s)holds the state of a different run.*{name}: "):
            reconstruct(quantized, reference, *other, **given)
    (tmp_path / "run.lock").write_text(json.dumps(this_process(held=False)))
    with pytest.raises(UsageError, match=str(os.getpid())):
        reconstruct(quantized, reference, images, QUICK, KEY, **given)


def scaled_gap(factor, seen):
    return factor * squared_gap(seen)


class Others:
    """Functions named like those of the package."""

    @staticmethod
    def squared_gap(seen):
        return 2 * relative_gap(seen)


IDLE = Reconstruction("idle", nearest(), (), batch=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"loss": Others.squared_gap},
            "loss: is: saved '.*:squared_gap', now '.*Others.squared_gap'",
        ),
        ({"rounding": rescaled()._replace(name="nearest")}, "rounding: hard: 0: is: saved '.*'"),
        ({"rounding": adaround()._replace(name="nearest")}, "rounding: hard: is: saved '.*'"),
        ({"loss": bound(scaled_gap, 2.0)}, "loss: is: saved '.*', now '.*:scaled_gap'"),
    ],
)
def test_units_learned_in_another_way_of_the_same_name_are_not_taken_over(
    change, message, quantized, reference, images, tmp_path
):
    reconstruct(quantized, reference, images, IDLE, KEY, place=Place(tmp_path))
    with pytest.raises(UsageError, match=message):
        reconstruct(
            quantized, reference, images, IDLE._replace(**change), KEY, place=Place(tmp_path)
        )
    reconstruct(
        quantized, reference, images, IDLE._replace(rounding=nearest()), KEY, place=Place(tmp_path)
    )


def test_a_loss_without_a_name_keeps_nothing_on_disk(quantized, reference, images, tmp_path):
    nameless = IDLE._replace(loss=lambda seen: squared_gap(seen))
    reconstruct(quantized, reference, images, nameless, KEY)
    message = r"^the method\.loss is .*<lambda>, .*values\.bound"
    with pytest.raises(UsageError, match=message):
        reconstruct(quantized, reference, images, nameless, KEY, place=Place(tmp_path))


@pytest.mark.parametrize("times", [1, 4])
def test_a_unit_that_diverges_is_told_and_made_again(
    times, quantized, reference, images, tmp_path, monkeypatch
):
    """At half the rates; after four attempts it is left as it came."""
    factors, real = [], phases.fit

    def failing(step, *given, **how):
        factors.append(step.begin.args[0].args[-1])
        found = real(step, *given, **how)
        return found._replace(status="diverged", steps=3) if len(factors) <= times else found

    monkeypatch.setattr(phases, "fit", failing)
    method = QUICK._replace(phases=(Phase(2),), merge=0)
    found, (report,) = reconstruct(quantized, reference, images, method, KEY, place=Place(tmp_path))
    if times == 1:
        assert factors == [1.0, 0.5]
        told = "diverged at step 3 and was made again at 1/2 of the learning rate"
    else:
        assert factors == [1.0, 0.5, 0.25, 0.125]
        told = "diverged in each of 4 attempts and was left as it was"
        assert same(found, quantized)
    assert report.notes == (told,)
    _, (again,) = reconstruct(quantized, reference, images, method, KEY, place=Place(tmp_path))
    assert again == report
    assert len(factors) == min(times + 1, 4)


def test_a_refused_run_names_the_layers_that_differ(quantized, reference, images, tmp_path):
    reconstruct(quantized, reference, images, IDLE, KEY, place=Place(tmp_path))
    plan = resolve(reference.graph, Scheme(2, 8), rules=[Rule("conv2", weight_bits=4)])
    other = calibrate(reference, plan, jnp.asarray(images))
    with pytest.raises(UsageError, match="\n  bits: conv2 kernel: saved 2, now 4\n") as caught:
        reconstruct(other, reference, images, IDLE, KEY, place=Place(tmp_path))
    assert str(caught.value).count("bits: ") == 1


def test_units_of_equal_structure_compile_once(nets):
    """Of four convolutions three are equal: one program for them, one for the first."""
    b = nets.Builder(InputContract(6, 6), 0)
    x = "images"
    for name in ("first", "second", "third", "fourth"):
        x = b.op(f"{name}.act", Relu(), b.conv(name, x, 4, bias=True))
    model = b.done(x)
    images = np.asarray(nets.images(model, 8))
    plan = resolve(model.graph, Scheme(4, 4), "zsq_all_low")
    ready = calibrate(model, plan, jnp.asarray(images))
    method = QUICK._replace(phases=(Phase(2),), penalty=Penalty(0.02))
    programs: Any = run_chunk
    before = programs._cache_size()
    _, reports = reconstruct(ready, model, images, method, KEY)
    assert len(reports) == 4
    assert programs._cache_size() - before == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_damaged_files_are_made_again(
    learned, quantized, reference, images, tmp_path, monkeypatch, damage
):
    given = (quantized, reference, images, QUICK, KEY)
    reconstruct(*given, place=Place(tmp_path))
    file = tmp_path / "unit-1.npz"
    data = bytearray(file.read_bytes())
    match damage:
        case "cut":
            data = data[: len(data) // 2]
        case "flipped":
            saved = np.load(file)
            largest = max((saved[name] for name in saved.files), key=lambda v: v.nbytes)
            data[bytes(data).find(largest.tobytes())] ^= 1
        case _:
            data = bytearray((tmp_path / "unit-0.npz").read_bytes())
    file.write_bytes(data)
    calls, real = [], phases.fit
    monkeypatch.setattr(phases, "fit", lambda *a, **k: calls.append(1) or real(*a, **k))
    found, _ = reconstruct(*given, place=Place(tmp_path))
    assert same(found, learned[0])
    assert len(calls) == 1


def test_without_images(quantized, reference, images):
    with pytest.raises(PlanError, match="needs at least one image"):
        reconstruct(quantized, reference, images[:0], QUICK, KEY)


def test_nothing_to_learn_changes_nothing(quantized, reference, images):
    """Rounding to nearest with activations' scales fixed."""
    idle = Reconstruction("idle", nearest(), (Phase(2, edges=False),), batch=4)
    found, reports = reconstruct(quantized, reference, images, idle, KEY)
    assert all(r.before == pytest.approx(r.after, rel=1e-5) for r in reports)
    assert error(found, reference, images) == pytest.approx(
        error(quantized, reference, images), rel=1e-4
    )


# methods that look at the prediction of the whole network


def test_slopes_are_the_gradients_of_the_divergence(reference, images):
    """By finite differences, behind the second unit."""
    units = units_of(reference.graph, resolve(reference.graph, Scheme(2, 8)))
    rest = rest_of(reference, units[2:])
    assert rest is not None
    exact = images
    for unit in units[:2]:
        exact = passed(unit_model(unit, reference), None, None, exact)
    logits = passed(reference, None, None, images)
    np.testing.assert_allclose(passed(rest, None, None, exact), logits, atol=1e-4)
    beyond, wanted = Beyond(rest, logits), jnp.asarray(logits)
    assert np.abs(slopes_of(beyond, exact)).max() < 1e-5  # the float prediction itself
    moved = exact + 0.1 * np.asarray(jax.random.normal(KEY, exact.shape))
    found = slopes_of(beyond, moved)
    way = np.asarray(jax.random.normal(jax.random.key(2), exact.shape))
    gap = lambda x: len(x) * float(divergence(wanted, jnp.asarray(passed(rest, None, None, x))))
    slope = (gap(moved + 1e-2 * way) - gap(moved - 1e-2 * way)) / 2e-2
    assert np.sum(found * way) == pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize("rest", [True, False])
def test_the_divergence_is_nothing_where_nothing_is_quantized(reference, images, rest, quantized):
    """PD-Quant card: a unit in float, nothing dropped."""
    units = units_of(reference.graph, quantized.plan)
    at = 1 if rest else len(units) - 1
    unit = Unit(units[at].block, Plan((), (), Scheme(2, 8), "zsq_all_low"))
    exact = images[:8]
    for before in units[:at]:
        exact = passed(unit_model(before, reference), None, None, exact)
    model = unit_model(unit, reference)
    method = QUICK._replace(prediction=Prediction(1.0, 4.0))
    given = UnitContext(model, {}, {}, jnp.float32(1), rest_of(reference, units[at + 1 :]))
    rows = Rows(*(jnp.asarray(v)[None] for v in (exact, exact, passed(model, None, None, exact))))
    rows = rows._replace(logits=jnp.asarray(passed(reference, None, None, images[:8]))[None])
    nothing = {"kernels": {}, "edges": {}, "biases": {}, "borders": {}}
    objective = objective_of(unit.plan, method, Phase(1))
    _, (parts, _) = objective(nothing, Fed(given, jnp.int32(0), rows), Now(KEY, jnp.int32(0)))
    assert float(parts["prediction"]) == pytest.approx(0, abs=1e-6)
    assert float(parts["reconstruction"]) == pytest.approx(0, abs=1e-6)
    worse = rows._replace(rough=rows.rough + 1)
    _, (parts, _) = objective(nothing, Fed(given, jnp.int32(0), worse), Now(KEY, jnp.int32(0)))
    assert float(parts["prediction"]) > 1e-4


def test_corrected_inputs_are_nearer_to_the_moments(reference, images):
    """PD-Quant card: gaps fall; with little weight inputs stay where they are."""
    units = units_of(reference.graph, resolve(reference.graph, Scheme(2, 8)))
    unit = unit_model(units[1], reference)
    assert unit.moments
    inputs = passed(unit_model(units[0], reference), None, None, images[:8])
    gap = lambda x: float(statistics_gap(unit, jnp.asarray(x)))
    free = corrected_inputs(unit, inputs, Correction(1e3, 200, 1e-2), KEY)
    assert gap(free) < 0.7 * gap(inputs)
    tied = corrected_inputs(unit, inputs, Correction(1e-7, 50, 1e-3), KEY)
    assert np.abs(tied - inputs).max() < 5e-3 < np.abs(free - inputs).max()
    bare = dataclasses.replace(unit, moments={})
    np.testing.assert_array_equal(corrected_inputs(bare, inputs, Correction(), KEY), inputs)


def test_the_whole_network_as_one_unit(quantized, reference, images):
    """Its own loss judges it; biases learn too."""
    phase = Phase(80, biases=True, quantized=1.0, rough=0.0)
    rates = Rates(bits=5e-2, scale=1e-3, edges=1e-3, biases=1e-2)
    rounding = adaround(scale=True)
    whole = Reconstruction("whole", rounding, (phase,), rates, loss=relative_gap, merge=0)
    found, (report,) = reconstruct(quantized, reference, images, whole, KEY)
    assert report.kept
    assert report.after < 0.7 * report.before
    old, new = (q.model.params["conv1"]["bias"] for q in (quantized, found))
    assert not np.array_equal(old, new)


def test_what_is_solved_first_is_where_learning_begins(quantized, reference, images):
    """Without a step of any size, the closed form remains."""
    still = QUICK._replace(
        rates=Rates(0.0, 0.0, 0.0), phases=(Phase(2),), start=ClosedForm(sweeps=1)
    )
    found, _ = reconstruct(quantized, reference, images, still, KEY)
    solved, _ = reconstruct(quantized, reference, images, ClosedForm(sweeps=1), KEY)
    x = jnp.asarray(images)
    np.testing.assert_allclose(simulate(found, x), simulate(solved, x), atol=1e-3)


def test_only_units_of_many_positions_are_solved_first(quantized, reference, images):
    """Logits have one position; the units before them have more."""
    still = QUICK._replace(
        rates=Rates(0.0, 0.0, 0.0), phases=(Phase(2),), start=ClosedForm(sweeps=1)
    )
    found = {
        least: reconstruct(quantized, reference, images, still._replace(start_positions=least), KEY)
        for least in (0, 2, 10_000)
    }
    kernel = lambda least, node: np.asarray(found[least][0].model.params[node]["kernel"])
    same = lambda a, b, node: np.array_equal(kernel(a, node), kernel(b, node))
    nodes = [name for name, slots in reference.params.items() if "kernel" in slots]
    first, last = nodes[0], nodes[-1]
    assert same(0, 2, first)
    assert not same(2, 10_000, first)
    assert same(2, 10_000, last)
    assert not same(0, 2, last)
