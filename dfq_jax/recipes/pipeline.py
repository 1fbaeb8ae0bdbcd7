"""How a network is quantized, as one value; and what settings by name come to."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypedDict, get_args

from dfq_jax.allocation.costs import Budget, parse_budget
from dfq_jax.base.words import (
    DEFAULT_STORE,
    BiasCorrection,
    Equalization,
    LayerPreset,
    Preset,
    Relu6,
    Sensitivity,
    Store,
)
from dfq_jax.errors import UsageError, check_choice
from dfq_jax.graph.graph import Model
from dfq_jax.numerics.ranges import MinMax, Observer
from dfq_jax.passes.before_quantization import Surgery
from dfq_jax.quantization.observers import (
    DEFAULT_OBSERVER,
    Observers,
    check_observers,
    observer_named,
)
from dfq_jax.quantization.plan import STORES, WIDE, Rule, Scheme, parse_scheme
from dfq_jax.recipes.dfq import DEFAULT_SURGERY
from dfq_jax.recipes.presets import FEW_BITS, reconstruction_of, steps_of_preset
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.recipes.reconstructions import (
    PLACED,
    Enlarge,
    enlarges,
    learns_in_stages,
    methods_of,
)
from dfq_jax.recipes.rows import makes_rows
from dfq_jax.recipes.sizes import is_small
from dfq_jax.reconstruction.footprint import Method
from dfq_jax.synthesis.recipe import Recipe

BYTES = Scheme(8, 8)
SMOOTHED = 0.9
"""Strength for networks of tokens at 8 bits, a few of whose channels are far larger than others."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a network is quantized.

    Attributes:
      scheme: bits of weights and activations.
      layers: which layers stay at 8 bits.
      rules: bits of particular layers.
      budget: within which bits are chosen layer by layer; None for those of the scheme.
      sensitivity: how that predicts what bits are worth: `kl` (ZeroQ), `fisher` or `trace`.
      surgery: what is done to the float network first.
      observers: of kernels and activations, taken as found; None for BRECQ's search, where ranges
        of 8 bits also cover what statistics predict.
      bias: how biases are corrected, where no method learns.
      reestimate: have images correct means and variances of layers that had a batch norm.
      placed: what becomes of the network on its grids, in order, e.g. `methods.squant`.
      methods: that learn or solve how kernels are rounded, in order; none for rounding to nearest.
      enlarge: what is made of the images before these learn from them.
      store: form of kernels below 8 bits in the file.
      smooth: how strongly outliers of activations move into kernels (`passes/smooth.py`), if so.
      spare: leave images aside where statistics predict all ranges, of 8 bits each.
      even: try whether channels of one width do better (`passes/level.py`).
      doubt: keep what was learned only where that was worth it, and learn nothing from noise.
      raw: images serve as they are: all calibrate, none is held out, and values outside of 0..255
        stay; they judge as well, as pixels.
    """

    scheme: Scheme = BYTES
    layers: LayerPreset = "qdrop_8bit_ends"
    rules: tuple[Rule, ...] = ()
    budget: Budget | None = None
    sensitivity: Sensitivity = "kl"
    surgery: Surgery = DEFAULT_SURGERY
    observers: Observers | None = None
    bias: BiasCorrection = "analytic"
    reestimate: bool = False
    placed: tuple[Callable[[Quantized], Quantized], ...] = ()
    methods: tuple[Method, ...] = ()
    enlarge: Enlarge | None = None
    store: Store = DEFAULT_STORE
    smooth: float | None = None
    spare: bool = False
    even: bool = False
    doubt: bool = False
    raw: bool = False

    def __post_init__(self) -> None:
        """Refuses a form of kernels that is none."""
        check_choice("form of kernels", self.store, STORES)

    @property
    def reconstruction(self) -> str:
        """What its methods are called."""
        placing = [name for name, place in PLACED.items() if place in self.placed]
        return ", ".join([*placing, *(method.name for method in self.methods)]) or "nearest"

    def to_nearest(self) -> "Pipeline":
        """The same without learning."""
        return dataclasses.replace(self, methods=())


class Names(TypedDict, total=False):
    """What a pipeline is resolved from; `api.quantize` says what each means."""

    scheme: str
    preset: Preset
    layers: LayerPreset
    method: str | Recipe | None
    reconstruction: str | None
    reconstruction_steps: int | None
    observer: str | None
    weight_observer: str | None
    equalize: Equalization
    relu6: Relu6
    absorb: bool
    split: float
    value_aware: float
    bias_correction: BiasCorrection
    reestimate: bool
    raw_images: bool
    budget: str | None
    sensitivity: Sensitivity
    rules: Iterable[Rule]
    store: Store


def pipeline_for(
    model: Model,
    *,
    scheme: str = "w8a8",
    preset: Preset = "fast",
    layers: LayerPreset = "qdrop_8bit_ends",
    method: str | Recipe | None = None,
    reconstruction: str | None = None,
    reconstruction_steps: int | None = None,
    observer: str | None = None,
    weight_observer: str | None = None,
    equalize: Equalization = "pairs",
    relu6: Relu6 = "keep",
    absorb: bool = False,
    split: float = 0.0,
    value_aware: float = 0.0,
    bias_correction: BiasCorrection = "analytic",
    reestimate: bool = False,
    raw_images: bool = False,
    budget: str | None = None,
    sensitivity: Sensitivity = "kl",
    rules: Iterable[Rule] = (),
    store: Store = DEFAULT_STORE,
) -> Pipeline:
    """What settings by name come to for a network; `dfq.quantize` says what each means.

    What has a name stays as published: whoever names how images are made, how kernels are rounded
    or how ranges are found gets that, without what presets add.

    Raises:
      UsageError: for an unknown name.
    """
    bits, read = parse_scheme(scheme), model.input
    chosen = reconstruction or reconstruction_of(preset, read, bits)
    methods = methods_of(chosen, steps_of_preset(preset, chosen, reconstruction_steps))
    named = any(name is not None for name in (method, reconstruction, observer, weight_observer))
    few = (bits.activation_bits or WIDE) < FEW_BITS and not is_small(read)
    return Pipeline(
        scheme=bits,
        layers=layers,
        rules=tuple(rules),
        budget=None if budget is None else parse_budget(budget),
        sensitivity=sensitivity,
        surgery=surgery_of(equalize, relu6, absorb, split, value_aware),
        observers=observers_of(observer, weight_observer, chosen),
        bias=bias_correction,
        reestimate=reestimate,
        placed=(PLACED[chosen],) if chosen in PLACED else (),
        methods=methods,
        enlarge=enlarges(chosen, read),
        store=store,
        smooth=SMOOTHED if makes_rows(model) and bits == BYTES else None,
        spare=preset == "fast",
        even=few and (learns_in_stages(methods) or not (named or methods)),
        doubt=reconstruction is None,
        raw=raw_images,
    )


def surgery_of(
    equalize: Equalization, relu6: Relu6, absorb: bool, split: float, value_aware: float
) -> Surgery:
    """What is done to the float network first, by name.

    Raises:
      UsageError: for an unknown name, or a share that is none.
    """
    check_choice("equalization", equalize, get_args(Equalization))
    check_choice("relu6", relu6, get_args(Relu6))
    for name, share in (("split", split), ("value_aware", value_aware)):
        if not 0 <= share < 1:
            raise UsageError(f"{name} must be a share in [0, 1), got {share}.")
    reach = None if equalize == "none" else equalize
    return Surgery(reach, relu6, absorb, float(split), float(value_aware))


def observers_of(
    activations: str | None, weights: str | None, reconstruction: str
) -> Observers | None:
    """How ranges are found; what rounds without images has the ranges of kernels it is made for.

    Raises:
      PlanError: for an unknown name, or one of activations alone for weights.
    """
    named = lambda name: DEFAULT_OBSERVER if name is None else observer_named(name)
    kernels: Observer = named(weights)
    if weights is None and reconstruction in PLACED:
        kernels = MinMax()
    elif activations is None and weights is None:
        return None
    found = Observers(kernels, named(activations))
    check_observers(found)
    return found
