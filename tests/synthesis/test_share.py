"""One set of images from several processes, some of which are killed."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dfq_jax
from dfq_jax.base.files import owned
from dfq_jax.base.parallel import Machine
from dfq_jax.errors import UsageError
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.schedules import rated
from dfq_jax.recipes.noise import noise
from dfq_jax.synthesis.recipe import Memory, Recipe, Source, Stage
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.processes import synthesize_shards
from dfq_jax.synthesis.run.shards import MANIFEST, ImageShards, load_shards
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.synthesis.terms.match import batch_norm_match

KEY = jax.random.key(5)
FACTS = {"method": "small", "seed": 5}


def past(o):
    """How far images are from what is remembered."""
    return jnp.mean((o.natural - o.memory) ** 2)


def no_past(*_):
    return jnp.zeros(())


def summed(o):
    return o.memory + jnp.sum(o.natural)


SMALL = Recipe(
    name="small",
    settings={},
    batch=2,
    source=Source(gaussian),
    stages=(Stage(4, rated(optax.sgd, 0.1)),),
    terms=(Term("bn", 1.0, batch_norm_match),),
)
SUM = SMALL._replace(
    terms=(Term("past", 1.0, past),),
    memory=Memory(start=no_past, batch=summed),
)


@pytest.fixture(scope="module")
def net(nets):
    return nets.stem()


def share(net, folder, process=0, processes=1, recipe=SMALL, n=9, devices=1, **how: Any):
    machine = Machine(devices, process=process, processes=processes)
    return synthesize_shards(net, recipe, n, KEY, folder, FACTS, chunk=2, machine=machine, **how)


def contents(folder):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def whole(net, tmp_path_factory):
    """Nine images in five shards, made by one process on one device."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    assert share(net, folder).complete
    return folder


def test_a_set_holds_the_images_of_an_ordinary_run(whole, net):
    images = load_shards(whole)
    plain = synthesize_images(net, SMALL, 9, KEY, chunk=2)
    np.testing.assert_array_equal(images.images, plain.images)
    assert (images.contract, images.provenance) == (net.contract, FACTS)
    assert [shard.images for shard in ImageShards(whole).shards] == [2, 2, 2, 2, 1]
    assert os.listdir(whole.parent / ".set.run") == ["fingerprint.json"]


@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (2, 2), (3, 4)])
def test_processes_share_the_work(processes, devices, whole, net, tmp_path):
    """In rounds of one or two; whoever comes last finishes the set."""
    found = []
    for process in reversed(range(processes)):
        mine = share(net, tmp_path / "set", process, processes, devices=devices)
        found.append((mine.complete, len(contents(tmp_path / "set"))))
    if devices == 1:
        assert found == [(False, 2), (True, 6)]  # batches 1 and 3; then 0, 2 and 4
    else:  # of three processes the last has one batch, since no one needs more than two devices
        assert (
            found == [(False, 2), (True, 6)]
            if processes == 2
            else [(False, 1), (False, 3), (True, 6)]
        )
    assert contents(tmp_path / "set") == contents(whole)


def test_what_is_there_is_not_made_again(whole, net, tmp_path):
    seen = []
    folder = tmp_path / "set"
    assert not share(net, folder, 1, 2).complete
    share(net, folder, 0, 1, watch=Watcher(progress=seen.append))
    assert {(p.batch, p.batches) for p in seen} == {(i, 5) for i in (2, 3, 4)}
    assert contents(folder) == contents(whole)
    seen.clear()
    assert share(net, folder, watch=Watcher(progress=seen.append)).complete
    assert seen == []
    (folder / "shard-00003-of-00005.npz").unlink()  # as somebody who was told that it is damaged
    assert share(net, folder, watch=Watcher(progress=seen.append)).complete
    assert len(seen) == 2
    assert contents(folder) == contents(whole)


