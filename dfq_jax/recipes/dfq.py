"""DFQ: quantization without images, from batch-norm statistics and the weights alone.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction": fold,
equalize, take activation ranges from the moments, correct biases. Images, where there are some,
refine ranges. They correct biases only on request: the noise in means over a few images
accumulates from layer to layer, and in deep networks of few bits does more harm than good.
More surgery is there on request (`passes/before_quantization.py`): it helps where kernels have a
single scale.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import get_args

import jax
import numpy as np
from jaxtyping import Array, Shaped

from dfq_jax.base.words import BiasCorrection
from dfq_jax.errors import check_choice
from dfq_jax.graph.graph import Model
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.passes.before_quantization import Surgery, operated, replaced_relu6
from dfq_jax.passes.channel_split import unsplit
from dfq_jax.passes.level import LEVEL, level_channels
from dfq_jax.passes.ranges import expected_ranges
from dfq_jax.passes.value_split import LARGE
from dfq_jax.quantization.calibrate import Ranges, guard_biases
from dfq_jax.quantization.narrowing import activation_gap
from dfq_jax.quantization.observers import DEFAULT_OBSERVERS, Observers
from dfq_jax.quantization.plan import LayerPreset, Rule, Scheme, resolve
from dfq_jax.recipes.dfq_biases import mended
from dfq_jax.recipes.dfq_ranges import (
    RangeEvidence,
    coarse_tensors,
    ranged,
    splitting,
)
from dfq_jax.recipes.dfq_trials import nearest_network, observed
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.synthesis.terms.targets import distrusted_norms

DEFAULT_SURGERY = Surgery()
LARGE_IN_BYTES = (Rule(f"*{LARGE}", weight_bits=8),)
"""Of weights that are apart because they are large."""
SIGNED = 3.0
"""Deviations by which 16 levels end: at 2.6 they err least on a normal distribution."""


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
      bias: how biases are corrected, `none` if later; without moments by what images show.
      reestimate: have images correct means and variances of layers that had a batch norm.
      peaks: images that ranges are taken from instead, e.g. those of `recipes/aac.py`.
      sigmas: standard deviations that 8-bit ranges cover at most, beyond what images show.
      statistics_suffice: no images where statistics predict all ranges, of 8 bits each.
      noise: they are noise: without statistics outputs like it choose how ranges are found, and
        biases are corrected for rounded kernels by what layers read of it.
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
    begun, used = nearest_network(map(begin, tried), reference, images)
    looked_at = images if used else None
    quantized = mended(begun, looked_at, bias, watch, reestimate=reestimate, blind=blind)
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
    known = expected_ranges(jax.device_get(levelled), sigmas=SIGNED)
    signed = {t: known[t] for t in coarse if t in known and t not in ends and known[t][0] < 0}
    return levelled, {t: (np.float32(0), end) for t, end in jax.device_get(ends).items()} | signed


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


operate = jax.jit(operated, static_argnames=("surgery", "distrusted"))
levelling = jax.jit(level_channels, static_argnames=("sigmas", "only"))
