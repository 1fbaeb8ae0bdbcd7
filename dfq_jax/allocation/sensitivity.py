"""What fewer bits of one kernel or tensor cost, all else in float: predicted from images alone.

Every method predicts the same quantity, how far the outputs move from the float network's as its
task counts it (`quantization/outputs.py`): of classes the divergence of their probabilities in
nats. So their numbers can be compared. All entries look at the same images.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from dfq_jax.allocation.choices import Space
from dfq_jax.base.words import Sensitivity
from dfq_jax.errors import PlanError, check_choice
from dfq_jax.graph.evaluate import Hook, Slots, Tensor
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.heads import Part
from dfq_jax.graph.tasks import Task, parts_of
from dfq_jax.numerics.affine import Steps, snapped
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.quantization.calibrate import (
    Ranges,
    batches,
    fit_edges,
    fit_kernels,
    histograms_of,
    steps_by_site,
)
from dfq_jax.quantization.outputs import PartValues, cost_probe, output_cost, parts_outputs
from dfq_jax.quantization.sites import Site

SENSITIVITIES: tuple[Sensitivity, ...] = get_args(Sensitivity)
DRAWS = 16
"""Random probes of the curvature for each batch of images."""

Owners = tuple[tuple[Site, int], ...]
NamedSites = tuple[tuple[Site, str], ...]
Lattices = Mapping[Site, Steps]
"""{site: its grids, one for each candidate along the first axis}."""


class Aim(NamedTuple):
    """What the outputs are judged by; hashable.

    Attributes:
      parts: of the outputs.
      task: what they are for; None for what the graph says.
    """

    parts: tuple[Part, ...]
    task: Task | None


class SensitivityQuestion(NamedTuple):
    """What is asked of every batch of images; hashable.

    Attributes:
      owners: sites with the index of their choice.
      names: sites with what they hold.
      aim: what the outputs are judged by.
    """

    owners: Owners
    names: NamedSites
    aim: Aim

    @property
    def choices(self) -> int:
        """How many there are."""
        return max(choice for _, choice in self.owners) + 1


class OnLattices(NamedTuple):
    """A network with the grids that its sites could have.

    Attributes:
      model: folded float network.
      lattices: of every site that can be chosen.
    """

    model: Model
    lattices: Lattices

    @property
    def levels(self) -> int:
        """Candidates of each site."""
        return len(next(iter(self.lattices.values())).scale)


def sensitivities(
    model: Model,
    space: Space,
    images: Shaped[Array, "n ..."],
    *,
    method: Sensitivity = "kl",
    key: Key[Array, ""],
    expected: Ranges | None = None,
    widen: bool = True,
    batch: int = 32,
    task: Task | None = None,
    watch: Watcher = SILENT,
) -> Float[np.ndarray, "choices bits"]:
    """The predicted cost of every candidate of every choice.

    Args:
      model: folded float network.
      space: what can be chosen; its plans say how ranges are found.
      images: normalised, e.g. synthetic.
      method: `kl`: quantize one choice at a time and measure. `fisher`: half the squared rounding
        error, weighted by the diagonal of the Fisher matrix. `trace`: half the squared rounding
        error times the mean of that diagonal, the average trace of the Hessian.
      key: for the probes of `fisher` and `trace`.
      expected: ranges known without images, as `calibrate` takes them.
      widen: let grids of 8 bits cover what is expected too.
      batch: images per forward pass; the last overlaps its predecessor if need be.
      task: what the network is for; None for what its graph says.
      watch: told which batch is at work.

    Returns:
      Costs as `quantization.outputs.cost` has them: never negative, and never rising with the
      number of bits.

    Raises:
      PlanError: if the method is unknown, there are no images, or an entry is not finite.

    Reference:
      Cai et al. 2020, "ZeroQ: A Novel Zero Shot Quantization Framework" (`kl`); Dong et al.
      2020, "HAWQ-V2" (`trace`); Li et al. 2021, "BRECQ" (`fisher`).
    """
    check_choice("sensitivity", method, SENSITIVITIES, PlanError)
    lattices = lattices_of(model, space, images, batch, expected=expected, widen=widen)
    measure = measured if method == "kl" else partial(curved, key=key, mean=method == "trace")
    asked = question_of(space, Aim(parts_of(model, task), task))
    subject, tables = OnLattices(model, lattices), []
    for number, x in enumerate(batches(images, min(batch, len(images)))):
        watch.says(f"sensitivities ({method}), batch {number + 1}")
        tables.append(measure(asked, subject, x, number))
    table = np.mean(np.stack(tables), axis=0)
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise PlanError(
            f"the sensitivity of {space.choices[row].name!r} at {space.bits[column]} bits is not "
            "finite: the network or the images hold values that are not, or far too large ones."
        )
    return np.minimum.accumulate(np.maximum(table, 0.0), axis=1)


def question_of(space: Space, aim: Aim) -> SensitivityQuestion:
    """What is asked about the choices of a space."""
    owners = tuple(space.owners.items())
    tensors = {site: tensor for tensor, sites in space.plans[0].groups for site in sites}
    names = tuple((site, tensors.get(site, f"kernel of {site.node}")) for site, _ in owners)
    return SensitivityQuestion(owners, names, aim)


def lattices_of(
    model: Model,
    space: Space,
    images: Shaped[Array, "n ..."],
    batch: int,
    *,
    expected: Ranges | None = None,
    widen: bool = True,
) -> Lattices:
    """The grids of every site that can be chosen, fitted as `calibrate` fits them."""
    histograms = histograms_of(model, space.plans[0], images, batch)
    found: dict[Site, list[Steps]] = {site: [] for site in space.owners}
    for plan in space.plans:
        edges = fit_edges(model, plan, histograms, expected or {}, widen=widen)
        all_steps = steps_by_site(model, plan, {**edges, **fit_kernels(model, plan, edges)})
        for site, steps in found.items():
            steps.append(all_steps[site])
    return {site: jax.tree.map(lambda *s: jnp.stack(s), *steps) for site, steps in found.items()}


def measured(
    asked: SensitivityQuestion, subject: OnLattices, x: Tensor, number: int
) -> Float[np.ndarray, "choices bits"]:
    """How far each candidate moves the outputs on a batch; one program for all of them."""
    del number
    exact = outputs_of(subject.model, x, asked.aim.parts)
    table = [
        [moved(asked, subject, x, exact, choice, level) for level in indices(subject.levels)]
        for choice in indices(asked.choices)
    ]
    return np.asarray(table, np.float64)


def indices(count: int) -> list[Array]:
    """The first whole numbers as arrays, so that programs are not compiled for each."""
    return [jnp.asarray(i, jnp.int32) for i in range(count)]


@partial(jax.jit, static_argnames="parts")
def outputs_of(model: Model, x: Tensor, parts: tuple[Part, ...]) -> PartValues:
    """All outputs of the float network."""
    return parts_outputs(model, x, parts)


@partial(jax.jit, static_argnames="asked")
def moved(
    asked: SensitivityQuestion,
    subject: OnLattices,
    x: Tensor,
    exact: PartValues,
    choice: Array,
    level: Array,
) -> Float[Array, ""]:
    """How far the outputs move if only one choice is quantized, at one candidate."""
    owners, aim = dict(asked.owners), asked.aim

    def one(site: Site, value: Tensor) -> Tensor:
        if site not in owners:
            return value
        steps = jax.tree.map(lambda part: part[level], subject.lattices[site])
        return jnp.where(owners[site] == choice, snapped(value, steps), value)

    rough = parts_outputs(subject.model, x, aim.parts, editing(one))
    return output_cost(aim.parts, exact, rough, aim.task)


def editing(edit: Callable[[Site, Tensor], Tensor]) -> Hook:
    """The hook that edits kernels and arguments, told the site of each."""

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        if "kernel" in slots:
            slots = {**slots, "kernel": edit(Site(node.name), slots["kernel"])}
        return slots, tuple(edit(Site(node.name, i), x) for i, x in enumerate(args))

    return hook


def curved(
    asked: SensitivityQuestion,
    subject: OnLattices,
    x: Tensor,
    number: int,
    *,
    key: Key[Array, ""],
    mean: bool,
) -> Float[np.ndarray, "choices bits"]:
    """The second-order prediction of what each candidate costs on a batch."""
    keys = jax.random.split(jax.random.fold_in(key, number), DRAWS)
    draws = [weighed(asked, subject, x, k, mean=mean) for k in keys]
    return np.mean(np.asarray(draws, np.float64), axis=0)


@partial(jax.jit, static_argnames=("asked", "mean"))
def weighed(
    asked: SensitivityQuestion, subject: OnLattices, x: Tensor, key: Key[Array, ""], *, mean: bool
) -> Float[Array, "choices bits"]:
    """One draw of half the squared rounding error, weighted by the curvature.

    Args:
      asked: what of which sites.
      subject: the network with their grids.
      x: images.
      key: for the probe.
      mean: weigh every element of a kernel or tensor by their mean.

    Returns:
      `1/2 sum_i g_i^2 d_i^2` for the slopes `g` and the rounding errors `d` of each candidate.
    """
    seen, slopes = slopes_of(subject.model, asked.names, x, key, asked.aim)
    owners, levels = dict(asked.owners), subject.levels
    table = jnp.zeros((asked.choices, levels), jnp.float32)
    for name, (site, value) in seen.items():
        power = slopes[name] ** 2
        weight = jnp.mean(power) if mean else power
        steps = subject.lattices[site]
        error = jax.vmap(lambda steps, v=value: (snapped(v, steps) - v) ** 2)(steps)
        losses = jnp.sum((weight * error).reshape(levels, -1), axis=1)
        table = table.at[owners[site]].add(losses / 2)
    return table


def slopes_of(
    model: Model, names: NamedSites, x: Tensor, key: Key[Array, ""], aim: Aim
) -> tuple[dict[str, tuple[Site, Tensor]], dict[str, Tensor]]:
    """One draw of what the divergence's curvature does to every kernel and tensor.

    With `J` the Jacobian of the outputs and `r` a probe of the curvature `L` of their cost,
    `g = J^T r` has `E[g g^T] = J^T L J`: the Hessian of the divergence at the float network, which
    is its Gauss-Newton matrix there. One backward pass serves all. Hutchinson's `v (H v)` for
    all layers at once has the same mean, but the noise of every layer in each: in a small residual
    network a draw strays by 4.4 times a small layer's trace and is negative in 4 of 10 draws, while
    `g^2` strays by 0.7 and never is. It would also need second derivatives of the convolutions.

    Args:
      model: folded float network.
      names: sites with what they hold; edges of one name and shape hold the same values.
      x: images.
      key: for the probe.
      aim: what the outputs are judged by.

    Returns:
      {name and shape: (first site, its values)}, and {name and shape: g}.
    """
    held = dict(names)
    seen: dict[str, tuple[Site, Tensor]] = {}

    def shifted(shifts: Mapping[str, Tensor], found: dict[str, tuple[Site, Tensor]]) -> PartValues:
        def shift(site: Site, value: Tensor) -> Tensor:
            if site not in held:
                return value
            name = f"{held[site]} {value.shape}"
            found.setdefault(name, (site, value))
            return value + shifts.get(name, 0.0)

        return parts_outputs(model, x, aim.parts, editing(shift))

    outputs = shifted({}, seen)
    zeros = {name: jnp.zeros_like(value) for name, (_, value) in seen.items()}
    _, pull = jax.vjp(lambda shifts: shifted(shifts, {}), zeros)
    return seen, pull(cost_probe(aim.parts, key, outputs, aim.task))[0]
