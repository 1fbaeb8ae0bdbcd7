"""Runs whose memory is limited, or runs out."""

import jax
import numpy as np
import pytest
from jax.core import Tracer

from dfq_jax.base.parallel import HERE, Machine
from dfq_jax.errors import ResourceError
from dfq_jax.optim import fit as fitting
from dfq_jax.optim.fit import run_chunk, run_chunks
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.state import Place
from dfq_jax.recipes.best import best
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.synthesis.run import objectives as batches
from dfq_jax.synthesis.run.engine import measured, synthesize_images
from dfq_jax.synthesis.run.memory import (
    in_units,
    needed,
)
from dfq_jax.synthesis.terms.targets import PLAIN

KEY = jax.random.key(5)


def foretold(model, work):
    return needed(model, work.at_a_time, PLAIN, "cpu")


@pytest.fixture(scope="module")
def net(nets):
    return nets.stem()


@pytest.fixture(scope="module")
def whole(net):
    """Eight images of `stem` in batches of four, in one part each."""
    return synthesize_images(net, zeroq(steps=6, batch=4), 8, KEY, chunk=2)


def alike(found, whole):
    """Equal but for rounding, which a step may enlarge."""
    np.testing.assert_allclose(found.images, whole.images, atol=2e-4)
    np.testing.assert_allclose(found.losses, whole.losses, rtol=1e-4)


def test_a_limit_splits_batches(net, whole):
    said, recipe = [], zeroq(steps=6, batch=4)
    need = foretold(net, measured(net, recipe, 4))
    limit = need.total(2)
    machine = Machine(memory=limit)
    found = synthesize_images(
        net, recipe, 8, KEY, chunk=2, machine=machine, watch=Watcher(said.append)
    )
    alike(found, whole)
    assert found.notes == ()
    assert limit < need.total(1)
    assert said == [f"a step takes about {in_units(limit)}, batches of 4 in 2 parts"]
    with pytest.raises(ResourceError, match="a batch of 4 images needs about"):
        synthesize_images(net, recipe, 8, KEY, machine=Machine(memory=need.total(4) - 1))


def test_without_a_limit_nothing_is_split(net, whole):
    said = []
    found = synthesize_images(
        *(net, zeroq(steps=6, batch=4), 8, KEY), chunk=2, watch=Watcher(said.append)
    )
    np.testing.assert_array_equal(found.images, whole.images)
    assert len(said) == 1
    assert said[0].endswith(", batches of 4")


def test_devices_of_a_cpu_share_its_memory(net, whole):
    said, recipe = [], zeroq(steps=6, batch=4)
    limit = 2 * foretold(net, measured(net, recipe, 4)).total(2)
    given = (net, recipe, 8, KEY)
    how = {"chunk": 2, "watch": Watcher(said.append)}
    alike(synthesize_images(*given, **how, machine=Machine(2, memory=limit)), whole)
    assert said == [f"a step takes about {in_units(limit)}, batches of 4 in 2 parts"]
    alike(synthesize_images(*given, **how, machine=Machine(2, together=True, memory=limit)), whole)


def test_parts_give_the_statistics_of_the_whole(net):
    """Batch statistics too, and gradients: only the order of summation differs."""
    recipe, machines = best(steps=4, batch=4), (HERE, Machine(parts=2))
    one, split = (synthesize_images(net, recipe, 4, KEY, chunk=4, machine=m) for m in machines)
    alike(split, one)


# memory that runs out


@pytest.fixture
def scarce(monkeypatch):
    """Chunks fail in less than `enough` parts, from step `since` on; notes the failures."""
    parts, failures, made = {}, [], batches.StagePlan.step

    def recorded(plan, count, attempt=0):
        step = made(plan, count, attempt)
        parts[step] = count
        return step

    def limited(real, enough, since, error):
        def run(state, context, key, step, *rest):
            traced = isinstance(state.step, Tracer)  # by another program
            if not traced and parts[step] < enough and int(np.max(np.asarray(state.step))) >= since:
                failures.append(parts[step])
                raise error
            return real(state, context, key, step, *rest)

        return run

    def apply(enough, since=0, error=None):
        error = error or jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        for name, real in (("run_chunk", run_chunk), ("run_chunks", run_chunks)):
            monkeypatch.setattr(fitting, name, limited(real, enough, since, error))
        return failures

    monkeypatch.setattr(batches.StagePlan, "step", recorded)
    return apply


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_goes_on_in_more_parts_when_memory_runs_out(devices, net, whole, scarce):
    """From the last finished chunk, and in as many parts for all that follows."""
    failures, seen = scarce(4, since=2), []
    found = synthesize_images(
        *(net, zeroq(steps=6, batch=4), 8, KEY),
        **{"chunk": 2, "machine": Machine(devices), "watch": Watcher(progress=seen.append)},
    )
    alike(found, whole)
    assert failures == [1, 2]
    assert [(p.batch, p.step) for p in seen] == [
        (b, s) for b in range(2 // devices) for s in (2, 4, 6)
    ]
    told = "did not fit into memory: done in 4 parts"
    assert found.notes == tuple(f"batch {b} {told}" for b in range(devices))


def test_memory_of_the_host_counts_too(net, whole, scarce):
    failures = scarce(2, error=MemoryError())
    alike(synthesize_images(net, zeroq(steps=6, batch=4), 8, KEY, chunk=2), whole)
    assert failures == [1]


def test_the_note_survives_a_kill(net, whole, scarce, tmp_path):
    def stop(p):
        if (p.batch, p.step) == (1, 2):
            raise KeyboardInterrupt

    scarce(2)
    given = (net, zeroq(steps=6, batch=4), 8, KEY)
    how = {"chunk": 2, "place": Place(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        synthesize_images(*given, **how, watch=Watcher(progress=stop))
    limit = Machine(memory=2**40)
    found = synthesize_images(*given, **how, machine=limit)  # other limits resume as well
    alike(found, whole)
    assert found.notes[0] == "batch 0 did not fit into memory: done in 2 parts"


def test_when_one_image_is_too_much(net, scarce):
    failures = scarce(100)
    with pytest.raises(ResourceError, match=r"zeroq: out of memory, though .* one at a time"):
        synthesize_images(net, zeroq(steps=6, batch=6), 6, KEY)
    assert failures == [1, 2, 6]  # divisors, each at least twice the last


def test_other_failures_are_not_hidden(net, scarce):
    failures = scarce(4, error=jax.errors.JaxRuntimeError("INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        synthesize_images(net, zeroq(steps=6, batch=4), 4, KEY)
    assert failures == [1]
