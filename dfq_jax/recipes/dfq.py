"""DFQ: quantization without images, from batch-norm statistics and the weights alone.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction": fold,
equalize, take activation ranges from the moments, correct biases. Images, where there are some,
refine ranges. They correct biases only on request: the noise in means over a few images
accumulates from layer to layer, and in deep networks of few bits does more harm than good.
More surgery is there on request (`passes/before_quantization.py`): it helps where kernels have a
single scale.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from dfq_jax.base.words import BiasCorrection
from dfq_jax.errors import UsageError, check_choice
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.levels import on_levels, scales_of
from dfq_jax.numerics.ranges import MinMax, Percentile
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.passes.before_quantization import Surgery, operated, replaced_relu6
from dfq_jax.passes.channel_split import runs, split_channels, unsplit
from dfq_jax.passes.level import LEVEL, level_channels
from dfq_jax.passes.moments import correct_biases_analytically
from dfq_jax.passes.ranges import expected_ranges
from dfq_jax.passes.value_split import LARGE
from dfq_jax.quantization.calibrate import Ranges, calibrate, guard_biases
from dfq_jax.quantization.narrowing import activation_gap, narrowed
from dfq_jax.quantization.observers import DEFAULT_OBSERVERS, Observers
from dfq_jax.quantization.plan import LayerPreset, Plan, Rule, Scheme, Site, observing, resolve
from dfq_jax.quantization.reestimate import reestimate_norms
from dfq_jax.quantization.side_by_side import correct_biases
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.synthesis.terms.targets import distrusted_norms

Kernel = Float[Array, "..."]
DEFAULT_SURGERY = Surgery()
LARGE_IN_BYTES = (Rule(f"*{LARGE}", weight_bits=8),)
"""Of weights that are apart because they are large."""
BLIND = (MinMax(), Percentile())
"""How 8-bit ranges are found where images are noise and nothing else tells: as outputs like it."""
SIGNED = 3.0
"""Deviations by which 16 levels end: at 2.6 they err least on a normal distribution."""


class Quantized(NamedTuple):
    """A quantized network and the float one it was made from, node for node the same.

    Attributes:
      quantized: the network.
      reference: folded and equalized, in float.
      used_images: whether calibration or bias correction looked at the images.
      uncapped: activations that lost their ceiling of 6 to equalization.
      unsplit: {layer: why its channels were not split}, where splitting was asked for.
    """

    quantized: QuantizedModel
    reference: Model
    used_images: bool
    uncapped: tuple[str, ...] = ()
    unsplit: Mapping[str, str] = {}


def dfq(
    model: Model,
    images: Shaped[Array, "n ..."] | None,
    scheme: Scheme,
    *,
    layers: LayerPreset = "qdrop_8bit_ends",
    rules: Iterable[Rule] = (),
    surgery: Surgery = DEFAULT_SURGERY,
    level: float | None = None,
    bias: BiasCorrection = "analytic",
    reestimate: bool = False,
    peaks: Shaped[Array, "n ..."] | None = None,
    sigmas: float = 6.0,
    statistics_suffice: bool = False,
    noise: bool = False,
    observers: Observers | None = None,
    watch: Watcher = SILENT,
) -> Quantized:
    """Quantizes a network.

    Args:
      model: network with its batch norms in place.
      images: normalised synthetic images; None to rely on the batch-norm statistics alone.
      scheme: bits.
      layers: which layers stay at 8 bits.
      rules: exceptions by name.
      surgery: what becomes of the float network first.
      level: deviations by which channels on coarse grids get one width (`passes/level.py`).
      bias: how biases are corrected, `none` if later; without moments always empirically.
      reestimate: have images correct means and variances of layers that had a batch norm.
      peaks: images that ranges are taken from instead, e.g. those of `recipes/aac.py`.
      sigmas: standard deviations that 8-bit ranges cover beyond what images show.
      statistics_suffice: no images where statistics predict all ranges, of 8 bits each.
      noise: they are noise: without statistics ranges cover all they show, or all but outliers
        where outputs are nearer so, and biases stay.
      observers: how ranges are found, taken as found; None: BRECQ's search, with what is above.
      watch: told what is being done.

    Raises:
      UsageError: if the plan does not fit, a name is unknown, or ranges are without images.
    """
    check_choice("bias correction", bias, get_args(BiasCorrection))
    watch.says("folding batch norms" + (" and equalizing channels" if surgery.reach else ""))
    rules = (*(LARGE_IN_BYTES if surgery.value_aware else ()), *rules)
    how = (scheme, layers, rules, observers or DEFAULT_OBSERVERS)
    whole, settled = prepared(model, surgery, level, how)
    reference = splitting(whole, surgery.split) if surgery.split else whole
    blind = noise and not reference.moments
    plan = resolve(reference.graph, *how)
    watch.says("calibrating ranges")
    spare = statistics_suffice and observers is None and not reestimate
    shown, spread = (images, sigmas) if peaks is None else (peaks, None)
    seen = RangeEvidence(shown, spread, spare, settled)
    begin = lambda plan: ranged(whole, reference, plan, seen, surgery.split, widen=not observers)
    tried = observed(plan, observers, peaks is not None, blind)
    begun, used = nearest(map(begin, tried), reference, images)
    bias = "none" if blind else bias
    quantized = mended(begun, images if used else None, bias, watch, reestimate=reestimate)
    notes = replaced_relu6(model, whole), unsplit(whole) if surgery.split else {}
    return Quantized(guard_biases(quantized), begun.model, used, *notes)


def prepared(
    model: Model,
    surgery: Surgery,
    level: float | None,
    how: tuple[Scheme, LayerPreset, tuple[Rule, ...], Observers],
) -> tuple[Model, Ranges]:
    """The float network after surgery, and ranges that are settled since channels got one width.

    Those end where the widest channel did that had a ceiling. What has no ceiling and both signs,
    as linear bottlenecks, has the range that is best for 4 bits of a normal distribution: a few
    outliers of single images would make grids that images choose four times as wide.

    Args:
      model: with its batch norms in place.
      surgery: what is done to it.
      level: deviations of the common width; None leaves channels as they are.
      how: what `resolve` takes besides the graph: it says which tensors are on coarse grids.
    """
    whole = operate(model, surgery, distrusted=distrusted_norms(model))
    if level is None:
        return whole, {}
    coarse = coarse_tensors(resolve(whole.graph, *how))
    levelled, ends = levelling(whole, level, only=coarse)
    known = expectations(levelled, sigmas=SIGNED)
    signed = {t: known[t] for t in coarse if t in known and t not in ends and known[t][0] < 0}
    return levelled, {t: (jnp.zeros(()), end) for t, end in ends.items()} | signed


def at_one_width(
    made: Quantized, images: Shaped[Array, "n ..."], make: Callable[..., Quantized]
) -> tuple[Quantized, Callable[..., Quantized]]:
    """The network with all channels of a tensor at one width, if its outputs are nearer so.

    Linear bottlenecks gain by it. Activations that end at 6 lose their ceiling to it, and what
    statistics did not foretell of a channel is cut off. Kernels stay as they are while it is
    decided: MobileNetV2's outputs, with kernels at 4 bits rounded to nearest, are ruins both ways.

    Args:
      made: the network as it is.
      images: normalised; a few of them decide.
      make: `dfq` with all its arguments but `level`.

    Returns:
      The nearer of the two, and what makes it.
    """
    even = partial(make, level=LEVEL)
    tried = even()
    gap = lambda found: activation_gap(found.quantized, made.reference, images)
    return (tried, even) if gap(tried) < gap(made) else (made, make)


def mended(
    begun: QuantizedModel,
    images: Shaped[Array, "n ..."] | None,
    bias: BiasCorrection,
    watch: Watcher,
    *,
    reestimate: bool,
) -> QuantizedModel:
    """The network with biases corrected, and norms re-estimated if asked for."""
    quantized = begun
    if bias != "none":
        watch.says("correcting biases")
        quantized = corrected(begun, begun.model, images, bias)
    return reestimated(quantized, begun.model, images) if reestimate else quantized


def with_biases_corrected(made: Quantized, images: Shaped[Array, "n ..."]) -> Quantized:
    """A network that was made to learn from, biases as in float, as it is without learning."""
    quantized = corrected(made.quantized, made.reference, images, "analytic")
    return made._replace(quantized=guard_biases(quantized))


class RangeEvidence(NamedTuple):
    """What ranges are taken from.

    Attributes:
      images: normalised; None for statistics alone.
      sigmas: standard deviations that recorded statistics stand for; None to leave them aside.
      spare: leave images aside where statistics predict every range, of 8 bits each.
      settled: ranges that are taken as they are.
    """

    images: Shaped[Array, "n ..."] | None
    sigmas: float | None
    spare: bool
    settled: Ranges


def ranged(
    whole: Model, reference: Model, plan: Plan, seen: RangeEvidence, split: float, *, widen: bool
) -> tuple[QuantizedModel, bool]:
    """The network on grids, and whether images were looked at.

    Args:
      whole: before its channels were split.
      reference: the float network.
      plan: what is quantized.
      seen: what ranges are taken from.
      split: share of channels split.
      widen: whether 8-bit grids cover predicted ranges too.
    """
    expected = {} if seen.sigmas is None else expectations(reference, sigmas=seen.sigmas)
    spared = seen.spare and suffices(plan, {*expected, *whole.graph.inputs})
    images = None if spared else seen.images
    quantized = calibrate(
        reference, plan, images, expected=expected, settled=seen.settled, widen=widen
    )
    if images is not None and widen and seen.sigmas is not None:
        quantized = narrowed(quantized, expected, images)
    return on_grids(quantized, whole, split), images is not None


def observed(plan: Plan, observers: Observers | None, peaks: bool, blind: bool) -> list[Plan]:
    """The plan with what its 8-bit ranges are found by; several where outputs are to choose."""
    if peaks:
        return [observing(plan, MinMax())]
    if blind and observers is None:
        return [observing(plan, each) for each in BLIND]
    return [plan]


def nearest(
    tried: Iterable[tuple[QuantizedModel, bool]],
    reference: Model,
    images: Shaped[Array, "n ..."] | None,
) -> tuple[QuantizedModel, bool]:
    """Of networks on several grids the one whose outputs are nearest to the float network's."""
    first, *others = tried
    if images is None or not others:
        return first
    return min([first, *others], key=lambda one: activation_gap(one[0], reference, images))


