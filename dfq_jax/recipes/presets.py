"""What `--method` and `--preset` mean; the one place where names become recipes."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, get_args

from dfq_jax.base.elsewhere import check_method
from dfq_jax.base.words import Preset
from dfq_jax.errors import UsageError, check_choice
from dfq_jax.graph.graph import Model
from dfq_jax.quantization.plan import Scheme
from dfq_jax.recipes.aac import aac
from dfq_jax.recipes.best import BEST, BEST_UNLABELLED
from dfq_jax.recipes.clusterq import clusterq
from dfq_jax.recipes.deepinversion import DEEPINVERSION
from dfq_jax.recipes.dsg import dsg, dsg_journal
from dfq_jax.recipes.genie import GENIE
from dfq_jax.recipes.gzsq import gzsq
from dfq_jax.recipes.hard_samples import HARD_SAMPLES
from dfq_jax.recipes.intraq import INTRAQ
from dfq_jax.recipes.knowledge_within import KNOWLEDGE_WITHIN
from dfq_jax.recipes.mct import MCT
from dfq_jax.recipes.noise import NO_STATISTICS, NOISE
from dfq_jax.recipes.psaq_vit import psaq_vit
from dfq_jax.recipes.sardfq import sardfq
from dfq_jax.recipes.sizes import is_small
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.synthesis.recipe import Offer, Recipe, batch_size
from dfq_jax.synthesis.terms.targets import recorded_statistics
from dfq_jax.types import Input

OFFERS: Mapping[str, Offer] = {
    "best": BEST,
    "best_unlabelled": BEST_UNLABELLED,
    "dsg": Offer(dsg),
    "dsg_journal": Offer(dsg_journal),
    "zeroq": Offer(zeroq),
    "deepinversion": DEEPINVERSION,
    "knowledge_within": KNOWLEDGE_WITHIN,
    "intraq": INTRAQ,
    "hard_samples": HARD_SAMPLES,
    "clusterq": Offer(clusterq),
    "mct": MCT,
    "genie": GENIE,
    "gzsq": Offer(gzsq),
    "psaq_vit": Offer(psaq_vit),
    "sardfq": Offer(sardfq),
    "aac": Offer(aac),
    "noise": NOISE,
}
METHODS = tuple(OFFERS)
PRESETS: tuple[str, ...] = get_args(Preset)

SMALL = {"fast": (64, 100), "balanced": (256, 100), "best": (256, 100)}
"""Images and steps of a preset."""
LARGE = {"fast": (16, 40), "balanced": (64, 60), "best": (128, 60)}
"""The same where images are larger than `SMALL_IMAGE`. `fast` makes as many as probes have base
images (`recipes/probes.py`): both are made by the same programs then."""
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
      method: its name, or the recipe.
      n: how many.
      steps: of a batch; 0 of noise.
      named: somebody named the method, so these are its own numbers, not those of a preset.
    """

    method: str | Recipe
    n: int
    steps: int
    named: bool = False


def image_budget(preset: str, read: Input, *, learned: bool) -> ImageBudget:
    """The images of a preset for networks that read such images.

    Args:
      preset: its name.
      read: what the network reads.
      learned: whether rounding is learned from them, rather than ranges alone.

    Raises:
      UsageError: for an unknown preset.
    """
    check_choice("preset", preset, PRESETS)
    n, steps = (SMALL if is_small(read) else LARGE)[preset]
    return ImageBudget("best_unlabelled" if learned else "best", n, steps)


def budget_of_method(method: str | Recipe, model: Model) -> ImageBudget:
    """The images of a method that was named: as many, in as many steps, as are its own.

    No preset cuts them short; `dfq synthesize` and `dfq quantize` make the same. A recipe makes one
    batch.

    Raises:
      UsageError: for an unknown name.
    """
    recipe = recipe_for(method, model=model)
    n = None if isinstance(method, Recipe) else offer_of(method).images
    n = n or batch_size(recipe, recipe.batch, len(recorded_statistics(model)[0]) or 1)
    return ImageBudget(method, n, recipe.steps, named=True)


