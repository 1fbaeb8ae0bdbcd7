"""A function of JAX as a `Program`: traced, nested functions written out, weights as arrays."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.frontends.jax_names import as_array, dotted, line_of
from dfq_jax.io.frontends.program import Call, Program, ProgramInput, Ref
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.types import NHWC

PREFIX = "jax."
INLINED = frozenset(
    (
        *("jit", "pjit", "closed_call", "core_call", "xla_call", "named_call", "custom_lin"),
        *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
        *("checkpoint", "remat", "remat2"),
    )
)
"""Primitives that call a function, under the names they have had since JAX 0.4."""
INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
IMAGE = "images"
MOST_CALLS = 100_000
MOST_DEPTH = 200
Shape = tuple[int, ...]


class Traced(NamedTuple):
    """A function, traced.

    Attributes:
      program: what it computes.
      shapes: of every tensor in it by name.
      kept: which of the function's results, in the order of its pytree, the program returns.
    """

    program: Program
    shapes: Mapping[str, Shape]
    kept: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where in the user's code a traced function is called from.

    Attributes:
      path: of modules.
      name: of the innermost named function, such as `relu`.
      line: of the outermost call; JAX keeps traced functions, with the lines they had at first.
      depth: of calls.
    """

    path: str = ""
    name: str = ""
    line: str = ""
    depth: int = 0


def program_of(
    function: Callable[[Any, Any], Any], params: Any, image: Shape, *, where: str
) -> Traced:
    """The program of `function(params, images)`.

    Args:
      function: pure, in evaluation mode.
      params: a pytree of arrays; what the function reads of it are the weights.
      image: shape of the input, a batch of one.
      where: what messages call the function.

    Returns:
      The network in the primitives of JAX.

    Raises:
      UnsupportedModelError: if JAX cannot trace it, or no output depends on the images.
    """
    given = jax.ShapeDtypeStruct(image, np.float32)
    try:
        closed = jax.make_jaxpr(function)(params, given)
    except Exception as error:  # whatever the user's function raises
        raise untraceable(where, error) from error
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    writer = Writer()
    *weights, image_variable = closed.jaxpr.invars
    writer.names[image_variable] = Ref(IMAGE)
    writer.shapes[IMAGE], writer.variable = image, {IMAGE}
    read = used(closed.jaxpr)
    for (path, leaf), variable in zip(leaves, weights, strict=True):
        if variable in read:
            writer.weight(variable, leaf, dotted(path))
    outputs = writer.inlined(closed, [writer.names.get(v) for v in closed.jaxpr.invars], Scope())
    kept = kept_outputs(outputs, writer.variable)
    if not kept:
        raise UnsupportedModelError(f"{where}: nothing it returns depends on the images.")
    dropped = len(outputs) - len(kept)
    note = f"{dropped} results that repeat others or do not depend on the images are left out"
    program = Program(
        (ProgramInput(IMAGE, image),),
        writer.arrays,
        writer.paths,
        tuple(writer.calls),
        tuple(kept),
        (note,) if dropped else (),
        usual_layout=NHWC,
    )
    return Traced(without_dead(program), writer.shapes, tuple(kept.values()))


def kept_outputs(outputs: Sequence[Any], variable: Collection[str]) -> dict[str, int]:
    """{tensor: its place} of the results that depend on the images, each once."""
    kept: dict[str, int] = {}
    for at, output in enumerate(outputs):
        if isinstance(output, Ref) and output.name in variable:
            kept.setdefault(output.name, at)
    return kept


