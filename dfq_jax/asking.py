"""What `dfq.quantize` was asked for, and who follows the work."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from dfq_jax.errors import check_choice
from dfq_jax.optim.progress import Progress
from dfq_jax.quantize.costs import Budget
from dfq_jax.quantize.observers import Observers
from dfq_jax.quantize.plan import STORES, LayerPreset, Rule, Scheme, Store
from dfq_jax.quantize.reconstruct import Method
from dfq_jax.quantize.sensitivity import Sensitivity
from dfq_jax.recipes.presets import Preset
from dfq_jax.recipes.reconstructions import Tell
from dfq_jax.report.trust import check_accuracy
from dfq_jax.types import ImageSet

Stage = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Asked:
    """The resolved arguments of `quantize`."""

    scheme: Scheme
    preset: Preset
    layers: LayerPreset
    method: str | None
    reconstruction: str
    methods: tuple[Method, ...]
    by_name: bool
    observers: Observers | None
    budget: Budget | None
    sensitivity: Sensitivity
    rules: tuple[Rule, ...]
    seed: int
    memory: int | None
    accuracy: float | None = None
    probes: ImageSet | None = None
    store: Store = "packed"

    def __post_init__(self) -> None:
        """Refuses an accuracy or a form of kernels that is none, before any work is done."""
        check_accuracy(self.accuracy)
        check_choice("form of kernels", self.store, STORES)


@dataclasses.dataclass(frozen=True)
class Follow:
    """Who is told of the progress, and where state is kept."""

    on_stage: Stage
    on_progress: Callable[[Progress], None] | None
    on_unit: Tell
    folder: Path | None
