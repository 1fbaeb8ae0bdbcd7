"""Batches on several devices: the same images as on one."""

import contextlib
import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from dfq_jax.base.files import owned
from dfq_jax.base.parallel import Machine, data_mesh
from dfq_jax.errors import DivergedError, UsageError
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.schedules import reduce_on_plateau
from dfq_jax.optim.state import Place
from dfq_jax.recipes.best import best
from dfq_jax.recipes.noise import noise
from dfq_jax.synthesis.recipe import Memory, Recipe, Source, Stage, random_labels
from dfq_jax.synthesis.run.engine import measured, spread_of, synthesize_images
from dfq_jax.synthesis.run.pending import store_of
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Term, label_entropy, natural_correlation
from dfq_jax.synthesis.terms.match import batch_norm_match

KEY = jax.random.key(5)


def plateau(factor):
    return optax.chain(optax.sgd(0.1 * factor), reduce_on_plateau(factor=0.5, patience=1))


def shaken(key, x):
    return x + 0.01 * jax.random.normal(key, x.shape)


def recipe(**changes):
    """Labels, randomness at every step, and terms of single images and of the batch."""
    base = Recipe(
        name="small",
        settings={},
        batch=2,
        source=Source(gaussian),
        stages=(Stage(6, plateau, shaken),),
        terms=(
            Term("bn", 1.0, batch_norm_match),
            Term("apart", 0.1, natural_correlation),
            Term("labels", 1.0, label_entropy),
        ),
        condition=random_labels,
    )
    return base._replace(**changes)


PLAIN = recipe()


@pytest.fixture(scope="module")
def net(nets):
    return nets.stem()


@pytest.fixture(scope="module")
def whole(net):
    """Nine images in batches of two, on one device, never interrupted."""
    return synthesize_images(net, PLAIN, 9, KEY, chunk=2)


def same(a, b):
    np.testing.assert_array_equal(a.images, b.images)
    assert a.losses == b.losses
    assert a.images.sharding == b.images.sharding


@pytest.fixture
def compiled(caplog):
    """How often programs of a name were compiled since."""
    with jax.log_compiles():
        yield lambda name: sum(
            f"Finished XLA compilation of jit({name})" in r.getMessage() for r in caplog.records
        )


@pytest.mark.parametrize("devices", [2, 8])
def test_images_are_those_of_one_device(devices, whole, net, compiled):
    """Five batches: the last round of two is not full; of eight devices, five are used."""
    found = synthesize_images(net, PLAIN, 9, KEY, chunk=2, machine=Machine(devices))
    same(found, whole)
    assert compiled("run_chunks") == 1  # for all devices, chunks and rounds
    assert compiled("run_chunk") == 0
    note = "small used 5 of 8 devices: there are 5 batches of 2 images"
    assert found.notes == ((note,) if devices == 8 else ())
    pairs = itertools.combinations(np.asarray(found.images), 2)
    assert all(np.abs(a - b).max() > 0.1 for a, b in pairs)


def test_every_stage_is_made_apart_and_progress_counts_rounds(net):
    seen = []
    stages = recipe(stages=(Stage(4, plateau), Stage(1, optax.sgd)))
    found = synthesize_images(
        net, stages, 6, KEY, chunk=2, machine=Machine(2), watch=Watcher(progress=seen.append)
    )
    assert [(p.batch, p.batches, p.step, p.steps) for p in seen] == [
        (batch, 2, step, 5) for batch in (0, 1) for step in (2, 4, 5)
    ]
    assert seen[2].parts["loss"] == pytest.approx(np.mean(found.losses[:2]), rel=1e-6)
    same(found, synthesize_images(net, stages, 6, KEY, chunk=2))


UNIT = 0.3
"""What a step of `climber` adds; four of them stay within what pixels can be."""


def climber(limit):
    """Goes up by the learning rate at each of four steps; NaN beyond `limit`, in units.

    The first pixel of a batch is the highest of all.
    """

    def term(o):
        top = jnp.max(o.natural)
        return jnp.where(top > limit * UNIT, jnp.nan, -jnp.sum(o.natural))

    def start(key, shape):
        below = jax.random.uniform(jax.random.key(0), shape).at[0, 0, 0, 0].set(0.0)
        return UNIT * (jax.random.uniform(key) - below)

    stage = Stage(4, lambda factor: optax.sgd(UNIT * factor))
    return recipe(source=Source(start), terms=(Term("climb", 1.0, term),), stages=(stage,))


