"""Channels that are pruned by scales which learn: one factor for all that can only go together.

    y = s ((x - mu) / sqrt(var + eps) gamma + beta)

`s = 0` silences a channel with its bias, so what is cut afterwards was not heard before. All norms
that a sum joins share one `s`: the factor belongs to a set of the network's coupling.

Reference:
  Zhu et al. 2020, "Towards Accurate Quantization and Pruning via Data-free Knowledge Transfer",
  structured pruning.
"""

import dataclasses
import math
import time
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.coupling import Coupling
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.graph.query import batch_norms, output_shapes
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.optim.state import NOWHERE, Place
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.select import select
from dfq_jax.pruning.groups import Subject
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.engine import TrainingSetup, learned_by, taught_of
from dfq_jax.training.images import Course
from dfq_jax.training.in_float import NO_LEVELS, norms_following
from dfq_jax.training.method import Training
from dfq_jax.training.student import StudentKind, StudentStart, unfolded_student
from dfq_jax.training.suits import check_classes
from dfq_jax.values import bound


class PrunedByScales(NamedTuple):
    """A network that lost the channels whose scales were small.

    Attributes:
      model: what is left, its norms in place.
      scales: of every set of the coupling.
      kept: which sets are left.
      seconds: spent.
      notes: what went wrong on the way.
    """

    model: Model
    scales: Float[np.ndarray, " sets"]
    kept: Bool[np.ndarray, " sets"]
    seconds: float
    notes: tuple[str, ...]


def gates_of(coupled: Coupling, model: Model) -> dict[str, Int[Array, " c"]]:
    """{norm: number of the set of each of its channels}, of norms that have a scale and a bias."""
    found = {}
    for node in batch_norms(model.graph):
        slots = model.params.get(node.name, {})
        if isinstance(node.op, BatchNorm) and {"scale", "bias"} <= set(slots):
            numbers = coupled.slots.get(node.name, {}).get("scale")
            if numbers is not None and numbers[-1].any():
                found[node.name] = jnp.asarray(numbers[-1], jnp.int32)
    return found


def widths_of_maps(coupled: Coupling, model: Model) -> Float[np.ndarray, " sets"]:
    """How wide the feature maps of every set are: the root of their positions, at most."""
    shapes, found = output_shapes(model), np.ones(len(coupled))
    for name, axes in coupled.tensors.items():
        if axes and axes[-1].any() and len(shapes[name]) == 4:
            wide = math.sqrt(shapes[name][1] * shapes[name][2])
            at = np.unique(axes[-1][axes[-1] > 0]) - 1
            found[at] = np.maximum(found[at], wide)
    return found


def scale_penalty(weight: float, widths: Float[np.ndarray, " sets"]) -> Term:
    """`sum_l gamma_l |s_l|_1` with `gamma_l = gamma / w_l`: narrow maps cost less to keep."""
    return Term("scales", weight, bound(l1_of_gates, 1 / widths))


def l1_of_gates(factors: np.ndarray, x: PyTree) -> Float[Array, ""]:
    """What `scale_penalty` weighs."""
    gates = x["gates"]["channels"]
    return jnp.sum(jnp.abs(gates) * jnp.asarray(factors[: len(gates)], jnp.float32))


def pruned_by_scales(
    model: Model,
    images: Float[Array, "n h w c"],
    method: Training,
    key: Key[Array, ""],
    *,
    scales: float = 2e-3,
    threshold: float = 0.1,
    place: Place = NOWHERE,
    watch: Watcher = SILENT,
) -> PrunedByScales:
    """Trains a network with scales of its channels, and removes those that became small.

    Args:
      model: with its batch norms in place; it is the teacher too.
      images: normalised; a generator learns from none, and then norms keep their statistics.
      method: e.g. `recipes.zhu_pruning`.
      key: the only source of randomness.
      scales: gamma, the weight of the scales' absolute values.
      threshold: t_s; a set of channels goes where its scale is smaller. One stays of each layer.
      place: keeps the state here and resumes from it.
      watch: told how far it is.

    Raises:
      UnsupportedModelError: if no norm scales channels that may go.
      UsageError: as of `trained`.
      DivergedError: likewise.
    """
    began, coupled = time.perf_counter(), Subject(model).coupled
    if not (gates := gates_of(coupled, model)):
        raise UnsupportedModelError(
            "no batch norm with a scale and a bias makes channels that may go: choose them by "
            "another criterion."
        )
    whole = fold_batch_norm(model)
    check_classes(method, whole)
    penalty = scale_penalty(scales, widths_of_maps(coupled, model))
    method = method._replace(student=StudentKind(live=True), penalties=(penalty,))
    start = StudentStart(model, {}, gates=gates)
    setup = TrainingSetup(images, images[:0], key, place=place, watch=watch)
    taught = taught_of(method, whole, model, start, images, setup.terms_key)
    learned = learned_by(Course(method, NO_LEVELS), taught, setup)
    made = dataclasses.replace(unfolded_student(learned.x, start), moments={})
    made = norms_following(model, made, images) if len(images) else made
    found = np.ones(len(coupled))
    learned_scales = np.abs(np.asarray(learned.x["gates"]["channels"]))
    found[: len(learned_scales)] = learned_scales
    kept = standing_sets(coupled, found, threshold)
    seconds = time.perf_counter() - began
    return PrunedByScales(select(made, coupled, kept), found, kept, seconds, learned.notes)


def standing_sets(
    coupled: Coupling, scales: Float[np.ndarray, " sets"], threshold: float
) -> Bool[np.ndarray, " sets"]:
    """Which sets stay: those of scales that are not small, and the largest of each group."""
    kept = scales >= threshold
    for numbers in coupled.groups().values():
        members = np.array(numbers)
        kept[members[np.argmax(scales[members])]] = True
    return kept
