"""Networks of JAX in memory: Flax modules, callable pytrees, functions with parameters."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dfq_jax.errors import UsageError
from dfq_jax.io.readers.pickle_policy import show

EVALUATING = {
    "train": False,
    "training": False,
    "is_train": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
    "inference": True,
}
"""Arguments by which networks are told that they do not learn."""
ACCEPTED = (
    "a path or a built-in name; a torch.nn.Module or torch.export.ExportedProgram; a flax.linen "
    "module with its variables, load(module, variables, example=(height, width, channels)); a "
    "flax.nnx module, load(model, example=...); or any function(params, images) that JAX can "
    "trace, load(function, params, example=...)"
)

Shape = tuple[int, ...]


class PureNetwork(NamedTuple):
    """A pure function of parameters and images, in evaluation mode.

    Attributes:
      function: of (params, images).
      params: a pytree of arrays.
      name: what messages call it.
    """

    function: Callable[[Any, Any], Any]
    params: Any
    name: str


def is_torch(source: Any) -> bool:
    """Whether an object is one of PyTorch's, without importing it."""
    return any(c.__module__.partition(".")[0] == "torch" for c in type(source).__mro__)


def network_of(source: Any, params: Any) -> PureNetwork:
    """The function that a network of JAX is.

    Args:
      source: a Flax module, a callable pytree such as an Equinox module, or a function.
      params: variables of a linen module, or what the function is given first; None if the source
        holds its own.

    Returns:
      The function; the source is left as it was.

    Raises:
      UsageError: for any other object, or parameters that are missing or superfluous.
    """
    name = getattr(source, "__name__", type(source).__name__)
    if is_a(source, "flax.linen", "Module"):
        return of_linen(source, params, name)
    owner = getattr(source, "__self__", None)
    if getattr(source, "__name__", "") == "apply" and is_a(owner, "flax.linen", "Module"):
        return of_linen(owner, params, type(owner).__name__)
    if is_a(source, "flax.nnx", "Module"):
        return of_nnx(source, params, name)
    if not callable(source) or isinstance(source, type):
        what = f"the class {name}" if isinstance(source, type) else f"an object of type {name}"
        raise UsageError(f"{what} is no network that can be loaded; give {ACCEPTED}.")
    if params is not None:
        flags = evaluating(source, skipped=2)
        return PureNetwork(lambda p, x: source(p, x, **flags), params, name)
    return of_pytree(source, name)


def is_a(source: Any, package: str, name: str) -> bool:
    """Whether an object is of a class of that name in a package, which is not imported for it."""
    return any(
        c.__name__ == name and f"{c.__module__}.".startswith(f"{package}.")
        for c in type(source).__mro__
    )


def of_linen(module: Any, variables: Any, name: str) -> PureNetwork:
    """A `flax.linen` module with its variables, or one bound to them."""
    if module.scope is not None:
        module, bound = module.unbind()
        variables = bound if variables is None else variables
    if variables is None:
        raise UsageError(
            f"{name} is a flax.linen module, whose weights lie beside it; give its variables: "
            "load(module, variables, example=(height, width, channels))."
        )
    if "params" not in variables:
        variables = {"params": variables}
    flags = evaluating(type(module).__call__, skipped=2)
    return PureNetwork(lambda v, x: module.apply(v, x, **flags), variables, name)


def of_nnx(module: Any, params: Any, name: str) -> PureNetwork:
    """A `flax.nnx` module: a copy of it is set to evaluate."""
    from flax import nnx

    if params is not None:
        raise UsageError(
            f"{name} is a flax.nnx module and holds its weights; leave out params, and give the "
            "shape of an image by name: example=(224, 224, 3)."
        )
    copy = nnx.merge(*nnx.split(module))
    copy.eval()
    definition, state = nnx.split(copy)
    flags = evaluating(type(module).__call__, skipped=2)
    return PureNetwork(lambda s, x: nnx.merge(definition, s)(x, **flags), state, name)


def of_pytree(source: Any, name: str) -> PureNetwork:
    """A function without parameters, or a callable pytree whose arrays are its parameters."""
    leaves = jax.tree.leaves(source)
    if len(leaves) == 1 and leaves[0] is source:
        flags = evaluating(source, skipped=1)
        return PureNetwork(lambda _, x: source(x, **flags), (), name)
    flags = evaluating(type(source).__call__, skipped=2)
    params = jax.tree.map(lambda a: a if is_array(a) else None, source)
    others = jax.tree.map(lambda a: None if is_array(a) else a, source)
    absent = lambda a: a is None

    def function(given: Any, images: Any) -> Any:
        both = jax.tree.map(lambda a, o: o if a is None else a, given, others, is_leaf=absent)
        return both(images, **flags)

    return PureNetwork(function, params, name)


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a pytree is an array, and no setting."""
    return isinstance(leaf, jax.Array | np.ndarray)


def evaluating(function: Callable[..., Any], *, skipped: int) -> dict[str, bool]:
    """Those of a function's arguments, after the first ones, that say whether it learns."""
    try:
        names = list(inspect.signature(function).parameters)[skipped:]
    except (TypeError, ValueError):  # functions of other languages have no signature
        return {}
    return {name: EVALUATING[name] for name in names if name in EVALUATING}


def image_shape(example: Any) -> Shape:
    """The shape of a batch of one image.

    Args:
      example: an array of images, or a shape: (height, width, channels) of one image, the same
        with a batch before it, or (batch, features).

    Raises:
      UsageError: for anything else.
    """
    shape = getattr(example, "shape", example)
    sizes = [int(n) for n in shape] if is_shape(shape) else []
    if len(sizes) == 3 and shape is example:
        sizes = [1, *sizes]
    if len(sizes) not in (2, 4):
        raise UsageError(
            f"the example is {show(repr(example), 80)}; give the shape of one image, such as "
            "(224, 224, 3), or an array of shape (1, height, width, channels)."
        )
    return (1, *sizes[1:])


def is_shape(shape: Any) -> bool:
    """Whether something is a list of positive numbers."""
    return isinstance(shape, tuple | list) and all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) and n > 0 for n in shape
    )
