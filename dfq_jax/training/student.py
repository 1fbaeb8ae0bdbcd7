"""A quantized network apart in what is trained and what is not, and put together again.

The student runs on the one evaluator with a hook, as the simulator does; what differs is the slope
of rounding and where levels come from. It begins as a `QuantizedModel` and ends as one, so that
export, verification and reports know nothing of training.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, PyTree

from dfq_jax.graph.evaluate import Hook, chained
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import WEIGHTED, BatchNorm
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.semantics import Slots, Tensor
from dfq_jax.numerics.levels import Parameters, codes_of
from dfq_jax.numerics.signs import Alpha
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import guard_biases
from dfq_jax.quantization.plan import Plan, Spec
from dfq_jax.quantization.simulate import QParams, QuantizedModel, snap_bias
from dfq_jax.quantization.sites import Site
from dfq_jax.training.batch_norms import by_batch
from dfq_jax.training.level_rules import DONE, LevelRule, Share, as_calibrated, min_max
from dfq_jax.training.tracking import (
    BYTE,
    TrackedRanges,
    Tracking,
    grouped,
    ranged_parameters,
    spec_of,
)
from dfq_jax.training.widths import widths_at_first

TRAINED: Mapping[type, tuple[str, ...]] = {
    **dict.fromkeys(WEIGHTED, ("kernel", "bias")),
    BatchNorm: ("scale", "bias"),
}
"""{operator: its parameters that are trained}; statistics of batch norms never are."""
KernelView = Callable[[Tensor, Tensor, Share], Tensor]
"""(kernel, as it was at the start, share of the steps that are taken) -> what of it meets its
levels."""


class StudentKind(NamedTuple):
    """What a student is.

    Attributes:
      kernels: how kernels meet their levels.
      edges: how activations do, on grids of fewer than 8 bits; wider ones stay as calibrated.
      live: batch norms have scales and biases of their own that are trained, and frozen
        statistics; else they are part of the layers before them from the start.
      batch_norms: live norms take statistics of each batch instead, with their slopes; of students
        in float (`training.transfer`).
      tracking: ranges of activations follow the first images; None for those of calibration.
      widths: bits of further students, which read as many bits of the same kernels of 8 and have
        steps and biases of their own (`training.widths`); none for one student.
      own_norms: live norms begin with statistics of the student (`training.own_norms`) instead of
        those of the float network.
      signs: what of kernels on signs meets them, before batch norms become part of it where they
        are live; None for kernels as they are.
    """

    kernels: LevelRule = min_max()
    edges: LevelRule = as_calibrated()
    live: bool = False
    batch_norms: bool = False
    tracking: Tracking | None = None
    widths: tuple[int, ...] = ()
    own_norms: bool = False
    signs: KernelView | None = None


class StudentStart(NamedTuple):
    """What of a student is not trained.

    Attributes:
      model: the float network whose parameters are replaced by trained ones: with its batch norms
        where they are live, else as it is quantized.
      qparams: scales and zero points as calibrated.
      masks: {layer: which weights of its kernel may differ from zero}, where some may not.
      gates: {norm: number of each channel's gate, from 1; 0 for none}, where what norms put out is
        multiplied by factors that are trained, and one may have many readers (`training.gates`).
    """

    model: Model
    qparams: QParams
    masks: Mapping[str, Bool[Array, "..."]] = {}
    gates: Mapping[str, Int[Array, " c"]] = {}


def trained_at_first(kind: StudentKind, plan: Plan, start: StudentStart) -> dict[str, PyTree]:
    """What is trained, before the first step.

    Returns:
      `weights`: {node: {slot: array}}; `steps`: {layer: scales of its kernel}; `edges`: {tensor:
      scale}, where the rules train any; `widths`: what is each width's own, if there are some.
    """
    weights = {
        node.name: {s: slots[s] for s in TRAINED[type(node.op)] if s in slots}
        for node in start.model.graph.nodes
        if type(node.op) in TRAINED and (slots := start.model.params.get(node.name, {}))
    }
    steps, edges = {}, {}
    for site, spec in plan.entries:
        if site.argument is None:
            steps[site.node] = kind.kernels.begin(spec.levels, start.qparams[site])
    for name, sites in grouped(plan).items():
        if spec_of(plan, sites).levels.bits < BYTE:
            edges[name] = kind.edges.begin(spec_of(plan, sites).levels, start.qparams[sites[0]])
    some = lambda found: {k: v for k, v in found.items() if v is not None}
    x = {"weights": weights, "steps": some(steps), "edges": some(edges)}
    if start.gates:
        count = max(int(jnp.max(numbers)) for numbers in start.gates.values())
        x["gates"] = {"channels": jnp.ones(count)}
    if kind.widths:
        x["widths"] = widths_at_first(plan, start.model, kind.widths)
    return x


def on_learned_levels(kind: StudentKind) -> tuple[StudentKind, tuple[str, ...]]:
    """A student that begins on levels which were learned, and what it leaves of its paper.

    Papers begin at float networks. Kernels were learned for the scales at hand, and biases for the
    ranges: extremes found anew undo both before the first step.
    """
    kept = kind._replace(live=False, tracking=None)
    told = {"norms stay folded": kind.live}
    if kind.kernels == min_max():
        kept = kept._replace(kernels=as_calibrated())
    told["kernels keep its scales"] = kept.kernels != kind.kernels
    told["ranges stay"] = kind.tracking is not None
    return kept, tuple(words for words, changed in told.items() if changed)


def float_student(kind: StudentKind, x: PyTree, start: StudentStart, taken: Share = DONE) -> Model:
    """The float network behind a student, node for node as its plan has it.

    Args:
      kind: of student.
      x: what is trained.
      start: what is not.
      taken: share of the steps, on which slopes of signs depend, and no value does.
    """
    model = viewed(kind, unfolded_student(x, start), start, taken)
    return fold_batch_norm(model) if kind.live and not kind.batch_norms else model


def viewed(kind: StudentKind, model: Model, start: StudentStart, taken: Share = DONE) -> Model:
    """A student with kernels on signs as what of them meets these (`StudentKind.signs`)."""
    if (view := kind.signs) is None:
        return model
    kernel = lambda of, name: of.params[name]["kernel"]
    seen = lambda name: view(kernel(model, name), kernel(start.model, name), taken)
    return with_params(model, {name: {"kernel": seen(name)} for name in binary_layers(start)})


def binary_layers(start: StudentStart) -> tuple[str, ...]:
    """The layers whose kernels are on signs."""
    kernels = ((site, q) for site, q in start.qparams.items() if site.argument is None)
    return tuple(site.node for site, q in kernels if isinstance(q, Alpha))


def unfolded_student(x: PyTree, start: StudentStart) -> Model:
    """The same with live batch norms in their places, and zeros where weights are masked."""
    weights = dict(x["weights"])
    for name, mask in start.masks.items():
        kernel = jnp.where(mask, weights[name]["kernel"], 0.0)
        weights[name] = {**weights[name], "kernel": kernel}
    for name, numbers in start.gates.items():
        factor = jnp.concatenate([jnp.ones(1), x["gates"]["channels"]])[numbers]
        weights[name] = {slot: v * factor for slot, v in weights[name].items()}
    return with_params(start.model, weights)


def student_hook(
    kind: StudentKind,
    plan: Plan,
    x: PyTree,
    start: StudentStart,
    ranges: TrackedRanges,
    taken: Share = DONE,
) -> Hook:
    """Puts kernels and activations on their levels. Build it inside the function that is traced.

    Args:
      kind: of student.
      plan: what is quantized.
      x: what is trained.
      start: what is not.
      ranges: of activations where they are tracked, else empty.
      taken: share of the steps.
    """
    table = plan.table
    names = {site: name for name, sites in grouped(plan).items() for site in sites}
    done: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # each tensor is rounded once

    def edge(site: Site, value: Tensor) -> Parameters:
        given = ranged_parameters(table[site], names[site], start.qparams[site], ranges)
        trained = x["edges"].get(names[site])
        return rule_of(kind, table[site]).parameters(value, table[site].levels, trained, given)

    def snap(site: Site, value: Tensor) -> Tensor:
        if site not in names:
            return value
        known = (names[site], id(value))
        if known not in done:
            rule, spec = rule_of(kind, table[site]), table[site]
            done[known] = value, rule.snap(value, spec.levels, edge(site, value), taken)
        return done[known][1]

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        site, data = Site(node.name), Site(node.name, 0)
        if site in table:
            levels, trained = table[site].levels, x["steps"].get(node.name)
            now = kind.kernels.parameters(slots["kernel"], levels, trained, start.qparams[site])
            slots = {**slots, "kernel": kind.kernels.snap(slots["kernel"], levels, now, taken)}
            if "bias" in slots and plan.multiplies(node):
                slots |= {"bias": rounded_bias(slots["bias"], edge(data, args[0]), now)}
        args = tuple(snap(Site(node.name, i), v) for i, v in enumerate(args))
        return slots, args

    return chained(hook, by_batch) if kind.batch_norms else hook


def rounded_bias(bias: Tensor, data: Parameters, kernel: Parameters) -> Tensor:
    """A bias as the deployed layer has it; the slope is 1."""
    return bias + jax.lax.stop_gradient(snap_bias(bias, data, kernel) - bias)


def rule_of(kind: StudentKind, spec: Spec) -> LevelRule:
    """How an activation meets its levels: bytes stay as calibrated."""
    return kind.edges if spec.levels.bits < BYTE else as_calibrated()


def finished(
    kind: StudentKind, plan: Plan, x: PyTree, start: StudentStart, ranges: TrackedRanges
) -> QuantizedModel:
    """The student as what it was made of: a network on its levels."""
    return guard_biases(on_its_levels(kind, plan, x, start, ranges))


@partial(jax.jit, static_argnums=(0, 1))
def on_its_levels(
    kind: StudentKind, plan: Plan, x: PyTree, start: StudentStart, ranges: TrackedRanges
) -> QuantizedModel:
    """`finished`, where biases may leave int32."""
    model = float_student(kind, x, start)
    qparams = kernel_parameters(kind, plan, x, start, model)
    for name, sites in grouped(plan).items():
        spec = spec_of(plan, sites)
        given = ranged_parameters(spec, name, start.qparams[sites[0]], ranges)
        now = rule_of(kind, spec).parameters(None, spec.levels, x["edges"].get(name), given)
        qparams |= dict.fromkeys(sites, now)
    return QuantizedModel(dataclasses.replace(model, moments={}), plan, qparams)


def kernel_codes(
    kind: StudentKind, plan: Plan, x: PyTree, start: StudentStart
) -> dict[str, Integer[Array, "..."]]:
    """{layer: codes of its kernel}, to count how many change."""
    model, table = float_student(kind, x, start), plan.table
    codes = lambda site, now: codes_of(model.params[site.node]["kernel"], table[site].levels, now)
    found = kernel_parameters(kind, plan, x, start, model)
    return jax.lax.stop_gradient({site.node: codes(site, now) for site, now in found.items()})


def with_rounded_kernels(
    kind: StudentKind, plan: Plan, x: PyTree, start: StudentStart, model: Model
) -> Model:
    """A float student with its kernels on their levels."""
    table, params = plan.table, dict(model.params)
    for site, now in kernel_parameters(kind, plan, x, start, model).items():
        slots = params[site.node]
        rounded = kind.kernels.snap(slots["kernel"], table[site].levels, now, DONE)
        params[site.node] = {**slots, "kernel": rounded}
    return dataclasses.replace(model, params=params)


def kernel_parameters(
    kind: StudentKind, plan: Plan, x: PyTree, start: StudentStart, model: Model
) -> dict[Site, Parameters]:
    """What codes of kernels stand for, of a student's float network."""
    now = lambda site, levels: kind.kernels.parameters(
        model.params[site.node]["kernel"], levels, x["steps"].get(site.node), start.qparams[site]
    )
    return {site: now(site, spec.levels) for site, spec in plan.entries if site.argument is None}


def share_changed(before: Mapping[str, Array], now: Mapping[str, Array]) -> Float[Array, ""]:
    """The fraction of codes that differ: AIT's diagnostic (Choi et al. 2022)."""
    changed = sum((jnp.sum(before[k] != v).astype(jnp.float32) for k, v in now.items()), 0.0)
    return jnp.asarray(changed) / max(sum(v.size for v in now.values()), 1)


def student_start(
    kind: StudentKind, quantized: QuantizedModel, unfolded: Model | None
) -> StudentStart:
    """What of a student is not trained, from a network on its levels.

    Args:
      kind: of student.
      quantized: where it begins.
      unfolded: the same float network with its batch norms, for those that are live.

    Raises:
      ValueError: if norms are live and there are none that fold into this network.
    """
    if not kind.live:
        return StudentStart(quantized.model, quantized.qparams)
    if unfolded is None or fold_batch_norm(unfolded).graph != quantized.model.graph:
        raise ValueError("live batch norms need the network they fold into.")
    return StudentStart(unfolded, quantized.qparams)