expectations = jax.jit(expected_ranges, static_argnames="sigmas")
operate = jax.jit(operated, static_argnames=("surgery", "distrusted"))
splitting = jax.jit(split_channels, static_argnames="ratio")
levelling = jax.jit(level_channels, static_argnames=("sigmas", "only"))


def coarse_tensors(plan: Plan) -> tuple[str, ...]:
    """The tensors of a plan on grids of fewer than 8 bits."""
    table = plan.table
    return tuple(tensor for tensor, sites in plan.groups if table[sites[0]].levels.bits < 8)


def on_grids(quantized: QuantizedModel, whole: Model, ratio: float) -> QuantizedModel:
    """The network with channels split so that the codes of copies sum to that of the whole.

    Args:
      quantized: made from `whole` by splitting channels into equal halves.
      whole: before its channels were split.
      ratio: share of channels split.
    """
    if ratio == 0:
        return quantized
    scales = {
        site.node: scales_of(a) for site, a in quantized.qparams.items() if site.argument is None
    }
    nothing = jnp.zeros(())
    steps = {run.layer: scales.get(run.layer, nothing) for run in runs(whole)}
    model = splitting(whole, ratio, steps=steps)
    return QuantizedModel(model, quantized.plan, quantized.qparams)


def corrected(
    quantized: QuantizedModel,
    reference: Model,
    images: Shaped[Array, "n ..."] | None,
    bias: BiasCorrection,
) -> QuantizedModel:
    """The network with its biases corrected; without moments by images, if there are some."""
    if bias != "empirical":
        quantized = corrected_analytically(quantized)
    if images is not None and (bias != "analytic" or not reference.moments):
        quantized = correct_biases(quantized, reference, images)
    return quantized


