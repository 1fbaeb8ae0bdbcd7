"""What the verbs can be told on the command line; of most of them, in a TOML file too."""

import dataclasses
from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

from cyclopts import Group, Parameter

from dfq_jax.base.machine import MachineOptions
from dfq_jax.base.reading import ReadOptions
from dfq_jax.base.words import (
    DEFAULT_STORE,
    BiasCorrection,
    BitsByName,
    Channels,
    CriterionName,
    Equalization,
    LayerPreset,
    MethodName,
    ObserverName,
    Precision,
    Preset,
    ReconstructionName,
    Relu6,
    RestorationName,
    Rivals,
    Sensitivity,
    Store,
    TaskName,
    TrainingName,
    WeightObserverName,
)

HEADINGS = (
    "Result",
    "What is removed",
    "Network",
    "Images",
    "Rounding and ranges",
    "Before quantization",
    "Run",
)
"""Of the help, in this order."""
RESULT, REMOVED, NETWORK, IMAGES, ROUNDING, BEFORE, RUN = (
    Parameter(group=Group(name, sort_key=place)) for place, name in enumerate(HEADINGS)
)
"""Under which of them an option stands."""

T = TypeVar("T")
OfResult: TypeAlias = Annotated[T, RESULT]
OfRemoval: TypeAlias = Annotated[T, REMOVED]
OfNetwork: TypeAlias = Annotated[T, NETWORK]
OfImages: TypeAlias = Annotated[T, IMAGES]
OfRounding: TypeAlias = Annotated[T, ROUNDING]
OfBefore: TypeAlias = Annotated[T, BEFORE]
OfRun: TypeAlias = Annotated[T, RUN]

Json = Annotated[bool, RUN, Parameter(help="Print one JSON object.")]
OutputFlag = Annotated[Path, RESULT, Parameter(name=["--output", "-o"])]
Reading = Annotated[ReadOptions, NETWORK, Parameter(name="*")]
MachineFlags = Annotated[MachineOptions, RUN, Parameter(name="*")]
Count = Annotated[int | None, IMAGES, Parameter(name=["-n", "--n"])]
Untouched = OfRemoval[tuple[str, ...]]
Rules = Annotated[tuple[str, ...], RESULT, Parameter(name="--rule")]
FLAT = Parameter(name="*")
"""Of a group of options: its fields are flags."""


def told_default(value: object) -> str | None:
    """What the help says of a default; nothing where an option is left out by default."""
    return None if value is None or value is False or value == () else str(value)


@dataclasses.dataclass(frozen=True)
class SynthesizeOptions:
    """The options of `dfq synthesize`, in the order of its help.

    Attributes:
      output: One .npz file, or a folder (a name without suffix) of many.
      n: How many images; the method says if you do not, as published.
      method: How images are made; without batch norm: gzsq, psaq_vit, sardfq (attention), noise.
      reading: how the model is read.
      steps: Optimisation steps of a batch.
      batch: Images optimised together.
      seed: Seed of everything random.
      machine: what to use of the machine.
      preview: Also write a PNG contact sheet.
      config: TOML file of options; those given here win.
    """

    output: OutputFlag
    n: Count = None
    method: OfImages[MethodName] = "best"
    reading: Reading = dataclasses.field(default_factory=ReadOptions)
    steps: OfImages[int | None] = None
    batch: OfImages[int | None] = None
    seed: OfRun[int] = 0
    machine: MachineFlags = dataclasses.field(default_factory=MachineOptions)
    preview: OfResult[Path | None] = None
    config: OfRun[Path | None] = None


