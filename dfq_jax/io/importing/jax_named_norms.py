"""Batch norms whose parameters the user names, however they are computed.

Arithmetic is not always understood (`jax_norms`): roots may be stored, factors folded into others.
Once it is known which parameters a batch norm has, it need not be. What is done to a tensor with
constants that are made of these parameters alone is one factor and one shift for each channel;
both are computed, and the statistics are those named.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dfq_jax.errors import UnsupportedModelError, UsageError, check_choice
from dfq_jax.io.frontends.jax_names import renamed
from dfq_jax.io.frontends.program import Call, Program, Ref
from dfq_jax.io.importing.jax_makers import PREFIX, Makers, is_copy, kind_of, makers_of
from dfq_jax.io.readers.pickle_policy import listing, show

NAMED_NORM = f"{PREFIX}namedbatchnorm"
SPREADS = ("var", "std", "inv_std")
ROLES = ("mean", *SPREADS, "scale", "bias")
ARITHMETIC = ("add", "sub", "mul", "div")
NUMBER, FOREIGN = -1, -2
"""Homes of numbers of the code, and of what reads parameters of several groups or of none."""
SHOWN = 6
"""Parameters that an error lists."""

NormNames = Mapping[str, str]
"""{role: how parameters of this role are called}; see `groups_of_names`."""


class Group(NamedTuple):
    """The parameters of one batch norm.

    Attributes:
      module: what its names have in common.
      spread: which of `SPREADS` it has.
      tensors: {role: tensor of the program}.
    """

    module: str
    spread: str
    tensors: Mapping[str, str]

    @property
    def statistics(self) -> set[str]:
        """The tensors without which it is no batch norm."""
        return {self.tensors["mean"], self.tensors[self.spread]}


class Owned(NamedTuple):
    """What a constant is made of.

    Attributes:
      home: index of the group whose parameters it reads; or `NUMBER`, or `FOREIGN`.
      read: those parameters.
    """

    home: int
    read: frozenset[str] = frozenset()


class NormChain(NamedTuple):
    """What has been done to a tensor with parameters of one group.

    Attributes:
      source: the tensor.
      group: index of the group.
      steps: (operator, constant or None, whether the constant comes first) each.
      read: tensors of the group among the constants.
      whole: whether the last constant is of the group: numbers belong to whatever follows.
    """

    source: Ref
    group: int
    steps: tuple[tuple[str, Any, bool], ...] = ()
    read: frozenset[str] = frozenset()
    whole: bool = False


def groups_of_names(paths: Mapping[str, str], names: NormNames) -> tuple[Group, ...]:
    """The batch norms of a network, by the names of their parameters.

    Args:
      paths: {tensor: path of the parameter, as it is called in the user's pytree}.
      names: {role: name}, a name as `mu` for the parameters called so in any module, or a path
        such as `stats.*.mu`, in which `*` stands for the module.

    Raises:
      UsageError: for a role that is none, without a mean and one spread, or where a batch norm
        lacks one of its parameters.
    """
    for role in names:
        check_choice("role of a parameter of batch norms", role, ROLES)
    spreads = [role for role in SPREADS if role in names]
    if "mean" not in names or len(spreads) != 1:
        raise UsageError(
            f"batch norms are told by their mean and one of {', '.join(SPREADS)}; named are "
            f"{', '.join(names) or 'none'}."
        )
    found = {role: named(paths, name) for role, name in names.items()}
    modules = list(found["mean"])
    for role in ("mean", spreads[0]):
        missing = [module for module in modules if module not in found[role]]
        if missing or not found[role]:
            where = f" in {show(missing[0])!r}" if missing else ""
            there = listing(list(paths.values())[:SHOWN])
            raise UsageError(
                f"no parameter{where} is called {names[role]!r}, which is the {role} of batch "
                f"norms; there are {there}."
            )
    return tuple(
        Group(module, spreads[0], {r: found[r][module] for r in names if module in found[r]})
        for module in modules
    )


def named(paths: Mapping[str, str], name: str) -> dict[str, str]:
    """{module: tensor} of the parameters that a name fits."""
    pattern = renamed((name if "*" in name else f"*.{name}").split("."))
    expression = re.escape(pattern).replace(r"\*\.", r"(?:(.*)\.)?", 1).replace(r"\*", "(.*)", 1)
    fits = ((re.fullmatch(expression, path), tensor) for tensor, path in paths.items())
    return {next(iter(m.groups()), None) or "": tensor for m, tensor in fits if m is not None}


def with_named_norms(program: Program, groups: tuple[Group, ...]) -> Program:
    """The program with a call for every batch norm that was named.

    Raises:
      UnsupportedModelError: naming one whose parameters are used in another way.
    """
    makers, owned = makers_of(program), ownership(program, groups)
    chains: dict[str, NormChain] = {}
    for call in program.calls:
        chain = longer(call, makers, owned, chains)
        if chain is not None and call.outputs[0] is not None:
            chains[call.outputs[0]] = chain
    ends = {
        (chain.group, chain.source.name): output
        for output, chain in chains.items()
        if chain.whole and groups[chain.group].statistics <= chain.read
    }
    told = {group for group, _ in ends}
    for index, group in enumerate(groups):
        if index not in told:
            raise UnsupportedModelError(
                f"`batch_norms=` names the parameters of {show(group.module)!r}, which are used "
                "otherwise than as one factor and one shift for each channel of a tensor."
            )
    last = frozenset(ends.values())
    calls = (
        norm_of(call, chains[call.outputs[0]], groups) if call.outputs[0] in last else call
        for call in program.calls
    )
    return dataclasses.replace(program, calls=tuple(calls))


def ownership(program: Program, groups: tuple[Group, ...]) -> dict[str, Owned]:
    """{constant: what it is made of}."""
    homes = {tensor: i for i, group in enumerate(groups) for tensor in group.tensors.values()}
    found = {}
    for name in program.arrays:
        home = homes.get(name, FOREIGN if name in program.paths else NUMBER)
        found[name] = Owned(home, frozenset((name,)))
    for call in program.calls:
        read = [a.name for a in call.args if isinstance(a, Ref)]
        if all(name in found for name in read):
            parts = [found[name] for name in read if found[name].home != NUMBER]
            kinds = {part.home for part in parts}
            home = NUMBER if not kinds else kinds.pop() if len(kinds) == 1 else FOREIGN
            made = Owned(home, frozenset().union(*(part.read for part in parts)))
            found |= dict.fromkeys(filter(None, call.outputs), made)
    return found


def longer(
    call: Call, makers: Makers, owned: Mapping[str, Owned], chains: Mapping[str, NormChain]
) -> NormChain | None:
    """The chain that a call goes on with or begins; None if it does neither."""
    variable = [a for a in call.args if not makers.is_fixed(a)]
    if len(variable) != 1 or not isinstance(variable[0], Ref):
        return None
    x, kind = variable[0], kind_of(call)
    before = chains.get(x.name) if makers.readers[x.name] == 1 else None
    if len(call.args) == 1:
        moved = is_copy(call) or kind == "neg"
        step = (kind, None, False)
        return before._replace(steps=(*before.steps, step)) if before and moved else None
    if kind not in ARITHMETIC or len(call.args) != 2:
        return None
    other, first = (call.args[0], True) if call.args[1] is x else (call.args[1], False)
    from_whom = owned[other.name] if isinstance(other, Ref) else Owned(NUMBER)
    if before is None or from_whom.home not in (NUMBER, before.group):
        if from_whom.home in (NUMBER, FOREIGN):
            return None
        before = NormChain(x, from_whom.home)
    steps, read = (*before.steps, (kind, other, first)), before.read | from_whom.read
    return NormChain(before.source, before.group, steps, read, from_whom.home == before.group)


def norm_of(call: Call, chain: NormChain, groups: tuple[Group, ...]) -> Call:
    """The batch norm that ends with a call."""
    group = groups[chain.group]
    mean, spread = (Ref(group.tensors[role]) for role in ("mean", group.spread))
    return dataclasses.replace(
        call,
        target=NAMED_NORM,
        args=(chain.source, chain.steps, mean, spread),
        kwargs={"spread_is": group.spread},
        path=group.module or call.path,
    )
