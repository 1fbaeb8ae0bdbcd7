import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dfq_jax.base.parallel import data_mesh
from dfq_jax.optim import fit as fitting
from dfq_jax.optim.fit import fit, run_chunk, start_state
from dfq_jax.optim.schedules import reduce_on_plateau
from dfq_jax.optim.state import StateStore
from dfq_jax.optim.steps import Now, descent
from dfq_jax.values import bound

KEY = jax.random.key(0)
START = {"a": jnp.array([3.0, -2.0]), "b": jnp.array(1.0)}
CENTRE = jnp.array([1.0, 1.0])


def noisy(x, centre, now):
    """A quadratic whose curvature is drawn anew at every step."""
    weight = 1 + 0.5 * jax.random.uniform(now.key)
    near = jnp.sum((x["a"] - centre) ** 2)
    return weight * near + x["b"] ** 2, ({"near": near, "weight": weight}, ())


def climb(x, context, now):
    """Goes up by one a step of `sgd(1.0)`; NaN beyond `context`."""
    del now
    return jnp.where(x > context, jnp.nan, -x), ({}, ())


def flat(x, context, now):
    """Nothing to improve."""
    del context, now
    return 0.0 * x + 2.0, ({}, ())


ADAM = bound(optax.adam, 0.1)
SGD = bound(optax.sgd, 1.0)


def run(
    objective: Any = noisy,
    x: Any = START,
    context: Any = CENTRE,
    optimizer: Any = ADAM,
    steps: int = 12,
    **how: Any,
):
    return fit(descent(objective, optimizer), x, context, steps=steps, key=KEY, **how)


def test_equals_a_plain_loop():
    found = run(steps=12, chunk=4)
    x: Any = START
    losses, weights = [], []
    rule = ADAM()
    state = rule.init(x)
    for step in range(12):
        key = jax.random.fold_in(KEY, step)
        now = Now(key, jnp.array(step))
        (loss, (parts, _)), grads = jax.value_and_grad(noisy, has_aux=True)(x, CENTRE, now)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = rule.update(grads, state, x)
        x = optax.apply_updates(x, updates)
        losses.append(float(loss))
        weights.append(float(parts["weight"]))
    for name, value in x.items():
        np.testing.assert_allclose(found.x[name], value, rtol=1e-5)
    assert set(found.history) == {"loss", "near", "weight"}
    np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(found.history["weight"], weights, rtol=1e-6)
    assert len(set(weights)) == 12
    assert (found.status, found.steps) == ("finished", 12)
    assert found.loss == pytest.approx(losses[-1], rel=1e-5)
    assert START["a"].tolist() == [3, -2]  # left untouched


def counting(x, context, now):
    """Remembers how often it was asked and what the point was; weighs by the count."""
    count, sum_of_x = now.memory
    loss = (1 + count) * (x - context) ** 2
    return loss, ({"step": now.step}, (count + 1, sum_of_x + jax.lax.stop_gradient(x)))


def test_memory_passes_from_step_to_step(tmp_path):
    memory = (jnp.zeros(()), jnp.zeros(()))
    how = {"x": jnp.array(0.5), "context": 2.0, "memory": memory}
    how |= {"optimizer": bound(optax.sgd, 0.01)}
    found = run(counting, steps=8, chunk=4, **how)
    x, total = 0.5, 0.0
    for count in range(8):
        total += x
        x -= 0.01 * 2 * (1 + count) * (x - 2)
    assert float(found.x) == pytest.approx(x, rel=1e-5)
    assert [float(m) for m in found.memory] == pytest.approx([8, total], rel=1e-5)
    assert found.history["step"].tolist() == list(range(8))
    with pytest.raises(RuntimeError, match="power cut"):
        run(
            counting,
            steps=8,
            chunk=4,
            store=StateStore(tmp_path, {}, 0.0),
            on_chunk=crash_at(4, RuntimeError("power cut")),
            **how,
        )
    resumed = run(counting, steps=8, chunk=4, store=StateStore(tmp_path, {}, 0.0), **how)
    assert (resumed.x, *resumed.memory) == (found.x, *found.memory)


def test_visits_the_host_after_equal_chunks():
    visits = []
    found = run(steps=12, chunk=5, on_chunk=lambda step, m: visits.append((step, dict(m))))
    assert [step for step, _ in visits] == [4, 8, 12]
    for step, metrics in visits:
        assert metrics == {k: pytest.approx(float(v[step - 1])) for k, v in found.history.items()}
        assert all(type(v) is float for v in metrics.values())


