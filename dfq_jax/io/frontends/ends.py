"""What a network does with its scores in the end: users choose the largest themselves."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dfq_jax.io.frontends.program import Call, Program, Ref
from dfq_jax.io.readers.pickle_policy import show

PASSING = frozenset(
    (
        *(f"onnx.{kind}" for kind in ("Cast", "Squeeze", "Unsqueeze", "Identity", "Reshape")),
        *("aten.to", "aten._to_copy", "aten.squeeze", "aten.unsqueeze", "aten.view"),
        *("aten.reshape", "aten.clone", "aten.alias"),
    )
)
"""Operators that only pass on what was chosen; of ATen's without overload."""


class LargestScore(NamedTuple):
    """The place of the largest of some scores.

    Attributes:
      scores: their name.
      axis: along which it is the largest.
    """

    scores: str
    axis: int


def without_choices(program: Program) -> Program:
    """The program with the scores in place of every output that is the index of the largest one.

    An index says nothing about how near the decision was, so nothing could judge a network by it.
    What reads an index inside the network stays, and is refused as any unknown operator.
    """
    made = {name: call for call in program.calls for name in call.outputs if name is not None}
    outputs, notes = [], []
    for name in program.outputs:
        choice = chosen_by(name, made)
        outputs.append(name if choice is None else choice.scores)
        if choice is not None:
            notes.append(
                f"output {show(name)!r} is the ArgMax of {show(choice.scores)!r} along axis "
                f"{choice.axis}: the network returns that instead; take the largest yourself"
            )
    if not notes:
        return program
    changed = dataclasses.replace(
        program, outputs=tuple(outputs), notes=(*program.notes, *notes), calls=program.calls
    )
    return dataclasses.replace(changed, calls=needed(changed))


def chosen_by(name: str, made: Mapping[str, Call]) -> LargestScore | None:
    """The choice that an output comes from, None if it comes from none."""
    call = made.get(name)
    while call is not None and passes(call.target):
        source = next(references(call), None)
        name, call = (name, None) if source is None else (source, made.get(source))
    found = None if call is None else choice_of(call, name)
    return found if found is not None and found.scores in made else None


def passes(target: str) -> bool:
    """Whether an operator only passes on what was chosen."""
    return target in PASSING or target.rpartition(".")[0] in PASSING


def choice_of(call: Call, name: str) -> LargestScore | None:
    """What an operator chooses from, if its result `name` is the place of the largest."""
    scores = next(references(call), None)
    if scores is None:
        return None
    match call.target:
        case "onnx.ArgMax":
            return LargestScore(scores, call.kwargs.get("axis", 0))
        case "aten.argmax.default" if (axis := dimension(call)) is not None:
            return LargestScore(scores, axis)
        case "aten.max.dim" if call.outputs.index(name) == 1 and dimension(call) is not None:
            return LargestScore(scores, dimension(call) or 0)
        case _:
            return None


def dimension(call: Call) -> int | None:
    """The axis an operator of PyTorch works along."""
    given = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
    return given if isinstance(given, int) else None


def needed(program: Program) -> tuple[Call, ...]:
    """The calls that some output depends on."""
    wanted, kept = set(program.outputs), []
    for call in reversed(program.calls):
        if any(name in wanted for name in call.outputs):
            kept.append(call)
            wanted.update(references(call))
    return tuple(reversed(kept))


def references(call: Call) -> Iterator[str]:
    """Names of the tensors that a call reads, in order."""
    yield from within((*call.args, *call.kwargs.values()))


def within(given: tuple[Any, ...]) -> Iterator[str]:
    """Names of the tensors among arguments, and inside tuples of them."""
    for one in given:
        if isinstance(one, Ref):
            yield one.name
        elif isinstance(one, tuple):
            yield from within(one)
