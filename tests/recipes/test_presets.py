import dataclasses
import typing

import pytest

from dfq_jax.cli import options
from dfq_jax.errors import UsageError
from dfq_jax.graph.ops import Flatten, MaxPool
from dfq_jax.graph.query import batch_norms
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.observers import NAMED
from dfq_jax.quantization.plan import Scheme
from dfq_jax.recipes.noise import NO_STATISTICS
from dfq_jax.recipes.presets import (
    METHODS,
    OFFERS,
    PRESETS,
    ImageBudget,
    Preset,
    budget_of_stages,
    choice_for,
    image_budget,
    makes_noise,
    noise_budget,
    recipe_for,
    reconstruction_of,
    steps_of_preset,
)
from dfq_jax.recipes.reconstructions import RECONSTRUCTIONS, methods_of
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.terms.estimates import ESTIMATED, ESTIMATED_ANEW
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
        (("magic",), r"^method 'magic' is none of best, best_unlabelled, dsg, .*, noise\.$"),
        (("dsg", 0), r"^steps must be at least 1, got 0\.$"),
        (("dsg", None, -2), r"^batch must be at least 1, got -2\.$"),
    ],
)
def test_senseless_requests(arguments, message):
    with pytest.raises(UsageError, match=message):
        recipe_for(*arguments)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("contract", [SMALL, LARGE])
@pytest.mark.parametrize("learned", [False, True])
def test_presets_ask_for_images_some_method_makes(preset, contract, learned):
    budget = image_budget(preset, contract, learned=learned)
    assert budget.method == ("best_unlabelled" if learned else "best")
    assert budget.method in METHODS
    assert budget.n >= 12  # fast judges by all of them
    assert recipe_for(budget.method, budget.steps).steps == budget.steps


def test_stages_see_twice_as_many_images():
    budget = budget_of_stages(ImageBudget("best_unlabelled", 64, 60))
    assert budget == ImageBudget("best_unlabelled", 128, 60)


def test_fast_is_the_least_work():
    work = lambda preset, contract: (b := image_budget(preset, contract, learned=False)).n * b.steps
    for contract in (SMALL, LARGE):
        assert work("fast", contract) < work("balanced", contract) <= work("best", contract)
    assert work("balanced", LARGE) < work("best", LARGE)  # where both solve layers alike


def test_noise_costs_nothing_so_there_is_more():
    assert noise_budget(ImageBudget("best", 12, 16)) == ImageBudget("noise", 32, 0)
    assert noise_budget(ImageBudget("dsg", 256, 250)) == ImageBudget("noise", 256, 0)


def test_an_unknown_preset():
    with pytest.raises(UsageError, match=r"^preset 'slow' is none of fast, balanced, best\.$"):
        image_budget("slow", SMALL, learned=False)
    with pytest.raises(UsageError, match=r"^preset 'slow' is none of fast, balanced, best\.$"):
        reconstruction_of("slow", SMALL, Scheme(8, 8))


def test_reconstructions_of_presets():
    """Large images: layers in closed form, or in stages with few bits of either."""
    asked = ((SMALL, (4, 4)), (LARGE, (8, 8)), (LARGE, (6, 6)), (LARGE, (4, 8)), (LARGE, (8, 4)))
    found = {p: [reconstruction_of(p, c, Scheme(*bits)) for c, bits in asked] for p in PRESETS}
    large = ["closed_form", "closed_form", "stages", "stages"]
    assert found == {
        "fast": ["nearest"] * 5,
        "balanced": ["closed_form", *large],
        "best": ["best", *large],
    }
    assert steps_of_preset("balanced", "stages") is None
    assert steps_of_preset("best", "stages", 0) == 0  # to be refused by who counts them
    assert steps_of_preset("best", "closed_form") is None
    (longer,) = methods_of("stages", steps_of_preset("best", "stages"))
    (usual,) = methods_of("stages")
    steps = lambda method: sum(phase.steps for phase in method.phases)
    assert steps(longer) > steps(usual)


