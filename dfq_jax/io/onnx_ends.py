"""What an ONNX network does with its scores in the end: users choose the largest themselves."""

import dataclasses

from dfq_jax.io.pickle_policy import show
from dfq_jax.io.program import Call, Program, Ref

BEHIND = ("onnx.Cast", "onnx.Squeeze", "onnx.Unsqueeze", "onnx.Identity", "onnx.Reshape")
"""Operators that only pass on what was chosen."""
CHOICE = "onnx.ArgMax"


def without_choices(program: Program) -> Program:
    """The program with the scores in place of every output that is the index of the largest one.

    An index says nothing about how near the decision was, so nothing could judge a network by it.
    What reads an index inside the network stays, and is refused as any unknown operator.
    """
    made = {name: call for call in program.calls for name in call.outputs if name is not None}
    outputs, notes = [], []
    for name in program.outputs:
        choice = chosen_by(name, made)
        outputs.append(name if choice is None else choice.args[0].name)
        if choice is not None:
            axis = choice.kwargs.get("axis", 0)
            notes.append(
                f"output {show(name)!r} is the ArgMax of {show(outputs[-1])!r} along axis {axis}: "
                "the network returns that instead; take the largest yourself"
            )
    if not notes:
        return program
    changed = dataclasses.replace(
        program, outputs=tuple(outputs), notes=(*program.notes, *notes), calls=program.calls
    )
    return dataclasses.replace(changed, calls=needed(changed))


def chosen_by(name: str, made: dict[str, Call]) -> Call | None:
    """The ArgMax that an output comes from, None if it comes from none."""
    call = made.get(name)
    while call is not None and call.target in BEHIND and isinstance(call.args[0], Ref):
        call = made.get(call.args[0].name)
    found = call is not None and call.target == CHOICE and isinstance(call.args[0], Ref)
    return call if found and call is not None and call.args[0].name in made else None


def needed(program: Program) -> tuple[Call, ...]:
    """The calls that some output depends on."""
    wanted, kept = set(program.outputs), []
    for call in reversed(program.calls):
        if any(name in wanted for name in call.outputs):
            kept.append(call)
            wanted |= {arg.name for arg in call.args if isinstance(arg, Ref)}
    return tuple(reversed(kept))
