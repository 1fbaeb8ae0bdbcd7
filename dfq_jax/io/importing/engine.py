"""Turns a `Program` into a graph: one lowering function per source operator, in order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfq_jax.errors import (
    DfqError,
    SeveralInputsError,
    UnsupportedModelError,
    UnsupportedOpError,
)
from dfq_jax.graph.graph import Graph
from dfq_jax.io.frontends.program import Call, Program, Ref
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.limits import affordable
from dfq_jax.io.importing.tidy import tidy
from dfq_jax.io.importing.values import Atom, Value, extent, new_dim
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.types import NCHW, NHWC

Lower = Callable[..., Any]
"""`lower(builder, *args, **kwargs)`: the value (or values) of one call that reads some value."""
Fold = Callable[..., Any]
"""`fold(*args, **kwargs)`: the result of a call that reads only constants, in NumPy."""

INPUT = "images"
UNKNOWN_VALUE, UNKNOWN_CONSTANT = object(), object()
"""Results of operators that are not in the table, which depend on the input or do not."""
MOST_PATHS = 4
PYTHON = ("_operator.", "math.", "torch.sym_")


class OperatorTable(NamedTuple):
    """How the operators of one source are understood.

    Attributes:
      lower: from a target to what it becomes in a graph, None if it is unknown.
      fold: from a target to what it computes on constants.
      accepted: a sentence that lists what is understood, for those who may write it otherwise.
    """

    lower: Callable[[str], Lower | None]
    fold: Callable[[str], Fold | None]
    accepted: str = ""


class Imported(NamedTuple):
    """A graph, its parameters, and what it is fed: (height, width, channels)."""

    graph: Graph
    params: dict[str, dict[str, np.ndarray]]
    shape: tuple[int, int, int]


def import_program(
    program: Program,
    table: OperatorTable,
    *,
    size: tuple[int, int] | None = None,
    layout: str = NCHW,
) -> Imported:
    """The graph of a program.

    Args:
      program: the network in the operators of its source.
      table: what those operators mean.
      size: (height, width) for inputs whose size is free, None for what the program says.
      layout: of images in the source, those it returns among them.

    Returns:
      Graph and parameters, tidied.

    Raises:
      UnsupportedOpError: listing every operator that is not in the table.
      UnsupportedModelError: naming the call that cannot be expressed.
    """
    shape = fed(program, size, layout)
    b = Builder(None if shape[0] == 1 else Atom(shape[0]))
    b.unique(INPUT)
    value, stored = input_value(b, shape, layout)
    env: dict[str, Any] = {**program.arrays, program.inputs[0].name: value}
    lower_all(b, program, table, env)
    outputs = tuple(returned(b, env[name], name, layout) for name in program.outputs)
    return Imported(*tidy(Graph(tuple(b.nodes), (INPUT,), outputs), b.params), stored)


def lower_all(b: Builder, program: Program, table: OperatorTable, env: dict[str, Any]) -> None:
    """Lowers every call of a program, whose inputs and arrays are in `env`.

    Raises:
      UnsupportedOpError: listing every operator that is not in the table.
      UnsupportedModelError: naming the call that cannot be expressed.
    """
    unknown: list[Call] = []
    names = node_names(program)
    for at, (call, b.path) in enumerate(zip(program.calls, names, strict=True)):
        try:
            run(b, call, table, env, unknown)
        except UnsupportedModelError:
            known = lambda call: table.lower(call.target) or table.fold(call.target)
            refuse([*unknown, *(c for c in program.calls[at:] if not known(c))], table.accepted)
            raise
    refuse(unknown, table.accepted)


def refuse(unknown: Sequence[Call], accepted: str = "") -> None:
    """Raises one error for all calls nobody here understands, if there are any."""
    if not unknown:
        return
    found: dict[str, list[str]] = {}
    for call in unknown:
        place = ", ".join(filter(None, (call.path, call.line)))
        found.setdefault(call.target, []).append(place or "(no module)")
    lines = []
    for target, paths in sorted(found.items()):
        places = list(dict.fromkeys(paths))
        more = f" and {len(places) - MOST_PATHS} more" if len(places) > MOST_PATHS else ""
        where = ", ".join(show(p) for p in places[:MOST_PATHS])
        lines.append(f"  {show(target)} x{len(paths)} at {where}{more}")
    raise UnsupportedOpError(
        "the network uses operators without a counterpart here (blocked: nothing was imported):\n"
        + "\n".join(lines)
        + "\nTo add one, see docs/ADDING_AN_OP.md; or write that part with other operators."
        + (f"\n{accepted}" if accepted else "")
    )


def fed(program: Program, size: tuple[int, int] | None, layout: str) -> tuple[int, ...]:
    """The shape of the one input in the source's axis order, with free sizes filled in.

    Raises:
      SeveralInputsError: on several inputs, or none.
      UnsupportedModelError: on a rank other than 2 to 4, or free sizes.
    """
    if len(program.inputs) != 1:
        listed = ", ".join(f"{show(i.name)} {i.shape}" for i in program.inputs)
        raise SeveralInputsError(
            f"the network has {len(program.inputs)} inputs ({listed}); networks of one image, of "
            "volumes, or of whole numbers alone (ids, masks) are read. Wrap it so that the others "
            "are constants; states that are carried from call to call cannot be."
        )
    shape = list(program.inputs[0].shape)
    if not 2 <= len(shape) <= 4:
        raise UnsupportedModelError(
            f"its input has shape {tuple(shape)}; expected (batch, channels, height, width), "
            "(batch, height, width, channels), (batch, channels, length), (batch, length, "
            "channels) or (batch, features)."
        )
    values = len(shape) == 2 and None in shape[1:]
    space = slice(1, -1) if layout == NHWC and not values else slice(1 if values else 2, None)
    exported = shape[space]
    if size is not None and exported:
        wanted = list(size)[-len(exported) :]  # lines have no height
        if any(n not in (None, w) for n, w in zip(exported, wanted, strict=True)):
            raise UnsupportedModelError(
                f"the network was exported for {by(exported)} pixels, not {by(wanted)} (height x "
                f"width, {layout}); export it again with an input of that size."
            )
        shape[space] = wanted
    if None in shape[1:]:
        raise UnsupportedModelError(
            f"its input has free sizes {tuple(shape)}; say which to use with `size=`, for example "
            f"{example_size(shape[space])}."
        )
    return tuple(1 if s is None else s for s in shape)


def example_size(space: Sequence[int | None]) -> str:
    """Sizes that a user could ask for, in words: those that are fixed stay."""
    if len(space) != 1 and not any(space):
        return "`size=224` or `size=(48, 192)` (height, width)"
    height, width = (224 if n is None else n for n in (*[1] * (2 - len(space)), *space))
    return f"`size=({height}, {width})` (height, width)"


def by(sizes: Sequence[int | None]) -> str:
    """Sizes as messages have them."""
    return " x ".join(map(str, sizes))


def pixel_axes(layout: str) -> slice:
    """Where height and width of images are."""
    return slice(1, 3) if layout == NHWC else slice(2, 4)


def input_value(
    b: Builder, shape: tuple[int, ...], layout: str
) -> tuple[Value, tuple[int, int, int]]:
    """The input as a value stored as NHWC, and (height, width, channels)."""
    sizes, last = shape[1:], layout == NHWC and len(shape) > 2
    channels = new_dim(sizes[-1 if last else 0])
    space = [new_dim(n) for n in (sizes[:-1] if last else sizes[1:])]
    axes = (*[()] * (2 - len(space)), *space, channels)
    batch = () if b.batch is None else (b.batch,)
    height, width, depth = (extent(d) for d in axes)
    dims = (batch, *space, channels) if last else (batch, channels, *space)
    return Value(INPUT, axes, dims), (height, width, depth)


def node_names(program: Program) -> list[str]:
    """What the node of each call is called: its module, or the module and the operator."""
    kinds: dict[str, set[str]] = {"": set()}
    paths, computed = owners(program)
    for call in program.calls:
        if computed.issuperset(filter(None, call.outputs)):
            continue  # its result is a constant: no node
        kinds.setdefault(call.path, set()).add(short(call.target))
        for i in range(1, call.path.count(".") + 1):  # modules with children have several kinds
            kinds.setdefault(call.path.rsplit(".", i)[0], set()).add("")
    names = []
    for call in program.calls:
        kind, owner = short(call.target), owner_of(call, paths)
        alone = call.path and kinds.get(call.path) == {kind}
        names.append(owner or (call.path if alone else f"{call.path}.{kind}".removeprefix(".")))
    return names


def owners(program: Program) -> tuple[dict[str, str], set[str]]:
    """{tensor: path of the weight it is}, or is computed from; and which constants are computed.

    A transposed kernel, or one kept as direction and length, belongs to the module all the same.
    """
    paths = {name: plain_path(path) for name, path in program.paths.items()}
    fixed, computed = set(program.arrays), set()
    for call in program.calls:
        read = [a.name for a in flat((*call.args, *call.kwargs.values())) if isinstance(a, Ref)]
        if fixed.issuperset(read):
            made = set(filter(None, call.outputs))
            fixed |= made
            computed |= made
            path = next((paths[name] for name in read if name in paths), None)
            paths |= dict.fromkeys(made, path) if path is not None else {}
    return paths, computed


def plain_path(path: str) -> str:
    """The path of a parameter before PyTorch's weight or spectral norm took it apart."""
    head, mark, rest = path.partition(".parametrizations.")
    if mark:
        return f"{head}.{rest.partition('.')[0]}"
    for ending in ("weight_v", "weight_g", "weight_orig", "weight_u"):
        if path.endswith(f".{ending}"):
            return f"{path.removesuffix(ending)}weight"
    return path


