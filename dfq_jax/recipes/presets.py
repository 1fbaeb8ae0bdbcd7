"""What `--method` and `--preset` mean; the one place where names become recipes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

from dfq_jax.base.words import Preset
from dfq_jax.errors import UsageError, check_choice
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import refusal_of_half
from dfq_jax.quantization.plan import Scheme
from dfq_jax.recipes.aac import aac
from dfq_jax.recipes.best import best, best_unlabelled
from dfq_jax.recipes.clusterq import clusterq
from dfq_jax.recipes.deepinversion import deepinversion, deepinversion_cifar
from dfq_jax.recipes.dsg import dsg
from dfq_jax.recipes.genie import genie
from dfq_jax.recipes.gzsq import ESTIMATED, ESTIMATED_ANEW, estimated, gzsq
from dfq_jax.recipes.intraq import intraq
from dfq_jax.recipes.knowledge_within import knowledge_within
from dfq_jax.recipes.mct import mct
from dfq_jax.recipes.noise import NO_STATISTICS, noise
from dfq_jax.recipes.psaq_vit import psaq_vit
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.terms.targets import recorded_statistics
from dfq_jax.types import InputContract

RECIPES: Mapping[str, Callable[..., Recipe]] = {
    "best": best,
    "best_unlabelled": best_unlabelled,
    "dsg": dsg,
    "zeroq": zeroq,
    "deepinversion": deepinversion,
    "knowledge_within": knowledge_within,
    "intraq": intraq,
    "clusterq": clusterq,
    "mct": mct,
    "genie": genie,
    "gzsq": gzsq,
    "psaq_vit": psaq_vit,
    "aac": aac,
    "noise": noise,
}
METHODS = tuple(RECIPES)
OURS = ("best", "best_unlabelled")
PUBLISHED_IMAGES = {"genie": 1024, "intraq": 5120, "mct": 1024}
"""Of methods that make more than one batch in their papers."""
PRESETS: tuple[str, ...] = get_args(Preset)

SMALL_IMAGE = 64 * 64
SMALL = {"fast": (64, 100), "balanced": (256, 100), "best": (256, 100)}
"""Images and steps of a preset."""
LARGE = {"fast": (12, 40), "balanced": (64, 60), "best": (128, 60)}
"""The same where images are larger than `SMALL_IMAGE`."""
COARSE = 0.8
SMALL_BEST: Mapping[str, Any] = {"start": "pink", "labels": 0.3, "learning_rate": 0.15}
"""On small images edges of dead leaves are as long as objects, and take steps to wear off."""
FEW_BITS = 6
"""What fewer bits than these lose is more than layers can make up for one by one."""
LONG_STEPS = 2000
NOISE_IMAGES = 32
MIXED_IMAGES = 43
"""The fewest images to make where bits are chosen: a quarter is held out, 32 or more predict."""


@dataclasses.dataclass(frozen=True)
class ImageBudget:
    """How many images are made, and how.

    Attributes:
      method: its name.
      n: how many.
      steps: of a batch; 0 of noise.
      published: these are the numbers of the method's paper, not of a preset.
    """

    method: str
    n: int
    steps: int
    published: bool = False


def image_budget(preset: str, contract: InputContract, *, learned: bool) -> ImageBudget:
    """The images of a preset for networks that read such images.

    Args:
      preset: its name.
      contract: what the network reads.
      learned: whether rounding is learned from them, rather than ranges alone.

    Raises:
      UsageError: for an unknown preset.
    """
    check_choice("preset", preset, PRESETS)
    n, steps = (SMALL if is_small(contract) else LARGE)[preset]
    return ImageBudget("best_unlabelled" if learned else "best", n, steps)


def budget_of_method(method: str, model: Model, preset: ImageBudget) -> ImageBudget:
    """The images of a method that was asked for by name: as many, in as many steps, as published.

    Our own methods were made for presets, and take their numbers.
    """
    if method in OURS:
        return dataclasses.replace(preset, method=method)
    recipe = recipe_for(method, model=model)
    return ImageBudget(method, published_images(recipe), recipe.steps, published=True)


def published_images(recipe: Recipe) -> int:
    """How many images a paper calibrates with: one batch, where it makes no more."""
    return PUBLISHED_IMAGES.get(recipe.name, recipe.batch)


def budget_of_stages(budget: ImageBudget) -> ImageBudget:
    """The images of a preset where stages learn: twice as many.

    Late layers have few positions an image, and learn a small set by heart.
    """
    return dataclasses.replace(budget, n=2 * budget.n)


def reconstruction_of(preset: str, contract: InputContract, scheme: Scheme) -> str:
    """How a preset rounds kernels, by its name in `recipes.reconstructions`.

    Blocks learned one after the other at large images take hours on a CPU: there layers are solved
    in closed form, or the network learns in stages where weights or activations have few bits.
    Kernels in groups are rounded to nearest: their scales are fine enough.

    Raises:
      UsageError: for an unknown preset.
    """
    check_choice("preset", preset, PRESETS)
    if isinstance(scheme.sharing, int):
        return "nearest"
    if is_small(contract):
        return {"fast": "nearest", "balanced": "closed_form", "best": "best"}[preset]
    few = scheme.fewest_bits < FEW_BITS
    learned = "stages" if few else "closed_form"
    return "nearest" if preset == "fast" else learned


def steps_of(preset: str, reconstruction: str, asked: int | None = None) -> int | None:
    """The steps asked for, or those a preset takes; None for as many as a method has by itself."""
    if asked is None and (preset, reconstruction) == ("best", "stages"):
        return LONG_STEPS
    return asked


def is_small(contract: InputContract) -> bool:
    """Whether images are of the size of CIFAR's rather than of ImageNet's."""
    return contract.height * contract.width <= SMALL_IMAGE


def mixed_budget(budget: ImageBudget) -> ImageBudget:
    """The images of a preset where they also tell which layers need bits."""
    return dataclasses.replace(budget, n=max(budget.n, MIXED_IMAGES))


def noise_budget(budget: ImageBudget) -> ImageBudget:
    """The images of a preset where they are noise, which costs nothing to make."""
    return ImageBudget("noise", max(budget.n, NOISE_IMAGES), 0)


def recipe_for(
    method: str, steps: int | None = None, batch: int | None = None, *, model: Model | None = None
) -> Recipe:
    """The synthesis recipe of a method, with its steps and batch replaced where given.

    Args:
      method: one of `METHODS`.
      steps: of a batch; noise takes none, whatever is given.
      batch: images optimised together.
      model: the network, where a method is published in a form for small images and one for large.

    Raises:
      UsageError: for an unknown method, or steps or batch below 1.
    """
    check_choice("method", method, METHODS)
    for name, value in (("steps", steps), ("batch", batch)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
    given: dict[str, Any] = {k: v for k, v in (("steps", steps), ("batch", batch)) if v is not None}
    if method == "noise":
        given.pop("steps", None)
    if method == "deepinversion" and model is not None:
        return deepinversion_for(model, **given)
    if method in OURS and model is not None:
        return RECIPES[method](**settings_of_best(model, method), **given)
    return RECIPES[method](**given)


def settings_of_best(model: Model, method: str = "best") -> Mapping[str, Any]:
    """How `best` is set for a network: by the size of its images, and whether it reads halves."""
    unlabelled = {"labels": 0.0} if method == "best_unlabelled" else {}
    if is_small(model.contract):
        return {**SMALL_BEST, **unlabelled}
    return {"coarse": COARSE, **unlabelled} if gains_from_halves(model) else unlabelled


def deepinversion_for(model: Model, **given: Any) -> Recipe:
    """DeepInversion as published for images of a network's size, if it runs at half of it."""
    if is_small(model.contract):
        return deepinversion_cifar(**given)
    if gains_from_halves(model):
        return deepinversion(**given)
    return deepinversion(resolution="full", **given)