def budget_of_stages(budget: ImageBudget) -> ImageBudget:
    """The images of a preset where stages learn: twice as many.

    Late layers have few positions an image, and learn a small set by heart.
    """
    return dataclasses.replace(budget, n=2 * budget.n)


def reconstruction_of(preset: str, read: Input, scheme: Scheme) -> str:
    """How a preset rounds kernels, by its name in `recipes.reconstructions`.

    Blocks learned one after the other at large images take hours on a CPU: there layers are solved
    in closed form, or the network learns in stages where weights or activations have few bits.
    Kernels in groups are solved in closed form as well (GPTQ's order of rounding), or to nearest;
    signs are what weights have.

    Raises:
      UsageError: for an unknown preset.
    """
    check_choice("preset", preset, PRESETS)
    if scheme.weight_bits == 1:
        return "nearest"
    if isinstance(scheme.sharing, int):
        return "nearest" if preset == "fast" else "closed_form"
    if is_small(read):
        return {"fast": "nearest", "balanced": "closed_form", "best": "best"}[preset]
    few = scheme.fewest_bits < FEW_BITS
    learned = "stages" if few else "closed_form"
    return "nearest" if preset == "fast" else learned


def steps_of_preset(preset: str, reconstruction: str, asked: int | None = None) -> int | None:
    """The steps asked for, or those a preset takes; None for as many as a method has by itself."""
    if asked is None and (preset, reconstruction) == ("best", "stages"):
        return LONG_STEPS
    return asked


def mixed_budget(budget: ImageBudget) -> ImageBudget:
    """The images of a preset where they also tell which layers need bits."""
    return dataclasses.replace(budget, n=max(budget.n, MIXED_IMAGES))


def noise_budget(budget: ImageBudget) -> ImageBudget:
    """The images of a preset where they are noise, which costs nothing to make."""
    return ImageBudget("noise", max(budget.n, NOISE_IMAGES), 0)


def offer_of(method: str) -> Offer:
    """What a name offers.

    Raises:
      UsageError: for an unknown one.
    """
    check_method("method", method, METHODS)
    return OFFERS[method]


def recipe_for(
    method: str | Recipe,
    steps: int | None = None,
    batch: int | None = None,
    *,
    model: Model | None = None,
) -> Recipe:
    """The synthesis recipe of a method, with its steps and batch replaced where given.

    Args:
      method: one of `METHODS`, or a recipe, which is returned as it is.
      steps: of a batch.
      batch: images optimised together.
      model: the network, where a method has other values for small images than for large ones.

    Raises:
      UsageError: for an unknown method, steps or batch below 1, or either beside a recipe.
    """
    if isinstance(method, int):
        raise UsageError(f"{method} is no method; say how many images by `n={method}`.")
    for name, value in (("steps", steps), ("batch", batch)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
        if value is not None and isinstance(method, Recipe):
            raise UsageError(
                f"{name}={value} beside a recipe, which has its own: make the recipe with it."
            )
    return method if isinstance(method, Recipe) else offer_of(method).recipe(model, steps, batch)


class RecipeChoice(NamedTuple):
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
    model: Model, method: str | Recipe, steps: int | None = None, batch: int | None = None
) -> RecipeChoice:
    """A method and what it looks at; noise where there is nothing to match.

    Raises:
      UsageError: as `recipe_for`.
    """
    recipe = recipe_for(method, steps, batch, model=model)
    if recipe.sees is not None:
        seen, note = recipe.sees(model)
        return RecipeChoice(recipe, seen, (note,))
    if lacks_statistics(model, recipe):
        return RecipeChoice(NOISE.recipe(model, None, batch), model, (NO_STATISTICS,))
    return RecipeChoice(recipe, model)


def makes_noise(model: Model, method: str | Recipe) -> bool:
    """Whether `choice_for` ends in noise.

    Raises:
      UsageError: for an unknown method.
    """
    recipe = recipe_for(method)
    return not recipe.terms or lacks_statistics(model, recipe)


def lacks_statistics(model: Model, recipe: Recipe) -> bool:
    """Whether a recipe needs batch-norm statistics that a network has not got."""
    wanted = recipe.statistics and recipe.sees is None
    return wanted and not recorded_statistics(model)[0]