def test_a_shard_that_was_damaged_before_the_set_was_finished_is_made_again(whole, net, tmp_path):
    folder = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        share(net, folder, watch=Watcher(progress=crash_at(3, 2, KeyboardInterrupt())))
    shard = folder / "shard-00001-of-00005.npz"
    data = bytearray(shard.read_bytes())
    data[-300] ^= 255
    shard.write_bytes(data)
    assert share(net, folder).complete
    assert contents(folder) == contents(whole)


def test_a_finished_set_of_another_recipe_is_refused(net, tmp_path):
    share(net, tmp_path / "set", n=2)
    other = SMALL._replace(stages=(Stage(4, rated(optax.sgd, 0.2)),))
    with pytest.raises(UsageError, match="recipe: saved '"):
        share(net, tmp_path / "set", n=2, recipe=other)


def crash_at(batch, step, error):
    def on_progress(p):
        if (p.batch, p.step) == (batch, step):
            raise error

    return on_progress


@pytest.mark.parametrize("devices", [1, 2])
def test_resumes_inside_a_batch(devices, whole, net, tmp_path):
    folder, seen = tmp_path / "set", []
    with pytest.raises(KeyboardInterrupt):
        share(
            net,
            folder,
            devices=devices,
            watch=Watcher(progress=crash_at(1, 2, KeyboardInterrupt())),
        )
    assert (tmp_path / ".set.run" / f"batch_{devices}" / "stage_0" / "step_2").is_dir()
    assert share(net, folder, devices=devices, watch=Watcher(progress=seen.append)).complete
    assert (seen[0].batch, seen[0].step) == (1, 4)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("turns", [False, True])
def test_batches_that_need_each_other_are_made_by_one_process(turns, net, tmp_path):
    recipe = SUM._replace(turns=turns)
    folder, seen = tmp_path / "set", []
    idle = share(net, folder, 1, 2, recipe, n=5, devices=2, watch=Watcher(progress=seen.append))
    assert (idle.complete, seen) == (False, [])
    why = "its batches take turns" if turns else "each batch goes on from the one before"
    assert idle.notes[-1] == f"small used one of 2 processes: {why}"
    assert idle.notes[0].startswith("small used 1 of 2 devices: ")
    at = (0, 4) if turns else (1, 2)
    with pytest.raises(KeyboardInterrupt):
        share(
            net,
            folder,
            0,
            2,
            recipe,
            n=5,
            watch=Watcher(progress=crash_at(*at, KeyboardInterrupt())),
        )
    assert share(net, folder, 0, 2, recipe, n=5).complete
    plain = synthesize_images(net, recipe, 5, KEY, chunk=2)
    np.testing.assert_array_equal(load_shards(folder).images, plain.images)
    assert [shard.images for shard in ImageShards(folder).shards] == [2, 2, 1]
    before = contents(folder)
    for index in (0, 2):
        (folder / f"shard-0000{index}-of-00003.npz").unlink()
    assert share(net, folder, recipe=recipe, n=5).complete
    assert contents(folder) == before


def test_noise_is_shared_too(net, tmp_path):
    recipe = noise(batch=2)
    assert not share(net, tmp_path / "set", 1, 2, recipe).complete
    assert sorted(contents(tmp_path / "set")) == [f"shard-0000{i}-of-00005.npz" for i in (1, 3)]
    assert share(net, tmp_path / "set", 0, 2, recipe).complete
    plain = synthesize_images(net, recipe, 9, KEY)
    np.testing.assert_array_equal(load_shards(tmp_path / "set").images, plain.images)


def test_each_process_owns_its_share_and_no_other(whole, net, tmp_path):
    with owned(tmp_path / ".set.run", "process-1"):
        assert not share(net, tmp_path / "set", 0, 2).complete
        with pytest.raises(UsageError, match=f"is being written by process {os.getpid()} on"):
            share(net, tmp_path / "set", 1, 2)
    assert share(net, tmp_path / "set", 1, 2).complete
    assert contents(tmp_path / "set") == contents(whole)