def test_chunks_do_not_change_the_result():
    whole, pieces = run(chunk=12), run(chunk=1)
    np.testing.assert_allclose(whole.x["a"], pieces.x["a"], rtol=1e-6)


@pytest.mark.parametrize("steps", [0, -1])
def test_impossible_arguments(steps):
    with pytest.raises(ValueError, match=rf"needs steps and chunk >= 1, got {steps} and 10"):
        run(steps=steps)
    with pytest.raises(ValueError, match=rf"needs steps and chunk >= 1, got 3 and {steps}"):
        run(steps=3, chunk=steps)


@pytest.mark.parametrize("again", [ADAM, bound(optax.adam, 0.1)], ids=["same", "equal"])
def test_second_call_reuses_the_program(again):
    traces = []

    def counted(x, context, now):
        traces.append(1)
        return noisy(x, context, now)

    first = run(counted, steps=4, chunk=4)
    seen = len(traces)
    second = run(counted, context=CENTRE + 1, optimizer=again, steps=12, chunk=4)
    assert len(traces) == seen  # neither between runs nor between chunks
    assert not np.allclose(first.x["a"], second.x["a"])


def test_patience_counts_steps_without_improvement():
    found = run(flat, jnp.array(0.0), (), SGD, steps=20, chunk=1, patience=3)
    assert (found.status, found.steps) == ("stopped early", 4)
    assert found.history["loss"].tolist() == [2] * 4
    patient = run(flat, jnp.array(0.0), (), SGD, steps=20, chunk=1, patience=30)
    assert (patient.status, patient.steps) == ("finished", 20)
    moving = run(climb, jnp.array(1.0), 100.0, SGD, steps=20, chunk=1, patience=1)
    assert moving.status == "finished"


def test_divergence_stops_and_keeps_the_last_finite_point():
    found = run(climb, jnp.array(0.0), 2.5, SGD, steps=12, chunk=6)
    assert (found.status, found.steps) == ("diverged", 3)
    assert float(found.x) == 3
    assert found.history["loss"].shape == (6,)
    assert np.isnan(found.history["loss"][3:]).all()
    assert found.history["loss"][:3].tolist() == [0, -1, -2]


def steep(x, context, now):
    """A finite loss whose slope is NaN at 2."""
    del context, now
    return -x + 0.0 * jnp.sqrt(2.0 - x), ({}, ())


def test_a_slope_that_is_not_finite_is_divergence_too():
    found = run(steep, jnp.array(0.0), (), SGD, steps=8, chunk=4)
    assert (found.status, found.steps) == ("diverged", 2)
    assert float(found.x) == 2


def test_plateau_rules_see_the_loss():
    rule = lambda: optax.chain(optax.sgd(1.0), reduce_on_plateau(factor=0.5, patience=1))
    slope = lambda x, context, now: (jnp.minimum(-x, context) + 1e-9 * x, ({}, ()))
    found = run(slope, jnp.array(0.0), 100.0, rule, steps=4)
    assert float(found.x) == pytest.approx(4)
    still = lambda x, context, now: (x - jax.lax.stop_gradient(x), ({}, ()))
    found = run(still, jnp.array(0.0), (), rule, steps=6)
    # the first loss is the best; then two bad steps, half the rate, two bad steps, a quarter
    assert float(found.x) == pytest.approx(-(1 + 1 + 1 + 0.5 + 0.5 + 0.25))


PLATEAU = lambda: optax.chain(optax.adam(0.3), reduce_on_plateau(factor=0.3, patience=2))


def crash_at(where, error):
    def on_chunk(step, metrics):
        if step == where:
            raise error

    return on_chunk


@pytest.mark.parametrize("optimizer", [ADAM, PLATEAU], ids=["adam", "plateau"])
def test_killed_and_resumed_gives_the_same_bits(optimizer, tmp_path):
    how = {"optimizer": optimizer, "steps": 30, "chunk": 5, "patience": 25}
    whole = run(**how)
    store = StateStore(tmp_path, {}, every_seconds=0.0)
    with pytest.raises(RuntimeError, match="power cut"):
        run(**how, store=store, on_chunk=crash_at(15, RuntimeError("power cut")))
    assert store.steps() == [15]
    resumed = run(**how, store=StateStore(tmp_path, {}, every_seconds=0.0))
    for name in START:
        np.testing.assert_array_equal(resumed.x[name], whole.x[name])
    np.testing.assert_array_equal(resumed.history["loss"], whole.history["loss"][15:])
    assert (resumed.status, resumed.steps, resumed.loss) == ("finished", 30, whole.loss)


