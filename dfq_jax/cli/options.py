"""What the verbs can be told on the command line; of most of them, in a TOML file too."""

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dfq_jax.base.machine import MachineOptions
from dfq_jax.base.reading import ReadOptions
from dfq_jax.base.words import (
    DEFAULT_STORE,
    BiasCorrection,
    Channels,
    CriterionName,
    Equalization,
    LayerPreset,
    MethodName,
    ObserverName,
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

OutputFlag = Annotated[Path, Parameter(name=["--output", "-o"])]
Reading = Annotated[ReadOptions, Parameter(name="*", negative="")]
MachineFlags = Annotated[MachineOptions, Parameter(name="*", negative="")]
Untouched = Annotated[tuple[str, ...], Parameter(negative="", show_default=False)]
Rules = Annotated[tuple[str, ...], Parameter(name="--rule", negative="", show_default=False)]
FLAT = Parameter(name="*", negative="")
"""Of a group of options: its fields are flags."""


@dataclasses.dataclass(frozen=True)
class SynthesizeOptions:
    """The options of `dfq synthesize`, in the order of its help.

    Attributes:
      output: One .npz file, or a folder (a name without suffix) of many.
      n: How many images; the method says if you do not, as published.
      method: How images are made; without batch norm: gzsq, psaq_vit (attention), noise.
      reading: how the model is read.
      steps: Optimisation steps of a batch.
      batch: Images optimised together.
      seed: Seed of everything random.
      machine: what to use of the machine.
      preview: Also write a PNG contact sheet.
      config: TOML file of options; those given here win.
    """

    output: OutputFlag
    n: Annotated[int | None, Parameter(name=["-n", "--n"])] = None
    method: MethodName = "best"
    reading: Reading = dataclasses.field(default_factory=ReadOptions)
    steps: int | None = None
    batch: int | None = None
    seed: int = 0
    machine: MachineFlags = dataclasses.field(default_factory=MachineOptions)
    preview: Path | None = None
    config: Path | None = None


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """The options of `dfq quantize`, in the order of its help.

    Attributes:
      output: Folder of the result.
      scheme: w{bits}a{bits}, bits 2..8; w1 (signs); a16; w4 or w4g64 (groups) for weights alone.
      preset: Rounding to nearest, in closed form, or learned from there where images are small.
      layers: What stays at 8 bits when the rest has fewer.
      rule: Bits of layers by name: 'layer3.*=8', 'fc=w8a4', 'x=float'; may be repeated.
      method: How images are made; without batch norm: gzsq, psaq_vit (attention), noise.
      n: How many images are made; the --method, or else the preset, says if you do not.
      steps: Optimisation steps of a batch of them, likewise.
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
    scheme: str = "w8a8"
    preset: Preset = "fast"
    layers: LayerPreset = "qdrop_8bit_ends"
    rule: Rules = ()
    method: MethodName | None = None
    n: Annotated[int | None, Parameter(name=["-n", "--n"])] = None
    steps: int | None = None
    images: Path | None = None
    reconstruction: ReconstructionName | None = None
    reconstruction_steps: int | None = None
    reading: Reading = dataclasses.field(default_factory=ReadOptions)
    seed: int = 0
    budget: str | None = None
    sensitivity: Sensitivity = "kl"
    observer: ObserverName | None = None
    weight_observer: WeightObserverName | None = None
    equalize: Equalization = "pairs"
    relu6: Relu6 = "keep"
    absorb: bool = False
    split: float = 0.0
    value_aware: float = 0.0
    bias_correction: BiasCorrection = "analytic"
    reestimate: bool = False
    raw_images: bool = False
    accuracy: float | None = None
    memory: str | None = None
    task: TaskName | None = None
    store: Store = DEFAULT_STORE
    force: bool = False
    config: Path | None = None


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
      reading: how the model is read.
      seed: Seed of everything random.
      accuracy: Top-1 of the float network if you know it, e.g. 0.72; narrows what is estimated.
      memory: Most that a step of synthesis may take, e.g. 4GiB: larger ones are split.
      task: What the network is for, where its outputs do not tell.
      store: Weights below 8 bits in the file: packed (small, fast), int8 (plain), ONNX's int4.
      force: Write beside files of others.
      config: TOML file of options; those given here win.
    """

    output: OutputFlag
    method: TrainingName = "best"
    start: Path | None = None
    scheme: str | None = None
    layers: LayerPreset | None = None
    rule: Rules = ()
    images: Path | None = None
    n: Annotated[int | None, Parameter(name=["-n", "--n"])] = None
    steps: int | None = None
    batch: int | None = None
    reading: Reading = dataclasses.field(default_factory=ReadOptions)
    seed: int = 0
    accuracy: float | None = None
    memory: str | None = None
    task: TaskName | None = None
    store: Store | None = None
    force: bool = False
    config: Path | None = None


@dataclasses.dataclass(frozen=True)
class CompressOptions(QuantizeOptions):
    """The options of `dfq compress`: those of `dfq quantize`, and these.

    Attributes:
      budget: Instead: "50% MACs", 20MMACs, "40% params", 2MB, 3ms; or of bits: 4bits, 2GBOPs.
      prune: Share of the channels that may go, e.g. 30%.
      criterion: How channels are judged: reconstruction, or energy where no images restore.
      restore: What makes up for them: layers fitted on images, or closed forms of weights.
      among: Whose channels compete: a layer's, all, or those of layers of one structure.
      channels: Which may go: all but what sums carry from block to block, or those too.
      least: Channels that every layer keeps.
      round_to: Channels kept are a multiple of it.
      untouched: Layers that keep all they have: 'layer3.*'; may be repeated.
      sparsity: Weights at zero: 2:4 (2 of 4 stay) or 80%; channels stay without --prune.
      train: Steps in which what is left learns from the whole network, in float, without data.
    """

    prune: str | None = None
    criterion: CriterionName | None = None
    restore: RestorationName = "ridge"
    among: Rivals = "layer"
    channels: Channels = "inner"
    least: int = 1
    round_to: int = 1
    untouched: Untouched = ()
    sparsity: str | None = None
    train: int | None = None


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

    scheme: str = "w8a8"
    layers: LayerPreset = "qdrop_8bit_ends"
    rule: Rules = ()
    reading: Reading = dataclasses.field(default_factory=ReadOptions)
    seed: int = 0
    top: int = 10
    chart: Path | None = None
