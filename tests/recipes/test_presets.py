import typing

import pytest

from dfq_jax import cli
from dfq_jax.errors import UsageError
from dfq_jax.recipes.presets import (
    METHODS,
    PRESETS,
    ImageBudget,
    Preset,
    image_budget,
    noise_budget,
    recipe_for,
)
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.types import InputContract

SMALL, LARGE = InputContract(32, 32), InputContract(224, 224)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_recipe(method):
    recipe = recipe_for(method)
    assert isinstance(recipe, Recipe)
    assert recipe.name == method
    assert recipe.batch >= 1
    assert (recipe.steps >= 1) is bool(recipe.terms) is (method != "noise")


@pytest.mark.parametrize("method", METHODS)
def test_steps_and_batch_replace_those_of_the_method(method):
    published, changed = recipe_for(method), recipe_for(method, steps=7, batch=3)
    assert (changed.steps, changed.batch) == (0 if method == "noise" else 7, 3)
    assert (changed.name, changed.settings) == (published.name, published.settings)
    assert recipe_for(method, steps=7).batch == published.batch
    assert recipe_for(method, batch=3).steps == published.steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("magic",), r"^method 'magic' is none of best, dsg, zeroq, noise\.$"),
        (("dsg", 0), r"^steps must be at least 1, got 0\.$"),
        (("dsg", None, -2), r"^batch must be at least 1, got -2\.$"),
    ],
)
def test_senseless_requests(arguments, message):
    with pytest.raises(UsageError, match=message):
        recipe_for(*arguments)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("contract", [SMALL, LARGE])
def test_presets_ask_for_images_some_method_makes(preset, contract):
    budget = image_budget(preset, contract)
    assert budget.method in METHODS
    assert budget.n >= 12  # fast judges by all of them
    assert recipe_for(budget.method, budget.steps).steps == budget.steps


def test_fast_is_the_least_work():
    work = lambda preset, contract: (b := image_budget(preset, contract)).n * b.steps
    for contract in (SMALL, LARGE):
        assert work("fast", contract) < work("balanced", contract) <= work("best", contract)


def test_noise_costs_nothing_so_there_is_more():
    assert noise_budget(ImageBudget("best", 12, 16)) == ImageBudget("noise", 32, 0)
    assert noise_budget(ImageBudget("dsg", 256, 250)) == ImageBudget("noise", 256, 0)


def test_an_unknown_preset():
    with pytest.raises(UsageError, match=r"^preset 'slow' is none of fast, balanced, best\.$"):
        image_budget("slow", SMALL)


def test_the_command_line_knows_the_same_names():
    assert typing.get_args(cli.MethodName) == METHODS
    assert set(typing.get_args(Preset)) == set(PRESETS)