def test_the_state_of_another_run_is_refused(whole, net, tmp_path):
    folder = tmp_path / "set"
    assert not share(net, folder, 1, 2).complete
    with pytest.raises(UsageError, match=r"different run:\n  n: saved 9, now 7"):
        share(net, folder, 0, 2, n=7)
    with pytest.raises(UsageError, match=r"different run:\n  n: saved 9, now 7"):
        share(net, whole, n=7)
    with pytest.raises(UsageError, match=r"process 2 of 2: give 0\.\.1"):
        share(net, folder, 2, 2)


WORKER = """
import importlib.util, sys, time
import jax
import optax

tests, folder, process, processes, port, pause, unoptimized = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", unoptimized == "True")
if port != "0":
    jax.distributed.initialize(
        f"127.0.0.1:{port}", int(processes), int(process), heartbeat_timeout_seconds=10
    )
    assert (jax.process_count(), jax.device_count()) == (int(processes), 4 * int(processes))

def module(name):
    spec = importlib.util.spec_from_file_location(name, f"{tests}/{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found

share = module("synthesis/test_share")
made = share.synthesize_shards(
    module("nets").stem(), share.SMALL, 40, share.KEY, folder, share.FACTS,
    chunk=2, machine=share.Machine(4),
    watch=share.Watcher(progress=lambda p: time.sleep(float(pause))),
)
print("complete" if made.complete else "incomplete", flush=True)
"""


def start(folder, process, processes, port, pause=0.0):
    """A process that makes its share of forty images, compiling as this one does."""
    tests, package = Path(__file__).parents[1], Path(dfq_jax.__file__).parents[1]
    unoptimized = jax.config.read("jax_disable_most_optimizations")
    arguments = (tests, folder, process, processes, port, pause, unoptimized)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{tests}"},
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ends(process, seconds=240):
    """What a process said until it ended by itself, and how; it is ended if it does not."""
    try:
        said = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[0]
    return process.returncode, said


@pytest.fixture(scope="module")
def forty(net, tmp_path_factory):
    """The set of forty images, made here by one process, never interrupted."""
    folder = tmp_path_factory.mktemp("forty") / "set"
    assert share(net, folder, n=40).complete
    return contents(folder)


@pytest.mark.slow
def test_two_processes_of_jax_distributed(forty, tmp_path):
    """Each with four devices of its own; they never talk to each other but through the folder."""
    port = free_port()
    both = [start(tmp_path / "set", process, 2, port) for process in range(2)]
    ended = [ends(process) for process in both]
    assert [code for code, _ in ended] == [0, 0], ended
    assert any("complete" in said.split() for _, said in ended)
    assert contents(tmp_path / "set") == forty


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_is_killed_and_both_start_again(victim, forty, tmp_path):
    """At any point after its first shard; its lock and whatever it left half done is no hindrance.

    Process 0 hosts the service that processes find each other by, process 1 does not.
    """
    folder, port = tmp_path / "set", free_port()
    both = [start(folder, process, 2, port, 0.5) for process in range(2)]
    first = folder / f"shard-{4 * victim:05d}-of-00020.npz"
    deadline = time.monotonic() + 240
    while not first.exists():
        assert time.monotonic() < deadline
        assert both[victim].poll() is None, both[victim].communicate()
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    both[victim].kill()
    both[victim].communicate()
    ends(both[1 - victim], 60)  # by itself, if it notices; else as whoever started both would do
    assert not (folder / MANIFEST).exists()
    locks = [p.stem for p in (tmp_path / ".set.run").glob("*.lock")]
    assert f"process-{victim}" in locks
    left = json.loads((tmp_path / ".set.run" / f"process-{victim}.lock").read_text())
    assert left["pid"] == both[victim].pid
    port = free_port()
    again = [start(folder, process, 2, port) for process in range(2)]
    ended = [ends(process) for process in again]
    assert [code for code, _ in ended] == [0, 0], ended
    assert contents(folder) == forty
