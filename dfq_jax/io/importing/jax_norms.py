"""Batch norms recognised from their arithmetic, so that their statistics are not folded away.

JAX knows no batch norm: libraries write `(x - mean) * (rsqrt(var + eps) * scale) + bias`, or divide
by a root, or multiply out. All are a shift and a factor for each channel, and the factor holds one
`1 / sqrt(var + eps)`.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from dfq_jax.io.frontends.program import Call, Program, Ref
from dfq_jax.io.importing.jax_makers import PREFIX, Makers, kind_of, makers_of, shortest

BATCH_NORM = f"{PREFIX}batchnorm"
STATISTICS = ("var", "running_var")


class Deviation(NamedTuple):
    """`sqrt(var + eps)` of a constant vector."""

    var: str
    eps: float


Base = str | Deviation
Powers = Mapping[Base, int]


class PowerProduct(NamedTuple):
    """A product of constants: `number * base ** power * ...`."""

    number: float
    powers: Powers

    def times(self, other: "PowerProduct", power: int = 1) -> "PowerProduct":
        """This product with another one, or divided by it (`power` -1)."""
        powers = Counter(self.powers)
        for base, count in other.powers.items():
            powers[base] += power * count
        left = {base: count for base, count in powers.items() if count}
        number = other.number if power > 0 else 1 / (other.number or math.inf)
        return PowerProduct(self.number * number, left)

    @property
    def deviations(self) -> list[Deviation]:
        """The roots among its bases."""
        return [base for base in self.powers if isinstance(base, Deviation)]


ONE = PowerProduct(1.0, {})
Terms = tuple[PowerProduct, ...]


@dataclasses.dataclass(frozen=True)
class Chain:
    """What has been done to a tensor so far: shifted, then multiplied.

    Attributes:
      source: the tensor.
      mean: what was taken from it; none if nothing was.
      factor: what it was multiplied by.
      like: an operand that varies along the axis of channels.
    """

    source: Ref
    mean: Terms
    factor: PowerProduct
    like: Any


def with_batch_norms(program: Program, shapes: Mapping[str, tuple[int, ...]]) -> Program:
    """The program with a call of its own for every batch norm.

    Args:
      program: in the primitives of JAX.
      shapes: of its tensors.

    Returns:
      A program that computes the same; calls that nobody reads any more are still in it.
    """
    makers, chains = makers_of(program), {}
    calls = [followed(call, makers, chains, program.paths, shapes) for call in program.calls]
    return dataclasses.replace(program, calls=tuple(calls))


def followed(
    call: Call,
    makers: Makers,
    chains: dict[str, Chain],
    paths: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Call:
    """A call, or the batch norm that it ends; what it does to its operand goes into `chains`."""
    kind, out = kind_of(call), call.outputs[0]
    if kind not in ("add", "sub", "mul", "div") or out is None:
        return call
    x, other = call.args
    if makers.is_fixed(x) and kind in ("add", "mul"):
        x, other = other, x
    if makers.is_fixed(x) or not makers.is_fixed(other):
        return call
    before = chains.get(makers.plain(x).name) if makers.readers[x.name] == 1 else None
    if makers.number(other) is not None:
        return call  # scalars are no parameters of channels
    if kind in ("mul", "div"):
        factor = term_of(other, makers)
        start = before or Chain(x, (), ONE, other)
        chain = dataclasses.replace(start, factor=start.factor.times(factor, sign(kind)))
        chains[out], bias = chain, ()
    else:
        shift = scaled(terms_of(other, makers), sign(kind))
        if before is None or not before.factor.deviations:
            chains[out] = Chain(x, scaled(shift, -1), ONE, other)
            return call
        chain, bias = split_bias(before, shift)
    found = batch_norm(call, chain, bias, shapes)
    if found is None:
        return call
    (root,) = chain.factor.deviations
    return dataclasses.replace(found, path=module_of(paths.get(root.var, ""), call.path))


def sign(kind: str) -> int:
    """-1 for what undoes an operation."""
    return -1 if kind in ("sub", "div") else 1


def module_of(path: str, otherwise: str) -> str:
    """The module that a variance belongs to."""
    module, _, name = path.rpartition(".")
    return module if module and name in STATISTICS else otherwise


def split_bias(chain: Chain, shift: Terms) -> tuple[Chain, Terms]:
    """A chain with its mean, and its bias, where `bias - mean * factor` was added at once."""
    if chain.mean:
        return chain, shift
    inner = [t for t in shift if t.deviations]
    mean = tuple(scaled((t.times(chain.factor, -1),), -1)[0] for t in inner)
    bias = tuple(t for t in shift if not t.deviations)
    return dataclasses.replace(chain, mean=mean), bias


def batch_norm(
    call: Call, chain: Chain, bias: Terms, shapes: Mapping[str, tuple[int, ...]]
) -> Call | None:
    """The batch norm that a chain and a bias are; None if they are none."""
    roots = chain.factor.deviations
    if len(roots) != 1 or chain.factor.powers[roots[0]] != -1 or not chain.mean:
        return None
    root = roots[0]
    scale = chain.factor.times(PowerProduct(1.0, {root: 1}))
    parts = (*chain.mean, scale, *bias)
    size = math.prod(shapes[root.var])
    plain = all(not part.deviations for part in parts)
    named = [base for part in parts for base in part.powers if isinstance(base, str)]
    if not plain or not all(math.prod(shapes[n]) in (1, size) for n in named):
        return None
    given = (chain.source, chain.like, written(chain.mean), Ref(root.var), written((scale,)))
    return dataclasses.replace(
        call, target=BATCH_NORM, args=(*given, written(bias)), kwargs={"eps": root.eps}
    )


def written(terms: Terms) -> tuple[Any, ...]:
    """A sum of products as arguments of a call: (number, ((constant, power), ...)) each."""
    return tuple(
        (term.number, tuple((Ref(str(base)), power) for base, power in term.powers.items()))
        for term in terms
    )


def scaled(terms: Terms, number: int | float) -> Terms:
    """A sum times a number."""
    return tuple(PowerProduct(t.number * number, t.powers) for t in terms)


def terms_of(argument: Any, makers: Makers) -> Terms:
    """A constant as a sum of products."""
    found = makers.root(argument)
    if (call := makers.of(found, "add", "sub")) is not None:
        left, right = (terms_of(a, makers) for a in call.args)
        return (*left, *scaled(right, sign(kind_of(call))))
    if (call := makers.of(found, "neg")) is not None:
        return scaled(terms_of(call.args[0], makers), -1)
    return (term_of(found, makers),)


def term_of(argument: Any, makers: Makers) -> PowerProduct:
    """A constant as a product."""
    found = makers.root(argument)
    if (number := makers.number(found)) is not None:
        return PowerProduct(number, {})
    call = makers.of(found, "mul", "div", "neg", "sqrt", "rsqrt", "pow", "integer_pow")
    if call is None:
        return PowerProduct(1.0, {found.name: 1})
    kind, first = kind_of(call), call.args[0]
    if kind in ("mul", "div"):
        return term_of(first, makers).times(term_of(call.args[1], makers), sign(kind))
    if kind == "neg":
        return term_of(first, makers).times(PowerProduct(-1.0, {}))
    if kind == "integer_pow" and call.kwargs["y"] == -1:
        return ONE.times(term_of(first, makers), -1)
    exponent = exponent_of(call, makers)
    root = None if exponent is None else deviation(first, makers)
    if root is None or exponent is None:
        return PowerProduct(1.0, {found.name: 1})
    return PowerProduct(1.0, {root: exponent})


def exponent_of(call: Call, makers: Makers) -> int | None:
    """1 for a square root, -1 for its reciprocal, None for anything else."""
    kind = kind_of(call)
    power = makers.number(call.args[1]) if kind == "pow" else None
    if kind == "sqrt" or power == 0.5:
        return 1
    return -1 if kind == "rsqrt" or power == -0.5 else None


def deviation(argument: Any, makers: Makers) -> Deviation | None:
    """The variance and epsilon under a root; None if there are none."""
    found = makers.root(argument)
    call = makers.of(found, "add")
    for var, eps in (call.args, call.args[::-1]) if call is not None else ():
        number, root = makers.number(eps), makers.root(var)
        if number is not None and isinstance(root, Ref):
            return Deviation(root.name, shortest(number))
    return Deviation(found.name, 0.0) if isinstance(found, Ref) else None