@dataclasses.dataclass(frozen=True)
class IntegerOptions:
    """How a network is made integer, on whatever images; in the order of the help.

    Attributes:
      output: Folder of the result.
      scheme: w{bits}a{bits}, bits 2..8; w1 (signs); a16; w4 or w4g64 (groups) for weights alone.
      preset: Rounding to nearest, in closed form, or learned from there where images are small.
      layers: What stays at 8 bits when the rest has fewer.
      rule: Bits of layers by name: 'layer3.*=8', 'fc=w8a4', 'x=float'; may be repeated.
      images: Folder or zip of pictures, .npz with images, or what `dfq synthesize` made.
      reconstruction: How weights are rounded; the preset says if you do not.
      reconstruction_steps: Steps of a block.
      reading: how the model is read.
      seed: Seed of everything random.
      budget: Bits by layer within 4.5bits a weight, 600KB of weights, or 2GBOPs.
      sensitivity: What a --budget listens to.
      observer: How ranges of activations are found.
      weight_observer: How those of weights are found.
      equalize: Which layers are equalized first: pairs, or groups across sums too.
      relu6: replace makes ReLUs of those ReLU6 that keep layers from equalization.
      absorb: Moves high biases on behind ReLUs.
      split: Share of channels to split where weights stand out (OCS), e.g. 0.02.
      value_aware: Share of weights, the largest, that keep 8 bits apart, e.g. 0.01.
      bias_correction: How biases are corrected for rounding, where no method learns.
      reestimate: Has images correct means and variances of layers that had a batch norm.
      raw_images: Calibrates with all images as they are: none held out, none clipped.
      accuracy: Top-1 of the float network if you know it, e.g. 0.72; narrows what is estimated.
      memory: Most that a step may take, e.g. 4GiB: larger ones are split.
      task: What the network is for, where its outputs do not tell.
      store: Weights below 8 bits in the file: packed (small, fast), int8 (plain), ONNX's int4.
      force: Write beside files of others.
      config: TOML file of options; those given here win.
    """

    output: OutputFlag
    scheme: OfResult[str] = "w8a8"
    preset: OfResult[Preset] = "fast"
    layers: OfResult[LayerPreset] = "qdrop_8bit_ends"
    rule: Rules = ()
    images: OfImages[Path | None] = None
    reconstruction: OfRounding[ReconstructionName | None] = None
    reconstruction_steps: OfRounding[int | None] = None
    reading: Reading = dataclasses.field(default_factory=ReadOptions)
    seed: OfRun[int] = 0
    budget: OfResult[str | None] = None
    sensitivity: OfResult[Sensitivity] = "kl"
    observer: OfRounding[ObserverName | None] = None
    weight_observer: OfRounding[WeightObserverName | None] = None
    equalize: OfBefore[Equalization] = "pairs"
    relu6: OfBefore[Relu6] = "keep"
    absorb: OfBefore[bool] = False
    split: OfBefore[float] = 0.0
    value_aware: OfBefore[float] = 0.0
    bias_correction: OfRounding[BiasCorrection] = "analytic"
    reestimate: OfRounding[bool] = False
    raw_images: OfImages[bool] = False
    accuracy: OfNetwork[float | None] = None
    memory: OfRun[str | None] = None
    task: OfNetwork[TaskName | None] = None
    store: OfResult[Store] = DEFAULT_STORE
    force: OfResult[bool] = False
    config: OfRun[Path | None] = None


