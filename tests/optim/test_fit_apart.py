"""Several runs at the same time, one a device: each is what it would be alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.base.parallel import data_mesh, everywhere, stack
from dfq_jax.optim.fit import Apart, RunStart, fit, fit_apart
from dfq_jax.optim.state import StateStore
from dfq_jax.optim.steps import descent
from dfq_jax.values import bound

KEY = jax.random.key(0)
START = {"a": jnp.array([3.0, -2.0]), "b": jnp.array(1.0)}
CENTRE = jnp.array([1.0, 1.0])
ADAM = bound(optax.adam, 0.1)
SGD = bound(optax.sgd, 1.0)


def crash_at(where, error):
    def on_chunk(step, metrics):
        if step == where:
            raise error

    return on_chunk


LANES = 8
KEPT = 3
"""How many runs save their states: every state takes some time to write."""


class Setting(NamedTuple):
    """What an objective is told: something of its own, something all runs share."""

    centre: Any
    scale: Any


def scattered(x, context, now):
    """A quadratic around a centre of its own, with noise and a memory of what it weighed."""
    weight = 1 + 0.5 * jax.random.uniform(now.key)
    near = jnp.sum((x["a"] - context.centre) ** 2)
    memory = 0.5 * now.memory + jax.lax.stop_gradient(weight)
    loss = context.scale * (weight * near + x["b"] ** 2)
    return loss, ({"near": near, "weight": weight}, memory)


class Lanes(NamedTuple):
    """All runs: where each begins, and what differs between them."""

    x: list[Any]
    centres: list[Any]
    keys: list[Any]
    memory: list[Any]


LINES = Lanes(
    x=[jax.tree.map(lambda v, i=i: v + i, START) for i in range(LANES)],
    centres=[CENTRE * i for i in range(LANES)],
    keys=[jax.random.fold_in(KEY, i) for i in range(LANES)],
    memory=[jnp.float32(i) for i in range(LANES)],
)


def apart(objective: Any = scattered, steps: int = 12, scale: float = 2.0, **how: Any):
    """As many runs as stores, if there are any, else one for each device."""
    kept = how.pop("stores", [None] * LANES)
    lanes, mesh = len(kept), data_mesh(len(kept))
    x, memory = how.pop("x", LINES.x)[:lanes], how.pop("memory", LINES.memory)
    runs = [RunStart(*each) for each in zip(x, LINES.keys, memory, kept, strict=False)]
    step = descent(objective, how.pop("optimizer", ADAM))
    context = Setting(stack(LINES.centres[:lanes], mesh), everywhere(jnp.float32(scale), mesh))
    return fit_apart(step, runs, context, Apart(mesh, Setting(True, False)), steps=steps, **how)


def alone(lane: int, objective: Any = scattered, steps: int = 12, **how: Any):
    context = Setting(LINES.centres[lane], jnp.float32(2.0))
    how = {"optimizer": ADAM, "key": LINES.keys[lane], "memory": LINES.memory[lane]} | how
    step = descent(objective, how.pop("optimizer"))
    return fit(step, LINES.x[lane], context, steps=steps, **how)


def same_result(a, b):
    for p, q in zip(
        jax.tree.leaves((a.x, a.memory)), jax.tree.leaves((b.x, b.memory)), strict=True
    ):
        np.testing.assert_array_equal(p, q)
        assert p.sharding == q.sharding
    assert (a.status, a.steps, a.loss) == (b.status, b.steps, b.loss)


def test_runs_apart_are_runs_alone_bit_for_bit():
    visits = []
    found = apart(chunk=5, on_chunk=lambda step, parts: visits.append((step, parts)))
    assert [step for step, _ in visits] == [4, 8, 12]
    for lane, many in enumerate(found):
        one = alone(lane, chunk=4)
        same_result(many, one)
        for name, values in one.history.items():
            np.testing.assert_array_equal(many.history[name], values)
    for step, parts in visits:
        assert set(parts) == {"loss", "near", "weight"}
        mean = np.mean([r.history["loss"][step - 1] for r in found])
        assert parts["loss"] == pytest.approx(mean, rel=1e-6)
    assert len({r.loss for r in found}) == LANES


def compilations(caplog, name, call):
    """How many programs of this name a call compiles; and what it returns."""
    caplog.clear()
    with jax.log_compiles():
        found = call()
    wanted = f"Finished XLA compilation of jit({name})"
    return sum(wanted in record.getMessage() for record in caplog.records), found


def test_runs_apart_share_one_program(caplog):
    traces = []

    def counted(x, context, now):
        traces.append(1)
        return scattered(x, context, now)

    first, _ = compilations(caplog, "run_chunks", lambda: apart(counted, steps=4, chunk=4))
    seen = len(traces)
    call = lambda: apart(counted, steps=12, chunk=4, scale=3.0)
    again, _ = compilations(caplog, "run_chunks", call)
    assert (first, again) == (1, 0)  # neither a device, nor a chunk, nor a run later
    assert len(traces) == seen


def up_to(x, context, now):
    """Goes up by one a step of `sgd(1.0)`, counting; NaN beyond a limit of its own."""
    limit = context.centre[0] + 0.9
    return jnp.where(x > limit, jnp.nan, -x), ({}, now.memory + 1)


FROM_ZERO = {"x": [jnp.array(0.0)] * LANES, "memory": [jnp.zeros(())] * LANES, "optimizer": SGD}


def test_a_run_that_diverges_stands_still_while_others_go_on():
    """Limits 0.9 to 7.9: run i fails at step i + 1, and the last ones get through six steps."""
    found = apart(up_to, steps=6, chunk=6, **FROM_ZERO)
    for lane, run in enumerate(found):
        if lane < 5:
            assert (run.status, run.steps) == ("diverged", lane + 1)
            assert (float(run.x), float(run.memory)) == (lane + 1, lane + 1)
            assert np.isnan(run.history["loss"][lane + 1 :]).all()
            np.testing.assert_array_equal(
                run.history["loss"][: lane + 1], -np.arange(lane + 1.0, dtype=np.float32)
            )
        else:
            assert (run.status, run.steps, float(run.x)) == ("finished", 6, 6)
            assert run.history["loss"].tolist() == [-v for v in range(6)]
    seen = []
    how = {"chunk": 1, "on_chunk": lambda step, parts: seen.append(step)}
    found = apart(up_to, steps=40, **FROM_ZERO, **how)
    assert {r.status for r in found} == {"diverged"}
    assert seen[-1] == 9  # over once the last one has failed


def test_others_keep_their_bits_beside_a_run_that_diverges():
    """The first begins beyond all numbers; the others are as they are without it."""
    wild = [jax.tree.map(lambda v: v * jnp.inf, START), *LINES.x[1:]]
    found = apart(chunk=4, x=wild)
    assert (found[0].status, found[0].steps) == ("diverged", 0)
    for lane in range(1, LANES):
        same_result(found[lane], alone(lane, chunk=4))


def test_divergence_is_remembered_by_what_is_saved(tmp_path):
    """Stopped after two of the runs have failed; resumed, they have not forgotten."""
    how = {"steps": 5, "chunk": 1, **FROM_ZERO}
    kept, stop = stores(tmp_path, 1e9), crash_at(2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        apart(up_to, stores=kept, on_chunk=stop, **how)
    whole, again = apart(up_to, **how), apart(up_to, stores=stores(tmp_path, 1e9), **how)
    for one, two in zip(whole, again, strict=False):
        assert (one.status, one.steps, one.x) == (two.status, two.steps, two.x)
        assert two.history["loss"].shape == (2,)  # the third fails as well, and all is over
    assert [r.steps for r in again] == [1, 2, 3]


def stores(tmp_path, every=0.0):
    return [StateStore(tmp_path / str(i), {}, every) for i in range(KEPT)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_runs_apart_resume_bit_for_bit_together_or_alone(tmp_path, error):
    """What is saved at an interrupt, or was at the chunk before a power cut."""
    every = 1e9 if error is KeyboardInterrupt else 0.0
    with pytest.raises(error):
        apart(chunk=4, stores=stores(tmp_path, every), on_chunk=crash_at(8, error("stop")))
    assert [store.steps() for store in stores(tmp_path)] == [[8]] * KEPT
    one = alone(1, chunk=4, store=StateStore(tmp_path / "1", {}))
    assert one.history["loss"].shape == (4,)
    same_result(one, alone(1, chunk=4))
    again = apart(chunk=4, stores=stores(tmp_path))
    for lane, run in enumerate(again):
        assert run.history["loss"].shape == (4,)
        same_result(run, alone(lane, chunk=4))


def test_runs_apart_go_on_from_what_fit_has_saved(tmp_path):
    for lane, store in enumerate(stores(tmp_path)):
        with pytest.raises(KeyboardInterrupt):
            alone(lane, chunk=4, store=store, on_chunk=crash_at(8, KeyboardInterrupt()))
    again = apart(chunk=4, stores=stores(tmp_path))
    for lane, run in enumerate(again):
        assert run.history["loss"].shape == (4,)
        same_result(run, alone(lane, chunk=4))


def test_all_runs_are_saved_when_one_is_due(tmp_path):
    """So that they are found at the same step."""
    mixed = stores(tmp_path, 1e9)
    mixed[1] = StateStore(tmp_path / "1", {}, 0.0)
    with pytest.raises(RuntimeError):
        apart(chunk=4, stores=mixed, on_chunk=crash_at(8, RuntimeError("power cut")))
    assert [store.steps() for store in stores(tmp_path)] == [[8]] * KEPT
    late = stores(tmp_path / "late", 1e9)
    with pytest.raises(RuntimeError):
        apart(chunk=4, stores=late, on_chunk=crash_at(8, RuntimeError("power cut")))
    assert [store.steps() for store in stores(tmp_path / "late")] == [[]] * KEPT


def test_runs_found_at_different_steps_begin_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        alone(1, chunk=4, store=stores(tmp_path)[1], on_chunk=crash_at(4, KeyboardInterrupt()))
    kept = [*stores(tmp_path)[:2], None]
    found = apart(chunk=4, stores=kept)
    for lane, run in enumerate(found):
        assert run.history["loss"].shape == (12,)
        same_result(run, alone(lane, chunk=4))
    assert [store.steps() for store in stores(tmp_path)] == [[12], [12], []]


def test_runs_apart_need_a_device_each():
    with pytest.raises(ValueError, match=r"fit_apart\(\) got 2 runs for 8 devices"):
        apart(x=LINES.x[:2])
    with pytest.raises(ValueError, match=r"needs steps and chunk >= 1, got 0 and 10"):
        apart(steps=0)
