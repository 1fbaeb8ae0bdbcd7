"""What could be done about a network but is not computed, and what it takes where that is known."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dfq_jax.allocation.candidates import FINE_BITS
from dfq_jax.allocation.choices import BITS
from dfq_jax.allocation.costs import cost_of
from dfq_jax.allocation.diagnosis import Diagnosis
from dfq_jax.graph.graph import Model
from dfq_jax.quantization.plan import Plan, Scheme
from dfq_jax.recipes.presets import (
    MIXED_IMAGES,
    PRESETS,
    budget_of_stages,
    image_budget,
    reconstruction_of,
)
from dfq_jax.types import InputContract

ROUNDING = {
    "nearest": "rounds to nearest",
    "closed_form": "solves every layer in closed form",
    "stages": "learns stage after stage by gradient steps",
    "best": "learns rounding by gradient steps",
}
MOST_WORST = 5
"""A budget is that of so many of the worst layers at 8 bits."""


class Untried(NamedTuple):
    """A remedy whose gain is not known.

    Attributes:
      options: of the command.
      takes: what it does, in words.
      seconds: what the part of it takes that can be foretold; None where nothing can.
    """

    options: tuple[str, ...]
    takes: str
    seconds: float | None


def other_presets(
    preset: str, contract: InputContract, scheme: Scheme, made: Mapping[str, Any]
) -> tuple[Untried, ...]:
    """The presets that do more.

    Args:
      preset: of the network as it is.
      contract: what it reads.
      scheme: its bits.
      made: how its images were made, their provenance.
    """
    later = PRESETS[PRESETS.index(preset) + 1 :] if preset in PRESETS else ()
    found = []
    for name in later:
        rounding = reconstruction_of(name, contract, scheme)
        budget = image_budget(name, contract, learned=rounding != "nearest")
        budget = budget_of_stages(budget) if rounding == "stages" else budget
        seconds = foretold(made, budget.n, budget.steps)
        about = "" if seconds is None else f" (about {seconds:.0f} s, going by those it has)"
        takes = f"makes {budget.n} images in {budget.steps} steps{about}, {ROUNDING[rounding]}"
        found.append(Untried(("--preset", name), takes, seconds))
    return tuple(found)


def foretold(made: Mapping[str, Any], n: int, steps: int) -> float | None:
    """Seconds that so many images take, from what it took to make others; None if that is unknown.

    Compiling takes as long as it did, the rest is by images and steps.
    """
    count, each, seconds, compiling = (
        float(made.get(key) or 0) for key in ("n", "steps", "seconds", "compile_seconds")
    )
    if count * each * seconds == 0:
        return None
    return compiling + max(seconds - compiling, 0.0) * n * steps / (count * each)


def within_budget(model: Model, plan: Plan, found: Diagnosis, images: int) -> Untried | None:
    """The bytes of a few layers at 8 bits, spent where they are predicted to count most.

    Args:
      model: folded network.
      plan: as it is quantized.
      found: its diagnosis.
      images: how many it was made from.

    Returns:
      None where no kernel has fewer than 8 bits.
    """
    low = [s for s, spec in plan.entries if s.argument is None and spec.levels.bits < FINE_BITS]
    nested = [x for x in found.outcomes if 0 < len(x.remedy.rules) <= MOST_WORST and x.bytes > 0]
    nested = [x for x in nested if not x.remedy.rules[0].startswith("*=")]  # only of layers
    if not low or not nested:
        return None
    budget = cost_of(model, nested[-1].remedy.plan, "bytes")
    one = sum(x.seconds for x in found.outcomes) / (len(found.outcomes) * found.images)
    passes = len(low) * len(BITS) * MIXED_IMAGES
    more = f"makes {MIXED_IMAGES} images, " if images < MIXED_IMAGES else ""
    takes = (
        f"{more}spends the bytes of {nested[-1].remedy.name} where they are predicted to count "
        f"most (about {passes * one:.0f} s to predict)"
    )
    return Untried(("--budget", str(budget)), takes, passes * one)


def to_dicts(untried: Sequence[Untried]) -> list[dict[str, Any]]:
    """Plain JSON data."""
    return [{**x._asdict(), "options": list(x.options)} for x in untried]