@dataclasses.dataclass(frozen=True)
class QuantizeOptions(IntegerOptions):
    """The options of `dfq quantize`: how images are made, and all of `IntegerOptions`.

    Attributes:
      method: How images are made; without batch norm: gzsq, psaq_vit, sardfq (attention), noise.
      n: How many images are made; the --method, or else the preset, says if you do not.
      steps: Optimisation steps of a batch of them, likewise.
    """

    method: OfImages[MethodName | None] = None
    n: Count = None
    steps: OfImages[int | None] = None


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The options of `dfq train`, in the order of its help.

    Attributes:
      output: Folder of the result.
      method: How the student learns; best is ours, the others are published.
      start: Output folder of quantize or train to begin from; its bits are those of the result.
      scheme: w{bits}a{bits}, bits 2..8; w1 (signs); that of --start, or the method's.
      layers: What stays at 8 bits when the rest has fewer; likewise, or qdrop_8bit_ends.
      rule: Bits of layers by name: 'layer3.*=8', 'fc=w8a4', 'x=float'; may be repeated.
      images: Folder or zip of pictures, .npz with images, or what `dfq synthesize` made.
      n: How many images are made; the --method says if you do not.
      steps: Steps of the student, likewise.
      batch: Images of a step, likewise.
      gradient_bits: Bits of gradients inside the student, e.g. 8; float unless given.
      reading: how the model is read.
      seed: Seed of everything random.
      accuracy: Top-1 of the float network if you know it, e.g. 0.72; narrows what is estimated.
      memory: Most that a step of synthesis may take, e.g. 4GiB: larger ones are split.
      devices: Devices that share every batch of the student; a CPU counts as any number.
      dtype: Precision in which layers of the student and its teacher multiply.
      task: What the network is for, where its outputs do not tell.
      store: Weights below 8 bits in the file: packed (small, fast), int8 (plain), ONNX's int4.
      force: Write beside files of others.
      config: TOML file of options; those given here win.
    """

    output: OutputFlag
    method: OfResult[TrainingName] = "best"
    start: OfResult[Path | None] = None
    scheme: OfResult[str | None] = None
    layers: OfResult[LayerPreset | None] = None
    rule: Rules = ()
    images: OfImages[Path | None] = None
    n: Count = None
    steps: OfResult[int | None] = None
    batch: OfResult[int | None] = None
    gradient_bits: OfResult[int | None] = None
    reading: Reading = dataclasses.field(default_factory=ReadOptions)
    seed: OfRun[int] = 0
    accuracy: OfNetwork[float | None] = None
    memory: OfRun[str | None] = None
    devices: OfRun[int] = 1
    dtype: OfRun[Precision] = "float32"
    task: OfNetwork[TaskName | None] = None
    store: OfResult[Store | None] = None
    force: OfResult[bool] = False
    config: OfRun[Path | None] = None


@dataclasses.dataclass(frozen=True)
class CompressOptions(QuantizeOptions):
    """The options of `dfq compress`: those of `dfq quantize`, and these.

    Attributes:
      scheme: As for quantize; or float: nothing is quantized.
      budget: Instead: "50% MACs", 20MMACs, "40% params", 2MB, 3ms; or of bits: 4bits, 2GBOPs.
      prune: Share of the channels that may go, e.g. 30%.
      criterion: How channels are judged: reconstruction, or energy where no images restore.
      restore: What makes up for them: layers fitted on images, or closed forms of weights; for
        zeros the former, or none.
      among: Whose channels compete: a layer's, all, or those of layers of one structure.
      channels: Which may go: all but what sums carry from block to block, or those too.
      least: Channels that every layer keeps.
      round_to: Channels kept are a multiple of it.
      untouched: Layers that keep all they have: 'layer3.*'; may be repeated.
      sparsity: Weights at zero: 2:4 (2 of 4 stay) or 80%; channels stay without --prune.
      bits: joint decides bits and channels together within --budget "50% bytes" or 200KB.
      train: Steps in which what is left learns from the whole network, in float, without data.
    """

    prune: OfRemoval[str | None] = None
    criterion: OfRemoval[CriterionName | None] = None
    restore: OfRemoval[RestorationName] = "ridge"
    among: OfRemoval[Rivals] = "layer"
    channels: OfRemoval[Channels] = "inner"
    least: OfRemoval[int] = 1
    round_to: OfRemoval[int] = 1
    untouched: Untouched = ()
    sparsity: OfRemoval[str | None] = None
    bits: OfRemoval[BitsByName] = "scheme"
    train: OfRemoval[int | None] = None


@dataclasses.dataclass(frozen=True)
class AdaptOptions(IntegerOptions):
    """The options of `dfq adapt`: those of `dfq quantize` but for making images, and these.

    Attributes:
      images: Folder or zip of pictures without labels, of where the network will work.
      epochs: How often each picture is shown.
      batch: Images of a step.
    """

    epochs: OfResult[int] = 15
    batch: OfResult[int] = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillOptions(QuantizeOptions):
    """The options of `dfq distill`: those of `dfq quantize`, and these.

    Attributes:
      student: Architecture to teach from drawn weights, e.g. resnet18; or a network with its graph.
      train: Steps of the student; 80,000 if you do not say.
      batch: Images of a step; 256 if you do not say.
    """

    student: OfResult[str]
    train: OfResult[int | None] = None
    batch: OfResult[int | None] = None


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """The options of `dfq doctor`, in the order of its help.

    Attributes:
      scheme: Of a MODEL: as for quantize.
      layers: Of a MODEL: what stays at 8 bits when the rest has fewer.
      rule: Of a MODEL: bits of layers by name, as for quantize; may be repeated.
      reading: how a MODEL is read.
      seed: Of a MODEL: seed of everything random.
      top: How many layers are shown.
      chart: Also write a PNG of what each layer costs.
    """

    scheme: OfResult[str] = "w8a8"
    layers: OfResult[LayerPreset] = "qdrop_8bit_ends"
    rule: Rules = ()
    reading: Reading = dataclasses.field(default_factory=ReadOptions)
    seed: OfRun[int] = 0
    top: int = 10
    chart: Path | None = None