def starts(batches, key=KEY):
    """Where the batches of `climber` begin."""
    keys = (jax.random.split(jax.random.fold_in(key, i), 3)[0] for i in range(batches))
    return [float(jax.random.uniform(key)) for key in keys]


def test_a_batch_that_diverges_is_made_again_alone(net, compiled):
    highest, second = sorted(starts(4))[::-1][:2]
    assert highest - second > 0.01
    wild = climber(3 + (highest + second) / 2)  # only the highest gets there at the full rate
    seen = []
    how = {"chunk": 1, "watch": Watcher(progress=seen.append)}
    found = synthesize_images(net, wild, 8, KEY, machine=Machine(4), **how)
    assert (compiled("run_chunks"), compiled("run_chunk")) == (1, 1)
    assert [p.step for p in seen] == [1, 2, 3, 4] * 2  # all, and the one again
    ends = [start + (2 if start == highest else 4) for start in starts(4)]
    np.testing.assert_allclose(np.asarray(found.images)[::2, 0, 0, 0] / UNIT, ends, rtol=1e-5)
    one = synthesize_images(net, wild, 8, KEY, chunk=1)
    same(found, one)
    worst = starts(4).index(highest)
    retold = f"batch {worst} diverged at step 3 and was made again at 1/2 of the learning rate"
    assert found.notes == one.notes == (retold,)


def test_divergence_at_every_rate_is_an_error(net):
    message = r"small: the loss became NaN or infinite at step \d in each of 4 attempts, the last"
    with pytest.raises(DivergedError, match=message):
        synthesize_images(net, climber(max(starts(2)) + 0.01), 4, KEY, machine=Machine(2))


def test_idle_devices_may_do_what_they_like(net):
    """They repeat the last batch of the second round, which diverges and is made again."""
    key = jax.random.key(1)
    *others, last = starts(3, key)
    assert last > max(others) + 0.01
    wild = climber(3 + (max(others) + last) / 2)
    found = synthesize_images(net, wild, 6, key, machine=Machine(2))
    same(found, synthesize_images(net, wild, 6, key))
    np.testing.assert_allclose(np.asarray(found.images)[-2, 0, 0, 0] / UNIT, last + 2, rtol=1e-5)


COUNT = Memory(
    start=lambda *_: jnp.zeros(()),
    step=lambda o: o.memory + 1,
)
SUM = Memory(start=lambda *_: jnp.zeros(()), batch=lambda o: o.memory + jnp.sum(o.natural))
FIXED = Memory(start=lambda *_: jnp.ones(()))


def drawn(memory, **changes):
    """Images drawn to what is remembered."""
    term = Term("past", 1.0, lambda o: jnp.mean((o.natural - o.memory) ** 2))
    return recipe(terms=(term,), stages=(Stage(4, plateau),), memory=memory, **changes)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (drawn(COUNT), "each batch goes on from what the one before remembered"),
        (drawn(SUM), "each batch goes on from what the one before remembered"),
        (drawn(FIXED, turns=True), "its batches take turns in one optimisation"),
        (drawn(FIXED), None),
    ],
    ids=["steps", "batches", "turns", "fixed"],
)
def test_batches_that_need_each_other_stay_on_one_device(made, why, net, compiled):
    found = synthesize_images(net, made, 6, KEY, machine=Machine(3))
    assert compiled("run_chunks") == (0 if why else 1)
    assert found.notes == ((f"small used 1 of 3 devices: {why}",) if why else ())
    same(found, synthesize_images(net, made, 6, KEY))


def stop_at(batch, step, error):
    """A progress callback that fails once the run gets there."""

    def on_progress(p):
        if (p.batch, p.step) == (batch, step):
            raise error

    return on_progress


@pytest.mark.parametrize(
    ("before", "after", "first", "reports"),
    [(2, 1, 4, 2 + 2 + 3), (1, 4, 2, 3), (4, 3, 4, 2)],
)
def test_resumes_on_other_devices(before, after, first, reports, whole, net, tmp_path):
    """Interrupted in the second round: finished batches are kept, and states of the others.

    They go on from there, unless a round holds batches that never began.
    """
    how = {"chunk": 2, "place": Place(tmp_path, {"seed": 5})}
    stop = {
        "watch": Watcher(progress=stop_at(1, 2, KeyboardInterrupt())),
        "machine": Machine(before),
    }
    with pytest.raises(KeyboardInterrupt):
        synthesize_images(net, PLAIN, 9, KEY, **how, **stop)
    done = [f"batch_{i}.npz" for i in range(before)]
    begun = [f"batch_{i}" for i in range(before, min(2 * before, 5))]
    assert sorted(os.listdir(tmp_path)) == sorted([*done, *begun, "fingerprint.json"])
    for folder in begun:
        assert (tmp_path / folder / "stage_0" / "step_2").is_dir()
    seen = []
    again = synthesize_images(
        net, PLAIN, 9, KEY, machine=Machine(after), watch=Watcher(progress=seen.append), **how
    )
    same(again, whole)
    assert (seen[0].step, len(seen)) == (first, reports)
    assert seen[-1].batch + 1 == seen[-1].batches