def test_patience_survives_a_kill(tmp_path):
    how = {"objective": flat, "x": jnp.array(0.0), "context": (), "optimizer": SGD}
    how |= {"steps": 20, "chunk": 1, "patience": 5}
    on_chunk = crash_at(4, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        run(**how, store=StateStore(tmp_path, {}, 0.0), on_chunk=on_chunk)
    resumed = run(**how, store=StateStore(tmp_path, {}, 0.0))
    assert (resumed.status, resumed.steps) == ("stopped early", 6)
    assert len(resumed.history["loss"]) == 2


def test_interrupt_saves_and_is_passed_on(tmp_path):
    store = StateStore(tmp_path, {}, every_seconds=1e9)
    with pytest.raises(KeyboardInterrupt):
        run(steps=12, chunk=4, store=store, on_chunk=crash_at(8, KeyboardInterrupt()))
    assert store.steps() == [8]
    resumed = run(steps=12, chunk=4, store=StateStore(tmp_path, {}))
    assert resumed.history["loss"].shape == (4,)
    np.testing.assert_array_equal(resumed.x["a"], run(steps=12, chunk=4).x["a"])


def test_a_chunk_takes_the_memory_of_its_state():
    step = descent(noisy, ADAM)
    begun = start_state(START, (), step)
    after, _ = run_chunk(begun, CENTRE, KEY, step, 2)
    assert all(v.is_deleted() for v in jax.tree.leaves(begun))
    assert not any(v.is_deleted() for v in jax.tree.leaves(after))


def test_an_interrupt_within_a_chunk_saves_the_one_before(tmp_path, monkeypatch):
    def consumed(state, *rest):
        found = run_chunk(state, *rest)
        if int(found[0].step) > 4:
            raise KeyboardInterrupt
        return found

    store = StateStore(tmp_path, {}, every_seconds=1e9)
    monkeypatch.setattr(fitting, "run_chunk", consumed)
    with pytest.raises(KeyboardInterrupt):
        run(steps=12, chunk=4, store=store)
    monkeypatch.undo()
    assert store.steps() == [4]
    resumed = run(steps=12, chunk=4, store=StateStore(tmp_path, {}))
    np.testing.assert_array_equal(resumed.x["a"], run(steps=12, chunk=4).x["a"])


def test_a_finished_state_is_a_result(tmp_path):
    whole = run(steps=8, chunk=4, store=StateStore(tmp_path, {}, every_seconds=0.0))
    again = run(steps=8, chunk=4, store=StateStore(tmp_path, {}, every_seconds=0.0))
    assert (again.status, again.steps, again.loss) == ("finished", 8, whole.loss)
    assert dict(again.history) == {}
    np.testing.assert_array_equal(again.x["a"], whole.x["a"])


def test_resuming_with_other_chunks_takes_no_step_too_many(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(
            steps=10,
            chunk=2,
            store=StateStore(tmp_path, {}),
            on_chunk=crash_at(2, KeyboardInterrupt()),
        )
    resumed = run(steps=10, chunk=5, store=StateStore(tmp_path, {}))
    assert resumed.steps == 10
    np.testing.assert_allclose(resumed.x["a"], run(steps=10).x["a"], rtol=1e-6)


def compilations(caplog, name, call):
    """How many programs of this name a call compiles; and what it returns."""
    caplog.clear()
    with jax.log_compiles():
        found = call()
    wanted = f"Finished XLA compilation of jit({name})"
    return sum(wanted in record.getMessage() for record in caplog.records), found


def same_result(a, b):
    for p, q in zip(
        jax.tree.leaves((a.x, a.memory)), jax.tree.leaves((b.x, b.memory)), strict=True
    ):
        np.testing.assert_array_equal(p, q)
        assert p.sharding == q.sharding
    assert (a.status, a.steps, a.loss) == (b.status, b.steps, b.loss)


def whitened(x, weights, now):
    """The products of all rows with each other: a statistic of the whole batch."""
    noise = 0.1 * jax.random.normal(now.key, x.shape)
    mean = jnp.mean(x, 0)
    gram = (x - mean) @ (x - mean).T / x.shape[0]
    loss = jnp.sum((jnp.cov(x.T) - weights) ** 2) + jnp.mean((x + noise) ** 4)
    return loss, ({"gram": jnp.sum(gram**2)}, now.memory + jnp.sum(jax.lax.stop_gradient(gram)))


SCATTER = jax.random.normal(KEY, (8, 3)) * jnp.array([1.0, 2.0, 0.5]) + 1
WHOLE = {"optimizer": ADAM, "steps": 12, "chunk": 4, "memory": jnp.zeros(())}


def over_four(kind):
    """The rows of `SCATTER` over the devices of such a mesh, and the mesh."""
    mesh = Mesh(data_mesh(4).devices, ("data",), axis_types=(kind,))
    return jax.device_put(SCATTER, NamedSharding(mesh, PartitionSpec("data"))), mesh


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_one_batch_over_several_devices_keeps_its_statistics(kind, inside, caplog):
    """Also where the caller works on such a mesh."""
    one = run(whitened, SCATTER, jnp.eye(3), **WHOLE)
    spread, mesh = over_four(kind)

    def fresh(x, context, now):
        return whitened(x, context, now)

    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        weights = jnp.eye(3)
        call = lambda: run(fresh, spread, weights, **WHOLE)
        count, many = compilations(caplog, "run_chunk", call)
    assert count == 1
    assert {shard.data.shape for shard in many.x.addressable_shards} == {(2, 3)}
    np.testing.assert_allclose(many.history["loss"], one.history["loss"], rtol=1e-5)
    np.testing.assert_allclose(many.history["gram"], one.history["gram"], rtol=1e-5)
    np.testing.assert_allclose(many.x, one.x, rtol=1e-5, atol=1e-6)


def test_averaging_over_devices_would_be_another_objective():
    """The mistake that `test_one_batch_over_several_devices_keeps_its_statistics` would find."""
    at = lambda x: float(whitened(x, jnp.eye(3), Now(KEY, jnp.array(0), jnp.zeros(())))[0])
    parts = [at(SCATTER[i : i + 2]) for i in range(0, 8, 2)]
    assert abs(np.mean(parts) / at(SCATTER) - 1) > 0.01


def test_one_batch_over_several_devices_resumes_bit_for_bit(tmp_path):
    spread, _ = over_four(AxisType.Auto)
    many = run(whitened, spread, jnp.eye(3), **WHOLE)
    how = WHOLE | {"store": StateStore(tmp_path, {}), "on_chunk": crash_at(8, KeyboardInterrupt())}
    with pytest.raises(KeyboardInterrupt):
        run(whitened, spread, jnp.eye(3), **how)
    resumed = run(whitened, spread, jnp.eye(3), **WHOLE, store=StateStore(tmp_path, {}))
    assert resumed.history["loss"].shape == (4,)
    same_result(resumed, many)


def fed_square(x, context, now):
    """Pulls towards what this step reads."""
    loss = jnp.sum((x - context.at(now.step)) ** 2) + 0 * jnp.sum(context.context)
    return loss, ({}, ())


def test_data_fed_chunk_by_chunk(tmp_path):
    """Every step reads its own entry, in whatever chunks, and after a stop."""
    data, asked = np.asarray(jax.random.normal(KEY, (12, 3))), []

    def feed(step, length):
        asked.append((step, length))
        return jnp.asarray(data[step : step + length])

    how = {"key": KEY, "feed": feed}
    step = descent(fed_square, bound(optax.sgd, 0.1))
    start = jnp.zeros(3)
    wanted = np.zeros(3)
    for entry in data:
        wanted = wanted - 0.1 * 2 * (wanted - entry)
    found = fit(step, start, jnp.ones(2), steps=12, chunk=4, **how)
    np.testing.assert_allclose(found.x, wanted, rtol=1e-5)
    assert asked == [(0, 4), (4, 4), (8, 4)]

    def stop(step, metrics):
        if step == 4:
            raise KeyboardInterrupt

    store = StateStore(tmp_path, {}, 0.0)
    with pytest.raises(KeyboardInterrupt):
        fit(step, start, jnp.ones(2), steps=12, chunk=4, store=store, on_chunk=stop, **how)
    asked.clear()
    found = fit(step, start, jnp.ones(2), steps=12, chunk=8, store=store, **how)
    np.testing.assert_allclose(found.x, wanted, rtol=1e-5)
    assert asked == [(4, 8)]
