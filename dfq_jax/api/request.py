"""What `dfq.quantize` was asked for, in words and resolved, and who follows the work."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from dfq_jax.allocation.costs import Budget, parse_budget
from dfq_jax.base.reading import ReadOptions
from dfq_jax.base.settings import PLACES, VERBS, content_of, listed, tables
from dfq_jax.base.words import LayerPreset, Preset, Sensitivity, Store
from dfq_jax.errors import UsageError, check_choice
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import Task, task_named
from dfq_jax.optim.progress import Phase, Progress
from dfq_jax.quantization.observers import Observers, observer_named
from dfq_jax.quantization.plan import STORES, Rule, Scheme, parse_scheme
from dfq_jax.quantization.rules import parse_rule
from dfq_jax.recipes.foresight import Part, phase_of
from dfq_jax.recipes.presets import reconstruction_of, steps_of
from dfq_jax.recipes.reconstructions import Tell, methods_of
from dfq_jax.reconstruction.engine import Method
from dfq_jax.report.trust import check_accuracy
from dfq_jax.synthesis.run.memory import bytes_from

Stage = Callable[[str], None]
LIKE = {"rule": "rules", "seed": "key"}
"""{flag: what `quantize` calls it}."""
FOR_READING = frozenset(field.name for field in dataclasses.fields(ReadOptions))


class Settings(TypedDict, total=False):
    """What `quantize` can be told, by name; `quantize` says what each means."""

    scheme: str
    preset: Preset
    layers: LayerPreset
    method: str | None
    n: int | None
    steps: int | None
    reconstruction: str | None
    reconstruction_steps: int | None
    observer: str | None
    budget: str | None
    sensitivity: Sensitivity
    rules: Iterable[Rule]
    accuracy: float | None
    probes: Examples | None
    task: Task | str | None
    store: Store
    key: int
    memory: int | None


NAMES = tuple(Settings.__annotations__)
TEXTS = (
    *("scheme", "preset", "layers", "method", "reconstruction", "observer", "budget"),
    *("store", "task"),
)
KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys((*TEXTS, "sensitivity", "images"), (str,)),
    **dict.fromkeys(("n", "steps", "reconstruction_steps", "key"), (int,)),
    **{"accuracy": (int, float), "memory": (int, str), "rules": (str, list)},
}
"""Types of settings that come from a file."""


class Configured(NamedTuple):
    """What a file or a dictionary of settings says.

    Attributes:
      images: to calibrate with, if it names any.
      settings: all else.
    """

    images: Path | None
    settings: dict[str, Any]


def configured(config: str | Path | Mapping[str, Any]) -> Configured:
    """The settings of the table `[quantize]` of a file, or of a dictionary like it.

    Args:
      config: a TOML file; or what such a file says, or its table alone. What it says of the output
        and of how a model is read does not matter here.

    Raises:
      UsageError: for what no file may say, unknown settings and values of other types.
    """
    where = "config" if isinstance(config, Mapping) else f"config {config}"
    content = dict(config) if isinstance(config, Mapping) else content_of(Path(config))
    if isinstance(config, Mapping) and not {"schema_version", *VERBS} & set(content):
        content = {"quantize": content}
    content.pop("schema_version", None)
    found: dict[str, Any] = {}
    for flag, value in tables(content, where).get("quantize", {}).items():
        name = flag.replace("-", "_")
        if name in FOR_READING or name in PLACES:
            continue
        name = LIKE.get(name, name)
        check_choice(f"setting of {where}", name, (*NAMES, "images"))
        if not isinstance(value, KINDS.get(name, ())) or isinstance(value, bool):
            raise UsageError(f"{where}: {flag} = {value!r} is no value of that setting.")
        found[name] = value
    if "rules" in found:
        found["rules"] = tuple(map(parse_rule, listed(found["rules"])))
    if isinstance(found.get("memory"), str):
        found["memory"] = bytes_from(found["memory"])
    images = found.pop("images", None)
    return Configured(None if images is None else Path(images), found)


def resolved(
    model: Model,
    *,
    scheme: str = "w8a8",
    preset: Preset = "fast",
    layers: LayerPreset = "qdrop_8bit_ends",
    method: str | None = None,
    n: int | None = None,
    steps: int | None = None,
    reconstruction: str | None = None,
    reconstruction_steps: int | None = None,
    observer: str | None = None,
    budget: str | None = None,
    sensitivity: Sensitivity = "kl",
    rules: Iterable[Rule] = (),
    accuracy: float | None = None,
    probes: Examples | None = None,
    task: Task | str | None = None,
    store: Store = "packed",
    key: int = 0,
    memory: int | None = None,
) -> "Asked":
    """Settings for a network, with what they leave out, checked; see `quantize`.

    Raises:
      UsageError: for a bad one.
    """
    bits = parse_scheme(scheme)
    chosen = reconstruction or reconstruction_of(preset, model.contract, bits)
    return Asked(
        scheme=bits,
        preset=preset,
        layers=layers,
        method=method,
        reconstruction=chosen,
        methods=methods_of(chosen, steps_of(preset, chosen, reconstruction_steps)),
        by_name=reconstruction is not None,
        observers=None if observer is None else Observers(activations=observer_named(observer)),
        budget=None if budget is None else parse_budget(budget),
        sensitivity=sensitivity,
        rules=tuple(rules),
        seed=key,
        memory=memory,
        accuracy=accuracy,
        probes=probes,
        task=task_named(task) if isinstance(task, str) else task,
        n=n,
        steps=steps,
        store=store,
    )


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
    probes: Examples | None = None
    task: Task | None = None
    n: int | None = None
    steps: int | None = None
    store: Store = "packed"

    def __post_init__(self) -> None:
        """Refuses values that mean nothing, before any work is done."""
        check_accuracy(self.accuracy)
        check_choice("form of kernels", self.store, STORES)
        for name, value in (("n", self.n), ("steps", self.steps)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True)
class Follow:
    """Who is told of the progress, and where state is kept."""

    on_stage: Stage
    on_progress: Callable[[Progress], None] | None
    on_unit: Tell
    folder: Path | None
    on_phase: Callable[[Phase], None] | None = None
    foreseen: Mapping[Part, float] = dataclasses.field(default_factory=dict)

    def begins(self, part: Part) -> None:
        """Tells of a part of the run that begins."""
        if self.on_phase is not None:
            self.on_phase(phase_of(part, self.foreseen))
