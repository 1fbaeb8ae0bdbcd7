"""What happens when an optimisation diverges: it is made again, at half the learning rate."""

from collections.abc import Callable

from dfq_jax.optim.fit import FitResult

RESTARTS = 3


def rate_of(attempt: int) -> float:
    """The factor of the learning rate in an attempt; they count from 0."""
    return 0.5**attempt


def at_lower_rates(
    attempt: Callable[[int], FitResult], first: FitResult | None = None
) -> tuple[FitResult, tuple[int, ...]]:
    """The first attempt that does not diverge, or the last one if all do.

    Args:
      attempt: number, from 0 to `RESTARTS` -> what became of it at `rate_of` the learning rate.
      first: what became of attempt 0, if it has been made.

    Returns:
      What became of it, and the steps at which each attempt that diverged did.
    """
    result = attempt(0) if first is None else first
    failed: list[int] = []
    while result.status == "diverged":
        failed.append(result.steps)
        if len(failed) > RESTARTS:
            break
        result = attempt(len(failed))
    return result, tuple(failed)


def retold(failed: tuple[int, ...]) -> tuple[str, ...]:
    """What to say of attempts that diverged at these steps, all of which were made again."""
    return tuple(
        f"diverged at step {step} and was made again at 1/{2**number} of the learning rate"
        for number, step in enumerate(failed, 1)
    )