def reestimated(
    quantized: QuantizedModel, reference: Model, images: Shaped[Array, "n ..."] | None
) -> QuantizedModel:
    """The network with its norms re-estimated.

    Raises:
      UsageError: without images, or for a network without statistics.
    """
    if images is None:
        raise UsageError(
            "dfq(reestimate=True) got no images to see statistics on; synthesize some."
        )
    return reestimate_norms(quantized, reference, images)


def suffices(plan: Plan, known: set[str]) -> bool:
    """Whether no image is needed to find the ranges of a plan."""
    return all(predicted(plan, tensor, sites, known) for tensor, sites in plan.groups)


def predicted(plan: Plan, tensor: str, sites: tuple[Site, ...], known: set[str]) -> bool:
    """Whether a tensor's range is known and wide enough a grid to take it as it is."""
    spec = plan.spec(sites[0])
    return tensor in known and (spec is None or spec.levels.bits == 8)


@jax.jit
def corrected_analytically(quantized: QuantizedModel) -> QuantizedModel:
    """The network with biases corrected for the rounding of its kernels."""
    model = correct_biases_analytically(quantized.model, rounded_kernels(quantized))
    return QuantizedModel(model, quantized.plan, quantized.qparams)


def rounded_kernels(quantized: QuantizedModel) -> dict[str, Kernel]:
    """{layer: kernel on its levels}, for every layer with a quantized kernel."""
    plan, rounded = quantized.plan, {}
    for node in weighted_nodes(quantized.model.graph):
        site = Site(node.name)
        spec = plan.spec(site)
        if spec is not None:
            kernel = quantized.model.params[node.name]["kernel"]
            rounded[node.name] = on_levels(kernel, spec.levels, quantized.qparams[site])
    return rounded


def placed(reference: Model, kernels: Mapping[str, Kernel], *, correct: bool) -> Model:
    """The float network with other kernels, its biases corrected for them if asked for."""
    model = correct_biases_analytically(reference, kernels) if correct else reference
    return with_params(model, {name: {"kernel": kernel} for name, kernel in kernels.items()})
