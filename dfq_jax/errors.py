"""Every error a user can cause, each with the exit code the command line gives it.

A message says what was attempted, where (node, tensor, file), what was found, what was expected,
and what to do next. An option is named as Python has it, in backticks: `layout="nchw"`, or `mean=`
without a value. The command line says --layout nchw and --mean instead (`report/console.flagged`).
"""

import difflib
from collections.abc import Collection
from typing import ClassVar


class DfqError(Exception):
    """Base of every error raised on purpose. `exit_code` is what `dfq` exits with."""

    exit_code: ClassVar[int] = 2


class UsageError(DfqError):
    """Arguments, flags or config values that cannot mean anything (exit 2)."""


class PlanError(UsageError):
    """A quantization plan that does not fit the network, e.g. a rule that matches nothing."""


class BudgetError(PlanError):
    """A budget that cannot be read, or that no choice of bits or channels keeps to."""


class DataError(UsageError):
    """A data folder, archive, image set or artifact that cannot be read as what it claims to be."""


class CheckpointError(DfqError):
    """A checkpoint that is damaged or does not fit the architecture (exit 2)."""


class UnsupportedModelError(DfqError):
    """A well-formed model this version cannot handle (exit 3)."""

    exit_code = 3


class UnsupportedOpError(UnsupportedModelError):
    """Operators without a counterpart here; the message lists all of them."""


class SeveralInputsError(UnsupportedModelError):
    """A network with other inputs than one that is read; no option or better file changes that."""


class GraphError(UnsupportedModelError):
    """A graph that breaks an invariant: undefined input, duplicate name, wrong shape."""


class ImportParityError(UnsupportedModelError):
    """An imported network that does not compute what its source computes."""


class ExportError(UnsupportedModelError):
    """A graph or plan that the target format cannot express."""


class QualityError(DfqError):
    """The result exists but must not be called a success (exit 4)."""

    exit_code = 4


class DivergedError(QualityError):
    """An optimisation whose loss became NaN or infinite."""


class ResourceError(DfqError):
    """Out of memory, disk or time (exit 5)."""

    exit_code = 5


class UnsafeInputError(DfqError):
    """A file that tries to run code, escape its folder, or exhaust the machine (exit 6)."""

    exit_code = 6


def check_choice(
    what: str, value: str, choices: Collection[str], error: type[DfqError] = UsageError
) -> None:
    """Refuses a name that is not among those there are.

    Args:
      what: it names, for the message.
      value: the name.
      choices: all there are.
      error: to raise.

    Raises:
      UsageError: or `error`, listing them, and the nearest if one is near.
    """
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; nearest: {near[0]}" if near else ""
    raise error(f"{what} {value!r} is none of {', '.join(choices)}{hint}.")
