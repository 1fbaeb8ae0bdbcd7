"""Layers solved in closed form: rounded by the Gram matrix of what they read, no gradient steps.

The float weights are first replaced by those that do to quantized inputs what they did to exact
ones, then rounded input by input (OBQ), then polished (`numerics.second_order`). A convolution is
a linear layer over unfolded windows; every group is a layer of its own.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dfq_jax.graph.channels import groups_of
from dfq_jax.graph.graph import Model
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import Affine, Grid, fake_quantize
from dfq_jax.numerics.channels import by_group
from dfq_jax.numerics.second_order import (
    Lattice,
    best_scale,
    lattice,
    polished,
    rounded_in_order,
    transported,
)
from dfq_jax.quantization.plan import Plan, Site
from dfq_jax.quantization.second_moments import (
    ExactAndRough,
    Grams,
    WindowLayer,
    moments_of,
)

INSIDE = 0.49
"""How far from its code, in steps, a weight may lie without leaving it."""
FEWEST = 64
"""Images that are looked at, however many positions they have."""


class ClosedForm(NamedTuple):
    """A method without gradient steps.

    Attributes:
      name: as in reports.
      damping: pull of the transported weights towards the float ones, in units of the mean power
        of an input; None leaves them as they are.
      sweeps: of the polish; 0 for none.
      positions: of what a unit puts out, over all images, that are enough to see; images beyond
        them, but for `FEWEST`, are left out. None for all.
    """

    name: str = "closed_form"
    damping: float | None = 1.0
    sweeps: int = 2
    positions: int | None = None

    def images(self, count: int, each: int) -> Int[np.ndarray, " m"]:
        """Which of so many images of so many positions are looked at, drawn without a seed."""
        if self.positions is None:
            return np.arange(count)
        enough = max(FEWEST, self.positions // max(each, 1))
        return np.sort(np.random.default_rng(count).permutation(count)[:enough])


def solved(
    model: Model,
    qparams: Mapping[Site, Affine],
    plan: Plan,
    read: Iterable[ExactAndRough],
    method: ClosedForm,
) -> tuple[Model, Mapping[Site, Affine]]:
    """A layer on its grid.

    Args:
      model: the layer, its kernel not rounded, with what it absorbs.
      qparams: its scales.
      plan: its share of the plan.
      read: batches of its inputs: in the quantized network, not rounded to the layer's own grid
        yet, and in the float network.
      method: what to do.

    Returns:
      The layer and its scales; as they were if it cannot be solved. Weights keep as much of what
      they stand for as rounding to nearest lets them, for methods that go on from here.
    """
    node = model.graph.nodes[0]
    site = Site(node.name)
    spec = plan.spec(site)
    if spec is None or not isinstance(node.op, WindowLayer):
        return model, qparams
    data = Site(node.name, 0)
    edge = plan.spec(data)
    inputs = None if edge is None else (qparams[data], edge.grid)
    slots = model.params[node.name]
    kernel, groups = slots["kernel"], groups_of(node.op)
    moments, samples = moments_of(node.op, kernel.shape, read, inputs)
    left = left_for_kernels(moments, samples, biased="bias" in slots)
    near, affine = solve(kernel, qparams[site], left, spec.grid, groups, method)
    new = {"kernel": near}
    if "bias" in slots:
        hard = fake_quantize(near, affine, spec.grid)
        new["bias"] = slots["bias"] + mean_shift(kernel, hard, moments, groups)
    return with_params(model, {node.name: new}), {**qparams, site: affine}


@partial(jax.jit, static_argnames="biased")
def left_for_kernels(moments: Grams, samples: Float[Array, ""], *, biased: bool) -> Grams:
    """The moments by which kernels are chosen."""
    left = moments.centred() if biased else moments
    return left.shrunk(left.gram.shape[-1] / samples)


@partial(jax.jit, static_argnames="groups")
def mean_shift(
    kernel: Float[Array, "..."], hard: Float[Array, "..."], moments: Grams, groups: int
) -> Float[Array, " chan"]:
    """What a bias must add for the mean outputs to be the exact ones."""
    gap = jnp.einsum("gk,gko->go", moments.wanted, by_group(kernel, groups))
    return (gap - jnp.einsum("gk,gko->go", moments.mean, by_group(hard, groups))).reshape(-1)


@partial(jax.jit, static_argnames=("grid", "groups", "method"))
def solve(
    kernel: Float[Array, "..."],
    affine: Affine,
    moments: Grams,
    grid: Grid,
    groups: int,
    method: ClosedForm,
) -> tuple[Float[Array, "..."], Affine]:
    """The kernel where it rounds to what was found, and its scales.

    Args:
      kernel: HWIO, or (in, out) of a linear layer.
      affine: its scales; one for all outputs, and those of groups, stay as they are.
      moments: of its inputs.
      grid: its codes.
      groups: of channels.
      method: what to do.

    Returns:
      Kernel and scales.
    """
    weights, cells = by_group(kernel, groups), lattice(affine, grid, kernel.shape)
    cells = Lattice(*(by_group(v, groups) for v in cells))
    shared = affine.scale.size < kernel.shape[-1]
    stays = shared or grid.group is not None
    if shared:
        method = method._replace(sweeps=0)  # the polish goes on to scales of each output's own
    codes, scale, target = jax.vmap(partial(one_group, method=method))(weights, moments, cells)
    if stays:
        scale = cells.scale
    near = jnp.clip(target / scale, codes - INSIDE, codes + INSIDE) * scale
    fitted = affine.scale
    if not stays:
        fitted = jnp.moveaxis(scale, 0, 1).reshape(affine.scale.shape)
    return jnp.moveaxis(near, 0, 1).reshape(kernel.shape), Affine(fitted, affine.zero_point)


def one_group(
    w: Float[Array, "k o"], moments: Grams, cells: Lattice, *, method: ClosedForm
) -> tuple[Float[Array, "k o"], Float[Array, "r o"], Float[Array, "k o"]]:
    """Codes and scales of one group, and the weights they stand for."""
    target = w
    if method.damping is not None:
        target = transported(w, moments.gram, moments.cross, method.damping)
    codes = rounded_in_order(target, moments.gram, cells)
    if method.sweeps:
        return *polished(codes, target, moments.gram, cells, method.sweeps), target
    if cells.scale.shape[0] > 1:
        return codes, cells.scale, target
    fitted = best_scale(codes, target, moments.gram)
    return codes, jnp.where(fitted > 0, fitted, cells.scale), target
