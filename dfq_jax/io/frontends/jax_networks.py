"""Networks of JAX: Flax modules and functions in memory, through the program they trace to."""

from typing import Any

import jax
import numpy as np

from dfq_jax.graph.graph import Model
from dfq_jax.io.frontends.contracts import ToldInput
from dfq_jax.io.frontends.graph_files import UNTOLD, model_of
from dfq_jax.io.frontends.jax_live import image_shape, network_of
from dfq_jax.io.frontends.jax_trace import Traced, program_of, without_dead
from dfq_jax.io.frontends.parity import check_function
from dfq_jax.io.frontends.program import Program
from dfq_jax.io.importing.jax_named_norms import NormNames, groups_of_names, with_named_norms
from dfq_jax.io.importing.jax_norms import with_batch_norms
from dfq_jax.io.importing.jax_patterns import with_patterns
from dfq_jax.io.importing.jax_table import JAX

HALVES = ("float16", "bfloat16")


def load_network(
    source: Any,
    params: Any,
    example: Any,
    told: ToldInput = UNTOLD,
    *,
    unchecked: bool = False,
    batch_norms: NormNames | None = None,
) -> tuple[Model, tuple[str, ...]]:
    """A network of JAX, compared once with what it was imported from.

    Args:
      source: a Flax module, a callable pytree, or a function of parameters and images.
      params: its variables, None if it holds its own.
      example: an array of images or the shape of one, (height, width, channels).
      told: what the user says of its images.
      unchecked: do not run it beside what was imported.
      batch_norms: {role: name} of the parameters of batch norms whose arithmetic is not
        recognised; see `jax_named_norms.groups_of`.

    Returns:
      The network, and notes for the user.

    Raises:
      UsageError: for an object that is no network, or no example of its images.
      UnsupportedModelError: if it cannot be traced or imported.
      ImportParityError: if what was imported computes something else.
    """
    network, shape = network_of(source, params), image_shape(example)
    traced = program_of(network.function, network.params, shape, where=network.name)
    program = recognised(traced, batch_norms)
    model, notes = model_of(program, JAX, network.name, told)
    notes = (*program.notes, *notes)
    if unchecked:
        return model, notes

    def run(images: Any) -> list[Any]:
        outputs = jax.tree.leaves(network.function(network.params, images))
        return [outputs[i] for i in traced.kept]

    checked = check_function(model, run, shape, network.name, halves=in_halves(program))
    return model, (*notes, *checked)


def recognised(traced: Traced, batch_norms: NormNames | None = None) -> Program:
    """The program with batch norms and other operators that JAX spells out, and nothing unread."""
    program = traced.program
    if batch_norms is not None:
        groups = groups_of_names(program.paths, batch_norms)
        program = without_dead(with_named_norms(program, groups))
    program = without_dead(with_batch_norms(program, traced.shapes))
    return without_dead(with_patterns(program, traced.shapes))


def in_halves(program: Program) -> bool:
    """Whether a network computes in half precision anywhere."""
    dtypes = [array.dtype for array in program.arrays.values()]
    dtypes += [c.kwargs["new_dtype"] for c in program.calls if "new_dtype" in c.kwargs]
    return any(np.dtype(dtype).name in HALVES for dtype in dtypes)
