"""How long the compiler takes."""

import contextlib
from collections.abc import Iterator

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's name for the time in which a lowered program is compiled, or found in a cache."""


@contextlib.contextmanager
def compile_clock() -> Iterator[list[float]]:
    """Notes the seconds of every compilation of this process while inside.

    Yields:
      A list that grows by one entry a program.
    """
    seconds: list[float] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event == COMPILED:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
