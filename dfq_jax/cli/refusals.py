"""What is wrong with a command, told at once rather than one fault a run."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from dfq_jax.allocation.costs import parse_budget
from dfq_jax.api.given import TO_GIVE
from dfq_jax.api.shrinking import stays_float
from dfq_jax.api.synthesize import check_seed
from dfq_jax.cli.claims import check_apart
from dfq_jax.cli.options import CompressOptions, IntegerOptions, QuantizeOptions, TrainOptions
from dfq_jax.data.sources import TFDS
from dfq_jax.errors import DfqError, UsageError
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.quantization.rules import parse_rule
from dfq_jax.recipes.trainings import check_positive
from dfq_jax.report.trust import check_accuracy
from dfq_jax.synthesis.run.memory import bytes_from

Check = Callable[[], object]
"""Raises a DfqError, or nothing."""
NUMBERS = ("n", "steps", "batch", "reconstruction_steps", "epochs")
"""Options that count something."""


def refuse_together(*checks: Check) -> None:
    """Carries out all checks, and raises what they refuse.

    Raises:
      DfqError: the only refusal as it is; of several one that tells them all.
    """
    found: list[DfqError] = []
    for check in checks:
        try:
            check()
        except DfqError as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        told = "\n".join(f"- {error}" for error in found)
        raise UsageError(f"{len(found)} things are wrong:\n{told}") from found[0]


def checks_of(options: IntegerOptions | TrainOptions) -> Iterator[Check]:
    """What can be said of options by themselves, before a model is read."""
    floats = isinstance(options, CompressOptions) and stays_float(options.scheme)
    if options.scheme is not None and not floats:
        yield partial(parse_scheme, options.scheme)
    for rule in options.rule:
        yield partial(parse_rule, rule)
    if type(options) is QuantizeOptions and options.budget is not None:
        yield partial(parse_budget, options.budget)
    for name in NUMBERS:
        yield partial(check_positive, name, getattr(options, name, None))
    yield partial(check_accuracy, options.accuracy)
    yield partial(check_seed, options.seed)
    if options.memory is not None:
        yield partial(bytes_from, options.memory)


def check_places(
    model: str, options: IntegerOptions | TrainOptions, **others: Path | None
) -> Iterator[Check]:
    """Whether what is read is there, and apart from what is written.

    Args:
      model: where the network is.
      options: of the verb.
      **others: what else is read, by option.
    """
    yield partial(check_there, options.images)
    places = {"MODEL": model, "images": options.images, **others, "output": options.output}
    yield partial(check_apart, **places)


def check_there(path: Path | None) -> None:
    """Refuses images that do not exist.

    Raises:
      UsageError: naming them.
    """
    if path is None or str(path).startswith(TFDS) or path.exists():
        return
    raise UsageError(f"no image set at {path}; {TO_GIVE}.")