WITHOUT_NORMS = ("gzsq", "psaq_vit", "sardfq", "noise")


@pytest.mark.parametrize("method", METHODS)
def test_a_network_with_statistics_gets_what_is_asked_for(method, tiny_net):
    choice = choice_for(tiny_net, method, 3, 2)
    assert choice.recipe.name == method
    assert (choice.recipe.steps, choice.recipe.batch) == (0 if method == "noise" else 3, 2)
    assert makes_noise(tiny_net, method) is (method == "noise")
    if method == "gzsq":
        assert choice.notes == (ESTIMATED_ANEW,)
        norms = [n.name for n in batch_norms(choice.model.graph)]
        assert norms == [f"{n}.estimated" for n in ("conv1", "depthwise", "project", "conv2")]
    else:
        assert choice.notes == ()
        assert choice.model is tiny_net


@pytest.mark.parametrize("net", ["vit", "stem"])
@pytest.mark.parametrize("method", METHODS)
def test_a_network_without_statistics(method, net, nets):
    """Noise, unless the method can do without."""
    model = dataclasses.replace(fold_batch_norm(getattr(nets, net)()), moments={})
    choice = choice_for(model, method, 3, 2)
    assert choice.recipe.name == (method if method in WITHOUT_NORMS else "noise")
    assert choice.recipe.batch == 2
    assert makes_noise(model, method) is (choice.recipe.name == "noise")
    if method == "gzsq":
        assert choice.notes == (ESTIMATED,)
        assert batch_norms(choice.model.graph)
    else:
        assert choice.notes == (() if method in ("psaq_vit", "sardfq") else (NO_STATISTICS,))
        assert choice.model is model


def test_deepinversion_suits_the_size_of_images(nets):
    """Half the size first, where images are large and the network can read it."""
    stem = nets.stem()
    sized = lambda size: dataclasses.replace(stem, inputs=(InputContract(size, size),))
    settings = lambda model: recipe_for("deepinversion", model=model).settings
    small, large = settings(sized(64)), settings(sized(65))
    assert (small["resolution"], large["resolution"]) == ("full", "multi")
    assert large == recipe_for("deepinversion").settings
    b = nets.Builder(InputContract(66, 66))
    flat = b.op("flat", Flatten(), b.op("pool", MaxPool((11, 11), (11, 11)), "images"))
    fixed = settings(b.done(b.linear("fc", flat, 2)))
    assert fixed == {**large, "resolution": "full"} != small
    given = recipe_for("deepinversion", 7, 3, model=stem)
    assert (given.steps, given.batch) == (7, 3)


def test_the_command_line_knows_the_same_names():
    assert typing.get_args(options.MethodName) == METHODS
    assert typing.get_args(options.ReconstructionName) == RECONSTRUCTIONS
    assert typing.get_args(options.ObserverName) == tuple(NAMED)
    assert set(typing.get_args(Preset)) == set(PRESETS)


def test_learned_rounding_gets_the_images_of_best_without_labels(tiny_net):
    best, other = (
        recipe_for(m, model=tiny_net).settings for m, offer in OFFERS.items() if offer.ours
    )
    assert other == {**best, "labels": 0.0} != best


def test_best_sees_large_images_at_half_their_size_where_the_network_can(nets):
    stem = nets.stem()
    sized = lambda size: dataclasses.replace(stem, inputs=(InputContract(size, size),))
    coarse = lambda model: recipe_for("best", model=model).settings["coarse"]
    assert (coarse(sized(64)), coarse(sized(65))) == (0.0, 0.8)
    start = lambda model: recipe_for("best", model=model).settings["start"]
    assert (start(sized(64)), start(sized(65))) == ("pink", "noise")
    b = nets.Builder(InputContract(66, 66))
    flat = b.op("flat", Flatten(), b.op("pool", MaxPool((11, 11), (11, 11)), "images"))
    assert coarse(b.done(b.linear("fc", flat, 2))) == 0.0
