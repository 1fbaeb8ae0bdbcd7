"""Who makes what in a program of JAX: the ground on which its arithmetic is recognised."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dfq_jax.io.frontends.program import Call, Program, Ref

PREFIX = "jax."
VIEWS = frozenset(("reshape", "broadcast_in_dim", "squeeze", "expand_dims"))
KEEPS = frozenset(("copy", "copy_p", "stop_gradient", "optimization_barrier", "reduce_precision"))


@dataclasses.dataclass(frozen=True)
class Makers:
    """The calls of a program by what they make.

    Attributes:
      calls: {tensor: the call that makes it}.
      fixed: names of what does not depend on the images.
      readers: {tensor: how many calls read it}; what the network returns counts as read.
    """

    calls: Mapping[str, Call]
    fixed: frozenset[str]
    readers: Mapping[str, int]

    def of(self, argument: Any, *kinds: str) -> Call | None:
        """The call that makes an operand, if it is of one of these kinds."""
        call = self.calls.get(argument.name) if isinstance(argument, Ref) else None
        return call if call is not None and kind_of(call) in kinds else None

    def is_fixed(self, argument: Any) -> bool:
        """Whether an operand does not depend on the images."""
        return not isinstance(argument, Ref) or argument.name in self.fixed

    def root(self, argument: Any) -> Any:
        """What an operand is before it was reshaped, repeated along axes or cast to a float."""
        return self._before(argument, is_view)

    def plain(self, argument: Any) -> Any:
        """What an operand is before it was copied or cast to a float, shape unchanged."""
        return self._before(argument, is_copy)

    def _before(self, argument: Any, passes: Callable[[Call], bool]) -> Any:
        while isinstance(argument, Ref):
            call = self.calls.get(argument.name)
            if call is None or not passes(call):
                break
            argument = call.args[0]
        return argument

    def number(self, argument: Any) -> float | None:
        """The number that an operand is, the same for all its values; None for anything else."""
        found = self.root(argument)
        if isinstance(found, Ref) or np.size(found) != 1:
            return None
        return shortest(found)


def makers_of(program: Program) -> Makers:
    """Who makes what in a program."""
    calls: dict[str, Call] = {}
    fixed, readers = set(program.arrays), dict.fromkeys(program.outputs, 1)
    for call in program.calls:
        made = [name for name in call.outputs if name is not None]
        calls.update(dict.fromkeys(made, call))
        read = [a.name for a in call.args if isinstance(a, Ref)]
        for name in read:
            readers[name] = readers.get(name, 0) + 1
        if fixed.issuperset(read):
            fixed.update(made)
    return Makers(calls, frozenset(fixed), readers)


def kind_of(call: Call) -> str:
    """`jax.add` as `add`."""
    return call.target.removeprefix(PREFIX)


def is_view(call: Call) -> bool:
    """Whether a call leaves values as they are, or repeats them along new axes."""
    return kind_of(call) in VIEWS or is_copy(call)


def is_copy(call: Call) -> bool:
    """Whether a call leaves values and their shape as they are."""
    kind = kind_of(call)
    casts = kind == "convert_element_type" and is_float(call.kwargs.get("new_dtype"))
    return casts or (kind in KEEPS and len(call.args) == 1)


def is_float(dtype: Any) -> bool:
    """Whether a type of JAX is one of floats, bfloat16 among them."""
    kind = np.dtype(dtype)
    return kind.kind == "f" or kind.name in ("bfloat16",)


def shortest(number: Any) -> float:
    """A float32 number as people write it: 1e-05, not 9.99999974737875e-06."""
    return float(str(np.float32(np.asarray(number).reshape(()))))
