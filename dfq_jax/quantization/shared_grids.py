"""Where several tensors live on one grid, and what that costs the small ones.

What a concatenation joins is read on one grid, and so are the pieces that are cut out of a tensor:
next to values in the hundreds, values below 1 all become 0. The inputs of a sum are no such case;
each has a grid of its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import Concat, Slice
from dfq_jax.graph.query import output_shapes
from dfq_jax.numerics.affine import Affine, fake_quantize
from dfq_jax.numerics.histogram import empty, extend
from dfq_jax.numerics.ranges import activation_affine
from dfq_jax.quantization.plan import Spec
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sites import ABSORBED, Site

COSTLY = 20.0
"""Loss of a part in dB from which on it is told: a grid with ten times the step."""

MOST_IMAGES = 8
CLEAREST = 100.0
"""dB that stand for no error at all."""

Shape = tuple[int, ...]


class GridPart(NamedTuple):
    """What shares a grid.

    Attributes:
      tensor: whose grid it is.
      site: an edge on that grid.
      name: of the part.
      source: the tensor in which its values lie.
      block: (axis, first, behind the last) of them there; None for all.
    """

    tensor: str
    site: Site
    name: str
    source: str
    block: tuple[int, int, int] | None


class SharedGrid(NamedTuple):
    """A part that a shared grid costs much.

    Attributes:
      tensor: whose grid it is.
      part: the tensor that suffers.
      own_db: SQNR of the part in dB on a grid of its own with as many bits.
      shared_db: SQNR of the part in dB on the shared grid.
    """

    tensor: str
    part: str
    own_db: float
    shared_db: float

    @property
    def db_lost(self) -> float:
        """What sharing costs the part, in dB."""
        return self.own_db - self.shared_db

    def to_dict(self) -> dict[str, str | float]:
        """Plain JSON data."""
        return {**self._asdict(), "db_lost": self.db_lost}


def shared_grids(
    quantized: QuantizedModel, images: Shaped[Array, "n ..."], *, least: float = COSTLY
) -> tuple[SharedGrid, ...]:
    """The parts that lose much on a grid that they share.

    Args:
      quantized: the network with its grids.
      images: normalised; the first few are looked at, and only where grids are shared at all.
      least: loss in dB from which on a part counts.

    Returns:
      Those parts, the greatest loss first.
    """
    parts = parts_of(quantized.model, quantized.plan.groups)
    if not parts:
        return ()
    table = quantized.plan.table
    specs = tuple(table[part.site] for part in parts)
    shared = [quantized.qparams[part.site] for part in parts]
    measured = energies_of(quantized.model, parts, specs, shared, images[:MOST_IMAGES])
    energies = np.asarray(measured, np.float64)
    found = [
        SharedGrid(part.tensor, part.name, fidelity(signal, own), fidelity(signal, noise))
        for part, (signal, own, noise) in zip(parts, energies, strict=True)
        if signal > 0
    ]
    costly = [x for x in found if x.db_lost > least]
    return tuple(sorted(costly, key=lambda x: -x.db_lost))


def fidelity(signal: float, noise: float) -> float:
    """SQNR in dB, `CLEAREST` at most."""
    return float(min(10 * np.log10(signal / max(noise, 1e-30)), CLEAREST))


def parts_of(model: Model, groups: Iterable[tuple[str, tuple[Site, ...]]]) -> tuple[GridPart, ...]:
    """Every part of every grid that several tensors share, in the order of the groups."""
    nodes, shapes = model.graph.by_name, output_shapes(model)
    found: list[GridPart] = []
    for tensor, sites in groups:
        found += joined(nodes, shapes, tensor, sites[0])
        cuts = [s.node for s in sites if isinstance(nodes[s.node].op, Slice)]
        found += [GridPart(tensor, sites[0], name, name, None) for name in cuts]
    return tuple(found)


def joined(
    nodes: Mapping[str, Node], shapes: Mapping[str, Shape], tensor: str, site: Site
) -> Iterator[GridPart]:
    """The parts of a concatenation, or of what is absorbed into one."""
    name = tensor
    while name in nodes and isinstance(nodes[name].op, ABSORBED):
        name = nodes[name].inputs[0]
    if name not in nodes or not isinstance(join := nodes[name].op, Concat):
        return
    axis, end = join.axis % len(shapes[name]), 0
    for part in leaves(nodes, name, axis):
        begin, end = end, end + shapes[part][axis]
        yield GridPart(tensor, site, part, tensor, (axis, begin, end))


def leaves(nodes: Mapping[str, Node], name: str, axis: int) -> Iterator[str]:
    """What a concatenation joins, through concatenations along the same axis."""
    for source in nodes[name].inputs:
        node = nodes.get(source)
        if node is not None and node.op == Concat(axis):
            yield from leaves(nodes, source, axis)
        else:
            yield source


@partial(jax.jit, static_argnames=("parts", "specs"))
def energies_of(
    model: Model,
    parts: tuple[GridPart, ...],
    specs: tuple[Spec, ...],
    shared: list[Affine],
    images: Shaped[Array, "n ..."],
) -> Float[Array, "parts 3"]:
    """Mean square of each part, and of its errors on a grid of its own and on the shared one."""
    _, values = evaluate(model, images, taps={part.source for part in parts})
    rows = []
    for part, spec, affine in zip(parts, specs, shared, strict=True):
        x = values[part.source]
        if part.block is not None:
            x = lax.slice_in_dim(x, part.block[1], part.block[2], axis=part.block[0])
        error = lambda on, x=x, grid=spec.grid: jnp.mean((x - fake_quantize(x, on, grid)) ** 2)
        rows.append([jnp.mean(x**2), error(own_affine(x, spec)), error(affine)])
    return jnp.array(rows)


def own_affine(x: Float[Array, "..."], spec: Spec) -> Affine:
    """The grid that calibration would have given these values alone."""
    low, high = jnp.minimum(jnp.min(x), 0.0), jnp.maximum(jnp.max(x), 0.0)
    return activation_affine(extend(empty(low, high), x, low, high), spec.grid, spec.observer)
