"""What `--method` and `--preset` mean; the one place where names become recipes."""

import dataclasses
from typing import Any, Literal, get_args

from dfq_jax.errors import UsageError
from dfq_jax.recipes.best import best
from dfq_jax.recipes.dsg import dsg
from dfq_jax.recipes.noise import noise
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.types import InputContract

Method = Literal["best", "dsg", "zeroq", "noise"]
METHODS: tuple[str, ...] = get_args(Method)
Preset = Literal["fast", "balanced", "best"]
PRESETS: tuple[str, ...] = get_args(Preset)

SMALL_IMAGE = 64 * 64
NOISE_IMAGES = 32


@dataclasses.dataclass(frozen=True)
class ImageBudget:
    """How many images a preset makes for itself, and how."""

    method: str
    n: int
    steps: int


def image_budget(preset: str, contract: InputContract) -> ImageBudget:
    """The images of a preset for networks that read such images.

    Raises:
      UsageError: for an unknown preset.
    """
    small = contract.height * contract.width <= SMALL_IMAGE
    match preset:
        case "fast":
            return ImageBudget("best", 64, 100) if small else ImageBudget("best", 12, 16)
        case "balanced" | "best":
            return ImageBudget("dsg", 256, 250) if small else ImageBudget("dsg", 48, 100)
        case _:
            raise UsageError(f"preset {preset!r} is none of {', '.join(PRESETS)}.")


def noise_budget(budget: ImageBudget) -> ImageBudget:
    """The images of a preset where they are noise, which costs nothing to make."""
    return ImageBudget("noise", max(budget.n, NOISE_IMAGES), 0)


def recipe_for(method: str, steps: int | None = None, batch: int | None = None) -> Recipe:
    """The synthesis recipe of a method, with its steps and batch replaced where given.

    Noise takes no steps, whatever is given.

    Raises:
      UsageError: for an unknown method, or steps or batch below 1.
    """
    if method not in METHODS:
        raise UsageError(f"method {method!r} is none of {', '.join(METHODS)}.")
    for name, value in (("steps", steps), ("batch", batch)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
    given: dict[str, Any] = {k: v for k, v in (("steps", steps), ("batch", batch)) if v is not None}
    match method:
        case "zeroq":
            return zeroq(**given)
        case "dsg":
            return dsg(**given)
        case "noise":
            given.pop("steps", None)
            return noise(**given)
        case _:
            return best(**given)
