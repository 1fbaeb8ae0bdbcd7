"""From a quantized network and its float original to what is wrong with it, and what would help."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from dfq_jax.allocation.candidates import Judge, candidates, without_fine
from dfq_jax.allocation.diagnosis import Diagnosis, LayerCost, costs_alone, outcomes, worst_first
from dfq_jax.allocation.remedies import remedies_for
from dfq_jax.errors import DataError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.tasks import Task
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.passes.level import LEVEL
from dfq_jax.passes.thrifty_ranges import thrifty_ranges
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sites import Site
from dfq_jax.recipes.dfq import DEFAULT_SURGERY, levelling, operate
from dfq_jax.recipes.dfq_ranges import coarse_tensors
from dfq_jax.report.analyze import Report
from dfq_jax.report.judge import judge_of
from dfq_jax.synthesis.terms.targets import distrusted_norms

FEW = 4
"""Images by which the layers are blamed; all of them judge remedies."""
LOSSY = 0.05
"""Expected loss of top-1 beyond which layers are blamed."""
LOSSY_DB, DISAGREEING = 10.0, 0.9
"""Below this SQNR of the output, or agreement, a network has lost much."""
CLOSE = 1e-3
"""Relative difference of outputs below which two float networks are the same."""


def loses_much(report: Report) -> bool:
    """Whether the layers of a network are worth blaming: by its expected loss, if there is one."""
    if not report.passed:
        return True
    if report.estimate is not None:
        return report.estimate.loss > LOSSY
    return report.sqnr < LOSSY_DB or report.agreement < DISAGREEING


def blamed(
    reference: Model,
    quantized: QuantizedModel,
    images: Shaped[Array, "n ..."],
    so_far: Mapping[str, float],
    task: Task | None = None,
) -> tuple[LayerCost, ...]:
    """What each layer costs, in execution order; a forward pass on a few images for each."""
    made = without_fine(reference, quantized)
    few = images[:FEW]
    judge = judge_of(reference, task)
    return costs_alone(made, quantized.plan, few, judge, so_far=so_far, batch=FEW)


def diagnose(
    reference: Model,
    quantized: QuantizedModel,
    images: Shaped[Array, "n ..."],
    so_far: Mapping[str, float],
    *,
    judge: Judge | None = None,
    task: Task | None = None,
    watch: Watcher = SILENT,
) -> Diagnosis:
    """What each layer costs, and what each remedy would buy.

    Args:
      reference: the folded float network, node for node the quantized one.
      quantized: the network.
      images: normalised probes.
      so_far: {layer: SQNR of its output in dB, errors before it included}, where known.
      judge: what is thought of outputs; None for `report.judge.judge_of` the task.
      task: what the network is for; None for what its graph says.
      watch: told what is being done.
    """
    judge = judge_of(reference, task) if judge is None else judge
    watch.says("finding ranges of 8 bits")
    made = candidates(reference, quantized, images, expected=thrifty_ranges(reference), batch=FEW)
    watch.says("quantizing one layer at a time")
    plan, few = quantized.plan, images[:FEW]
    costs = costs_alone(made, plan, few, judge, so_far=so_far, batch=FEW)
    watch.says("trying remedies")
    remedies = remedies_for(reference, plan, [cost.name for cost in worst_first(costs)])
    now, found = outcomes(made, plan, remedies, images, judge, batch=FEW)
    return Diagnosis(costs, now, found, images.shape[0])


def reference_of(
    float_model: Model, quantized: QuantizedModel, images: Shaped[Array, "n ..."]
) -> Model:
    """The folded float network that a quantized one was made from.

    Args:
      float_model: with its batch norms, in whatever form it was saved.
      quantized: the network.
      images: normalised, to compare by where the forms differ.

    Returns:
      The float network on the graph of the quantized one.

    Raises:
      DataError: if they are not the same network.
    """
    whole: Model = operate(float_model, DEFAULT_SURGERY, distrusted=distrusted_norms(float_model))
    found = on_graph_of(quantized.model, whole, images)
    if found is not None and misfit(found, quantized) is None:
        return found
    levelled = on_graph_of(quantized.model, levelled_like(whole, quantized), images)
    name = None if levelled is None else misfit(levelled, quantized)
    if levelled is not None and name is None:
        return levelled
    told = "their outputs differ in float" if name is None else f"their kernels of {name!r} differ"
    raise DataError(f"{APART}: {told}.")


def on_graph_of(model: Model, whole: Model, images: Shaped[Array, "n ..."]) -> Model | None:
    """A float network on the graph of a quantized one; None if that computes something else there.

    Args:
      model: the quantized one's.
      whole: folded.
      images: to compare by where the graphs differ.
    """
    if whole.graph == model.graph:
        return whole
    found = adopted(whole, model)
    few = images[:FEW]
    pairs = zip(*(all_of(m, few) for m in (whole, found)), strict=True)
    return found if all(close(*map(np.asarray, pair)) for pair in pairs) else None


def close(exact: np.ndarray, same: np.ndarray) -> bool:
    """Whether an output of two float networks is the same."""
    return bool(np.abs(exact.reshape(same.shape) - same).max() <= CLOSE * np.abs(exact).max())


def levelled_like(whole: Model, quantized: QuantizedModel) -> Model:
    """The folded network with its channels on one width, as `recipes.dfq` does for few bits.

    The tensors of the quantized network are those at the same place.
    """
    nodes = zip(whole.graph.nodes, quantized.model.graph.nodes, strict=False)
    places = {theirs.name: ours.name for ours, theirs in nodes}
    coarse = tuple(places.get(tensor, tensor) for tensor in coarse_tensors(quantized.plan))
    return levelling(whole, LEVEL, only=coarse)[0]


def misfit(found: Model, quantized: QuantizedModel) -> str | None:
    """The first layer whose quantized kernel is nothing like its float one."""
    for node, kernel in kernels(quantized):
        ours = np.asarray(found.params[node.name]["kernel"], np.float64)
        if not np.sum((ours - kernel) ** 2) < np.sum(ours**2):
            return node.name
    return None


APART = "the float network saved beside this integer network is not the one it was made from"


@jax.jit
def all_of(model: Model, images: Shaped[Array, "n ..."]) -> tuple[Float[Array, "..."], ...]:
    """The outputs of a float network."""
    return evaluate(model, images)[0]


def kernels(quantized: QuantizedModel) -> list[tuple[Node, np.ndarray]]:
    """Every layer whose kernel is quantized, with that kernel."""
    nodes, params = quantized.model.graph.nodes, quantized.model.params
    stored = [n for n in nodes if quantized.plan.spec(Site(n.name)) is not None]
    return [(n, np.asarray(params[n.name]["kernel"], np.float64)) for n in stored]


def adopted(model: Model, other: Model) -> Model:
    """A network's parameters on another graph, whose nodes have them in the same order.

    Raises:
      DataError: if the graphs do not fit.
    """
    ours, theirs = ([n for n in m.graph.nodes if m.params.get(n.name)] for m in (model, other))
    fits = len(ours) == len(theirs) and all(
        same_shapes(model.params[a.name], other.params[b.name]) and type(a.op) is type(b.op)
        for a, b in zip(ours, theirs, strict=True)
    )
    if not fits:
        raise DataError(f"{APART}: their layers differ.")
    names = {a.name: b.name for a, b in zip(ours, theirs, strict=True)}
    params = {new: model.params[old] for old, new in names.items()}
    moments = {names[old]: m for old, m in model.moments.items() if old in names}
    return dataclasses.replace(other, params=params, moments=moments)


def same_shapes(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> bool:
    """Whether two sets of parameters are alike but for a bias, and axes of single numbers."""
    shapes = lambda slots: {k: v.shape * (v.size > 1) for k, v in slots.items() if k != "bias"}
    return shapes(ours) == shapes(theirs)
