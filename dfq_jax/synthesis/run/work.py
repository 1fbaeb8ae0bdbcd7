"""What a synthesis has to do, in all and at a time."""

from typing import NamedTuple

from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.terms.targets import Targets, Unusable


class BatchWork(NamedTuple):
    """What one optimisation makes.

    Attributes:
      recipe: the method.
      targets: the batch norms it matches.
      size: images of a batch.
      turns: batches that take turns in it; 1 for batches on their own.
    """

    recipe: Recipe
    targets: Targets
    size: int
    turns: int = 1


class SynthesisWork(NamedTuple):
    """What there is to do.

    Attributes:
      recipe: fitted to the network.
      targets: what its batch norms recorded.
      size: images of a batch.
      batches: how many.
      excluded: batch norms left out.
      notes: what was done differently than the recipe says.
    """

    recipe: Recipe
    targets: Targets
    size: int
    batches: int
    excluded: tuple[Unusable, ...]
    notes: tuple[str, ...]

    @property
    def at_a_time(self) -> BatchWork:
        """What each optimisation makes: a batch, or all of them in turns."""
        turns = self.batches if self.recipe.turns else 1
        return BatchWork(self.recipe, self.targets, self.size, turns)