def owner_of(call: Call, paths: Mapping[str, str]) -> str:
    """The module whose weight a call reads, empty if there is none."""
    for argument in (*call.args, *call.kwargs.values()):
        path = paths.get(argument.name, "") if isinstance(argument, Ref) else ""
        for ending in (".weight", "_weight", ".running_mean"):
            if path.endswith(ending):
                return path.removesuffix(ending)
    return ""


def short(target: str) -> str:
    """`aten.add_.Tensor` as `add`, `onnx.Conv` as `conv`."""
    parts = target.split(".")
    return (parts[1] if len(parts) > 1 else parts[0]).strip("_").lower()


def run(
    b: Builder, call: Call, table: OperatorTable, env: dict[str, Any], unknown: list[Call]
) -> None:
    """Lowers one call, or computes it if all it reads is constant.

    Args:
      b: the graph.
      call: what to lower.
      table: what operators mean.
      env: {name: what it stands for}; gets the results.
      unknown: gets the call if it is not in the table; its results stand for nothing.

    Raises:
      UnsupportedModelError: naming it, if its arguments cannot be expressed.
    """
    try:
        args = [resolved(a, env) for a in call.args]
        kwargs = {k: resolved(v, env) for k, v in call.kwargs.items()}
        if call.target.startswith(PYTHON):  # these have no names to speak of
            args, kwargs = [*args, *kwargs.values()], {}
        given = tuple(flat((*args, *kwargs.values())))
        variable = any(isinstance(g, Value) or g is UNKNOWN_VALUE for g in given)
        function = table.lower(call.target) if variable else table.fold(call.target)
        nothing = UNKNOWN_VALUE if variable else UNKNOWN_CONSTANT
        if function is None:
            unknown.append(call)
        if function is None or any(g is UNKNOWN_VALUE or g is UNKNOWN_CONSTANT for g in given):
            env.update(dict.fromkeys(filter(None, call.outputs), nothing))
            return
        result = function(b, *args, **kwargs) if variable else function(*args, **kwargs)
        for array in flat((result,)):
            affordable(array.size if isinstance(array, np.ndarray) else 0)  # views cost nothing yet
    except UnsupportedModelError as error:
        raise type(error)(f"{described(call)}: {error}") from None
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, DfqError):
            raise
        raise UnsupportedModelError(
            f"{described(call)}: arguments that are not supported: {show(error, 200)}"
        ) from error
    results = result if isinstance(result, tuple) else (result,)
    env.update({n: r for n, r in zip(call.outputs, results, strict=False) if n is not None})


