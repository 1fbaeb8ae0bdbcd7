"""What happens when a device runs out of memory: the same steps again, in a way that takes less."""

from collections.abc import Callable
from typing import TypeVar

import jax

Manner = TypeVar("Manner")
State = TypeVar("State")
Gained = TypeVar("Gained")


def sparing(
    advance: Callable[[Manner, State], Gained], way: Manner, lighter: Callable[[], Manner] | None
) -> Callable[[State, Callable[[], State]], Gained]:
    """Steps that are tried again in a lighter way when memory does not suffice.

    Args:
      advance: (way, state) -> what comes after; it may consume the state.
      way: to begin with.
      lighter: called when memory ran out -> the next way, kept from then on; it raises if there is
        none. None to give up at once.

    Returns:
      (state, a function that gives it again) -> what comes after, computed to its end.
    """
    ways = [way]

    def step(state: State, again: Callable[[], State]) -> Gained:
        while True:
            try:
                return jax.block_until_ready(advance(ways[-1], state))
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                if lighter is None or not exhausted(error):
                    raise
            ways.append(lighter())  # out here, where the failed step's arrays are let go
            state = again()

    return step


def exhausted(error: Exception) -> bool:
    """Whether an error says that memory has run out, on the host or on a device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
