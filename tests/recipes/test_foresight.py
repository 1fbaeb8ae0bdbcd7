"""How long the parts of a run are foreseen to take, and that they are told in order."""

import dataclasses
import itertools

import pytest

import dfq_jax as dfq
from dfq_jax.optim.progress import RunPhase, Watcher
from dfq_jax.recipes import foresight, probes
from dfq_jax.recipes.best_rounding import best_rounding
from dfq_jax.recipes.foresight import (
    PARTS,
    foreseen,
    phase_of,
    phase_of_synthesis,
    pruning_foreseen,
)
from dfq_jax.recipes.presets import ImageBudget
from dfq_jax.recipes.qdrop import qdrop
from dfq_jax.reconstruction.closed_form import ClosedForm

LEARNED = (best_rounding(),)
MADE = ImageBudget("dsg", 16, 100)


@pytest.fixture(autouse=True)
def speed(monkeypatch):
    monkeypatch.setattr(foresight, "speed", lambda: 1e6)


def test_only_parts_that_there_will_be(tiny_net):
    everything = foreseen(tiny_net, MADE, 16, methods=LEARNED, judges=True, shown=4)
    everything |= pruning_foreseen(tiny_net, 16)
    assert set(everything) == set(PARTS)
    assert all(seconds > 0 for seconds in everything.values())
    least = foreseen(tiny_net, None, 16, methods=(), judges=False)
    assert tuple(least) == ("calibrating", "judging", "verifying")


def test_learning_takes_its_steps_whatever_the_images(tiny_net):
    long = (best_rounding(steps=4000),)
    took = lambda methods: foreseen(tiny_net, None, 16, methods=methods, judges=False)["learning"]
    image = took((ClosedForm(),)) - foresight.COMPILING["learning"] * len(tiny_net.graph.nodes)
    each = image / (foresight.LOOKS["learning"] * 16)
    assert took(long) - took((best_rounding(steps=1000),)) == pytest.approx(3000 * 32 * 3 * each)
    assert took((qdrop(steps=1000),)) < took((best_rounding(steps=1000),))  # solves nothing first


def test_more_work_takes_longer(tiny_net):
    more = ImageBudget("dsg", 160, 100)
    few, many = (foreseen(tiny_net, b, b.n, methods=LEARNED, judges=True) for b in (MADE, more))
    grow = {part for part in few if many[part] > few[part]}
    assert grow == {"making images", "calibrating", "learning"}
    short, long = (phase_of_synthesis(tiny_net, "dsg", 16, n).seconds for n in (100, 1000))
    assert short < long


def test_probes_made_by_programs_of_the_images_are_not_compiled_again(tiny_net):
    """As presets make them; other images have programs of their own."""
    same = ImageBudget("best", *probes.base_of(tiny_net))
    others = (MADE, dataclasses.replace(same, method="best_unlabelled"), None)
    after = lambda made: foreseen(tiny_net, made, 8, methods=(), judges=True)["making probes"]
    compiling = foresight.COMPILING["making probes"] * len(tiny_net.graph.nodes)
    assert foresight.stages_of(tiny_net, same) == 1
    assert [after(made) - after(same) for made in others] == pytest.approx([compiling] * 3)


def test_every_stage_of_images_has_a_program_and_noise_none(nets):
    large = nets.tiny(size=72)
    count = lambda name: foresight.stages_of(large, ImageBudget(name, 4, 10))
    assert [count(name) for name in ("best", "zeroq", "noise")] == [2, 1, 0]
    assert phase_of_synthesis(large, "noise", 4, None).seconds == 0


def test_a_part_knows_what_comes_after_it(tiny_net):
    seconds = foreseen(tiny_net, MADE, 16, methods=LEARNED, judges=True)
    assert phase_of("verifying", seconds) == RunPhase("verifying", seconds["verifying"], 0.0)
    first = phase_of("making images", seconds)
    assert first.seconds + first.rest == pytest.approx(sum(seconds.values()))
    assert phase_of("learning", {}) == RunPhase("learning", 0.0, 0.0)


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_a_run_tells_its_parts_in_order(tiny_net, preset):
    """Each once, what is foreseen of the rest growing less."""
    told = []
    how = {"n": 4, "steps": 1, "scheme": "w4a8"}
    dfq.quantize(tiny_net, preset=preset, watch=Watcher(phase=told.append), **how)
    learning = ("learning",) if preset == "balanced" else ()
    parts = [p for p in PARTS if p not in ("pruning", "learning", "training") or p in learning]
    assert [phase.what for phase in told] == parts
    assert all(a.rest == pytest.approx(b.seconds + b.rest) for a, b in itertools.pairwise(told))
    assert told[-1].rest == 0.0
