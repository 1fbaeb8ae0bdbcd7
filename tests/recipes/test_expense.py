"""What is said of the making of images before it is done."""

import dataclasses

import pytest

from dfq_jax.base.durations import spoken
from dfq_jax.recipes import expense
from dfq_jax.recipes.presets import METHODS, OFFERS, ImageBudget, budget_of_method

FEW = ImageBudget("best", 12, 40)


@pytest.mark.parametrize(
    ("method", "budget", "text"),
    [
        ("genie", (1024, 4000), "8 batches of 128 images, 4,000 steps each, as published"),
        ("zeroq", (32, 500), "one batch of 32 images, 500 steps, as published"),
        (
            *("zeroq", (12, 40)),
            "one batch of 12 images, 40 steps; published are 32 images in 500 steps",
        ),
        (
            *("genie", (200, 4000)),
            "2 batches of 128 images, 4,000 steps each; published are 1,024 images in 4,000 steps",
        ),
    ],
)
def test_how_images_are_made(tiny_net, method, budget, text):
    assert expense.manner(tiny_net, method, ImageBudget(method, *budget), "fast") == text


def test_ours_are_shortened_by_presets_which_is_said(tiny_net):
    said = expense.manner(tiny_net, "best", FEW, "fast")
    assert said.startswith("one batch of 12 images, 40 steps for preset fast; by itself best makes")


@pytest.mark.parametrize("method", [m for m in METHODS if m != "noise"])
def test_no_preset_cuts_a_method_that_is_named(tiny_net, method):
    budget = budget_of_method(method, tiny_net)
    assert budget.named
    said = expense.manner(tiny_net, method, budget, "fast")
    assert ("as published" in said) is not OFFERS[method].ours
    assert "preset" not in said
    assert "by itself" not in said
    cut = expense.manner(tiny_net, method, dataclasses.replace(budget, steps=7), "fast")
    assert f"{budget.n:,} images in {budget.steps:,} steps" in cut
    assert "preset" not in cut


def test_time_grows_with_work(tiny_net, monkeypatch):
    monkeypatch.setattr(expense, "speed", lambda: 1e9)
    seconds = lambda n, steps: expense.expected_seconds(tiny_net, ImageBudget("dsg", n, steps))
    assert seconds(8, 100) == pytest.approx(2 * seconds(4, 100)) == 4 * seconds(4, 50)
    assert expense.length(tiny_net, ImageBudget("dsg", 1, 1)) == ""
    long = expense.length(tiny_net, ImageBudget("dsg", 10**6, 10**4))
    assert long.startswith("; roughly ")
    assert "less with smaller `n=` and `steps=`" in long


def test_the_speed_of_a_machine_is_a_number():
    assert 1e7 < expense.speed() < 1e16


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.0, "1 s"), (8.4, "8 s"), (119, "119 s"), (130, "2 min"), (3700, "62 min")),
        *((7201, "2 h"), (7900, "2 h 10 min"), (40 * 3600, "40 h"), (250_000, "3 days")),
    ],
)
def test_lengths_of_time(seconds, text):
    assert spoken(float(seconds)) == text