def gains_from_halves(model: Model) -> bool:
    """Whether a network reads large images, and can read them at half their size."""
    return not is_small(model.contract) and refusal_of_half(model) is None


class Choice(NamedTuple):
    """How the images of a network are made.

    Attributes:
      recipe: the method.
      model: the network it looks at: the one given, or one that computes the same.
      notes: what is different from what was asked for, in sentences.
    """

    recipe: Recipe
    model: Model
    notes: tuple[str, ...] = ()


def choice_for(
    model: Model, method: str, steps: int | None = None, batch: int | None = None
) -> Choice:
    """The recipe of a method and what it needs of a network; noise where there is nothing to match.

    GZSQ sees the network with its batch norms folded away and estimated statistics in their place.

    Raises:
      UsageError: for an unknown method, or steps or batch below 1.
    """
    recipe = recipe_for(method, steps, batch, model=model)
    if method == "gzsq":
        note = ESTIMATED_ANEW if recorded_statistics(model)[0] else ESTIMATED
        return Choice(recipe, estimated(model), (note,))
    if lacks_statistics(model, recipe):
        return Choice(recipe_for("noise", None, batch), model, (NO_STATISTICS,))
    return Choice(recipe, model)


def makes_noise(model: Model, method: str) -> bool:
    """Whether `choice_for` ends in noise.

    Raises:
      UsageError: for an unknown method.
    """
    recipe = recipe_for(method)
    return method == "noise" or (method != "gzsq" and lacks_statistics(model, recipe))


def lacks_statistics(model: Model, recipe: Recipe) -> bool:
    """Whether a recipe needs batch-norm statistics that a network has not got."""
    return recipe.statistics and not recorded_statistics(model)[0]