def described(call: Call) -> str:
    """A call as messages name it."""
    named = ", ".join(filter(None, (call.label or call.path, call.line)))
    place = f" at {show(named, 200)}" if named else ""
    return f"operator {show(call.target)}{place}"


def resolved(argument: Any, env: Mapping[str, Any]) -> Any:
    """An argument with its references looked up."""
    if isinstance(argument, Ref):
        if argument.name not in env:
            raise UnsupportedModelError(f"it reads {show(argument.name)!r}, which nothing defines.")
        return env[argument.name]
    if type(argument) is tuple:  # named ones are settings of the source
        return tuple(resolved(a, env) for a in argument)
    return argument


def flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    """Arguments, and those inside tuples."""
    for argument in arguments:
        if isinstance(argument, tuple) and not isinstance(argument, Ref):
            yield from flat(argument)
        else:
            yield argument


def returned(b: Builder, value: Any, name: str, layout: str) -> str:
    """The tensor that holds an output: images NHWC, everything else in source order.

    A network that is fed channels last is taken to return images so. The batch may be on another
    axis, as behind recurrent layers that have the steps first; it comes first here.

    Raises:
      UnsupportedModelError: if it does not depend on the input, or lacks the batch.
    """
    if not isinstance(value, Value):
        raise UnsupportedModelError(f"output {show(name)!r} does not depend on the input.")
    dims = value.dims
    is_batch = lambda d: extent(d) == 1 if b.batch is None else d == (b.batch,)
    batch = next((i for i, d in enumerate(dims) if is_batch(d)), len(dims))
    rest = (*dims[:batch], *dims[batch + 1 :])
    image = len(rest) == 3 and layout == NCHW
    b.path = "output"
    return b.stored(value, (rest[1], rest[2], rest[0]) if image else rest)