def test_a_finished_run_is_read_back(whole, net, tmp_path):
    how = {"chunk": 2, "place": Place(tmp_path), "machine": Machine(5)}
    same(synthesize_images(net, PLAIN, 9, KEY, **how), whole)
    seen = []
    same(synthesize_images(net, PLAIN, 9, KEY, watch=Watcher(progress=seen.append), **how), whole)
    assert seen == []


def test_state_that_another_process_is_writing_is_refused(net, tmp_path):
    with (
        owned(tmp_path, "run"),
        pytest.raises(UsageError, match=f"being written by process {os.getpid()} on"),
    ):
        synthesize_images(net, PLAIN, 2, KEY, place=Place(tmp_path))
    lock = tmp_path / "run.lock"
    seen = []
    look = lambda p: seen.append(json.loads(lock.read_text())["pid"])
    synthesize_images(net, PLAIN, 2, KEY, place=Place(tmp_path), watch=Watcher(progress=look))
    assert seen[0] == os.getpid()
    assert not lock.exists()


TOGETHER = best(steps=6, batch=8)


@pytest.fixture(scope="module")
def large(net):
    """Two batches of eight images on one device, matched in batch statistics."""
    return synthesize_images(net, TOGETHER, 12, KEY, chunk=3)


@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit], ids=str)
def test_one_large_batch_over_several_devices(kind, large, net, compiled):
    """Whatever mesh the caller works on."""
    mesh = None if kind is None else Mesh(data_mesh(4).devices, ("data",), axis_types=(kind,))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        key = jax.random.key(5)
        how = {"machine": Machine(4, together=True), "chunk": 3}
        found = synthesize_images(net, TOGETHER, 12, key, **how)
    assert compiled("run_chunk") <= 1  # all of them share it, on whatever mesh
    assert compiled("run_chunks") == 0
    np.testing.assert_allclose(found.losses, large.losses, rtol=1e-5)
    np.testing.assert_allclose(found.images, large.images, rtol=1e-5, atol=1e-5)
    assert found.images.sharding == large.images.sharding
    assert found.notes == ()


def test_a_batch_is_divided_evenly(net):
    spread = spread_of(measured(net, recipe(batch=6), 6), Machine(4, together=True))
    assert spread.together == data_mesh(3)
    why = "a batch of 6 images does not divide evenly among more"
    assert spread.notes == (f"small used 3 of 4 devices: {why}",)
    assert spread_of(measured(net, recipe(batch=7), 7), Machine(4, together=True)).together is None


def test_memory_goes_on_where_devices_work_together(net):
    one = synthesize_images(net, drawn(SUM), 6, KEY)
    found = synthesize_images(net, drawn(SUM), 6, KEY, machine=Machine(2, together=True))
    assert found.notes == ()
    np.testing.assert_allclose(found.images, one.images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_the_mesh_of_the_caller_does_not_change_the_images(kind, whole, net):
    with jax.set_mesh(Mesh(data_mesh(2).devices, ("data",), axis_types=(kind,))):
        key, devices = jax.random.key(5), 1 if kind == AxisType.Auto else 4
        same(synthesize_images(net, PLAIN, 9, key, chunk=2, machine=Machine(devices)), whole)


def test_devices_that_do_not_exist(net):
    with pytest.raises(UsageError, match="asked for 9 devices, this process has 8"):
        synthesize_images(net, PLAIN, 2, KEY, machine=Machine(9))


def test_noise_needs_one_device(net):
    one = synthesize_images(net, noise(batch=2), 5, KEY)
    same(synthesize_images(net, noise(batch=2), 5, KEY, machine=Machine(3)), one)


def test_processes_that_know_each_other_keep_no_unfinished_state(tmp_path, monkeypatch):
    """Orbax would wait for the others, which have nothing to save."""
    assert store_of(Place(tmp_path / "one"), 0, 0) is not None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert store_of(Place(tmp_path / "two"), 0, 0) is None
    assert not (tmp_path / "two").exists()
