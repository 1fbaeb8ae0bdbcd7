"""Types and shapes are checked while tests run, in one go for arguments and results of a call."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype.roar import BeartypeCallHintViolation

by_jaxtyping: Any = jaxtyping.jaxtyped


def checked(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Stands in for `jaxtyping.jaxtyped`, which its import hook puts before all that is defined.

    What is refused is the same: what `typechecker` refuses, and axes of one name that differ in
    length within a call. `jaxtyped` makes two more functions of every function, whether it is
    called or not, and checks arguments twice, for a message that says which one it was: a third
    of the time of all tests.
    """

    def around(thing: Any) -> Any:
        if isinstance(thing, type):
            if dataclasses.is_dataclass(thing) and not hasattr(thing.__init__, "__wrapped__"):
                thing.__init__ = around(thing.__init__)
            return thing
        if not thing.__annotations__:
            return thing
        says_length = any("{" in str(hint) for hint in thing.__annotations__.values())
        if says_length or inspect.isgeneratorfunction(thing):  # which runs after the call
            return by_jaxtyping(thing, typechecker=typechecker)
        typed: list[Any] = []

        @functools.wraps(thing)
        def within(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            with by_jaxtyping("context"):
                if not typed:
                    typed.append(typechecker(thing))
                try:
                    return typed[0](*args, **kwargs)
                except BeartypeCallHintViolation as wrong:
                    raise TypeError(str(wrong)) from None  # what reads files takes it for damage

        return within

    return around


def install() -> None:
    """From now on modules that the hook of `--jaxtyping-packages` sees are checked this way."""
    jaxtyping.jaxtyped = checked