class Writer:
    """Writes out the equations of a traced function as calls.

    Attributes:
      calls: so far, in order.
      arrays: weights and constants by name.
      paths: of the weights, as PyTorch would call them.
      shapes: of everything.
      names: what each variable of a traced function stands for.
      variable: names of what depends on the images.
    """

    def __init__(self) -> None:
        """Nothing written yet."""
        self.calls: list[Call] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.paths: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        self.names: dict[Any, Any] = {}
        self.variable: set[str] = set()

    def weight(self, variable: Any, leaf: Any, path: str) -> None:
        """A leaf of the parameters that the function reads."""
        name = f"p{len(self.arrays)}_{path}"  # two paths may be called the same here
        self.names[variable] = Ref(name)
        self.arrays[name] = as_array(leaf, path)
        self.shapes[name] = self.arrays[name].shape
        if path:
            self.paths[name] = path

    def inlined(self, closed: Any, given: Sequence[Any], scope: Scope) -> list[Any]:
        """Writes the equations of a function out, and returns what its results stand for."""
        if scope.depth > MOST_DEPTH:
            raise UnsupportedModelError(f"functions call each other {MOST_DEPTH} deep.")
        jaxpr = getattr(closed, "jaxpr", closed)
        names = dict(zip(jaxpr.invars, given, strict=True))
        for variable, value in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=False):
            names[variable] = self.constant(value)
        outer, self.names = self.names, names
        for equation in jaxpr.eqns:
            self.written(equation, scope)
        results = [self.named(atom) for atom in jaxpr.outvars]
        self.names = outer
        return results

    def written(self, equation: Any, scope: Scope) -> None:
        """Writes one equation out, or those of the function that it calls."""
        kind, given = equation.primitive.name, [self.named(a) for a in equation.invars]
        here = place_of(equation, scope)
        inner = next((equation.params[k] for k in INNER if k in equation.params), None)
        if kind in INLINED and inner is not None and len(inner_inputs(inner)) == len(given):
            results = self.inlined(inner, given, within(here, equation.params.get("name")))
            self.names.update(zip(equation.outvars, results, strict=True))
            return
        if len(self.calls) >= MOST_CALLS:
            raise UnsupportedModelError(f"the network has more than {MOST_CALLS:,} operations.")
        outputs = tuple(self.output(v) for v in equation.outvars)
        if any(isinstance(g, Ref) and g.name in self.variable for g in given):
            self.variable.update(outputs)
        params = {"primitive": equation.primitive, **plain(equation.params)}
        path = ".".join(filter(None, (here.path, here.name)))
        call = Call(PREFIX + kind, tuple(given), params, outputs, path, line=here.line)
        self.calls.append(call)

    def output(self, variable: Any) -> str:
        """A new name for a result."""
        name = f"v{len(self.shapes)}"
        self.names[variable], self.shapes[name] = Ref(name), tuple(variable.aval.shape)
        return name

    def named(self, atom: Any) -> Any:
        """What an operand stands for: a reference, or the number it is."""
        if not isinstance(atom, core.Literal):
            return self.names[atom]
        value = np.asarray(atom.val)
        return self.constant(value) if value.ndim else value

    def constant(self, value: Any) -> Ref:
        """An array that the function holds."""
        name = f"constant_{len(self.arrays)}"
        self.arrays[name] = as_array(value, name)
        self.shapes[name] = self.arrays[name].shape
        return Ref(name)


def plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a primitive with NumPy's integers, which some rules of JAX leave, as ours."""

    def one(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(one, value))
        return int(value) if isinstance(value, np.integer) else value

    return {name: one(value) for name, value in params.items()}


def inner_inputs(inner: Any) -> Sequence[Any]:
    """What a nested function takes."""
    return getattr(inner, "jaxpr", inner).invars


def used(jaxpr: Any) -> set[Any]:
    """The variables that equations of a function read, or that it returns."""
    atoms = [*(a for e in jaxpr.eqns for a in e.invars), *jaxpr.outvars]
    return {a for a in atoms if not isinstance(a, core.Literal)}


def within(scope: Scope, name: str | None) -> Scope:
    """The scope of a function that is called from there."""
    plain = name is not None and name.isidentifier() and not name.startswith("_")
    named = name if plain and name else scope.name
    return dataclasses.replace(scope, name=named, depth=scope.depth + 1)


def place_of(equation: Any, scope: Scope) -> Scope:
    """The scope of an equation: modules name the ones that Flax writes."""
    stack = str(getattr(equation.source_info, "name_stack", ""))
    parts = [p for p in stack.split("/") if p and p.replace("_", "a").isalnum()]
    path = ".".join(parts[1:])  # the first one is the network's own class
    line = scope.line or line_of(equation)
    return dataclasses.replace(scope, path=path or scope.path, line=line)


def without_dead(program: Program) -> Program:
    """The program less calls and arrays that no output depends on."""
    alive, kept = set(program.outputs), []
    for call in reversed(program.calls):
        if alive.intersection(filter(None, call.outputs)):
            alive.update(references((*call.args, *call.kwargs.values())))
            kept.append(call)
    arrays = {name: array for name, array in program.arrays.items() if name in alive}
    return dataclasses.replace(program, calls=tuple(kept[::-1]), arrays=arrays)


def references(arguments: Iterable[Any]) -> Iterable[str]:
    """Names that arguments of a call refer to."""
    for argument in arguments:
        if isinstance(argument, Ref):
            yield argument.name
        elif type(argument) is tuple:
            yield from references(argument)


def untraceable(where: str, error: Exception) -> UnsupportedModelError:
    """What to say about a function that fails while it is traced."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(show(line, 200) for line in lines[:3]) or "no reason given"
    hint = (
        " Its batch norms are in training mode: load it so that it evaluates, as `lambda v, x: "
        "module.apply(v, x, train=False)` with params=v."
        if "Modif" in type(error).__name__
        else " It is called as function(params, images) with images of the example's shape."
    )
    return UnsupportedModelError(
        f"{where} cannot be traced by JAX: {type(error).__name__}: {reason}{hint}"
    )
