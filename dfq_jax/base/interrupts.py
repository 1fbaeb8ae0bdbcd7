"""Ctrl-C, for a program of its own."""

import os
import signal
from types import FrameType

INTERRUPTED = 130
"""Exit code of a run that was interrupted."""


def leave(number: int, frame: FrameType | None) -> None:
    """Ends the program at once, without taking apart what is half imported."""
    os.write(2, b"error: interrupted before anything was done.\n")
    os._exit(INTERRUPTED)


def leave_at_once() -> None:
    """Ctrl-C ends a program at once, as long as there is nothing to save.

    An exception raised while compiled modules are imported would get lost in them.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def heed_interrupts() -> None:
    """The first Ctrl-C ends a run tidily, the second at once."""
    if signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, leave):
        return  # a shell's background job ignores them

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, first)
