"""What `dfq.quantize` was asked for, in words and resolved, and who follows the work."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from dfq_jax.api.synthesize import check_seed
from dfq_jax.base.reading import ReadOptions
from dfq_jax.base.settings import PLACES, VERBS, content_of, flags_listed, tables
from dfq_jax.base.words import Preset
from dfq_jax.errors import UsageError, check_choice
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import Task, said_task
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.optim.state import NOWHERE, Place
from dfq_jax.quantization.rules import parse_rule
from dfq_jax.recipes.foresight import RunPart, phase_of
from dfq_jax.recipes.pipeline import Names, Pipeline, pipeline_for
from dfq_jax.recipes.presets import recipe_for
from dfq_jax.recipes.rows import makes_rows, method_of
from dfq_jax.report.trust import check_accuracy
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.run.memory import bytes_from

LIKE = {"rule": "rules"}
"""{flag: what `quantize` calls it}."""
FOR_READING = frozenset(field.name for field in dataclasses.fields(ReadOptions))


class Settings(Names, total=False):
    """What `quantize` can be told, by name; `quantize` says what each means."""

    n: int | None
    steps: int | None
    accuracy: float | None
    probes: Examples | None
    task: Task | str | None
    seed: int
    memory: int | None


NAMES = tuple(Settings.__annotations__)
TEXTS = (
    *("scheme", "preset", "layers", "method", "reconstruction", "observer", "budget"),
    *("store", "task", "weight_observer", "equalize", "relu6", "bias_correction"),
)
SWITCHES = ("absorb", "reestimate", "raw_images")
KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys((*TEXTS, "sensitivity", "images"), (str,)),
    **dict.fromkeys(("n", "steps", "reconstruction_steps", "seed"), (int,)),
    **{"accuracy": (int, float), "memory": (int, str), "rules": (str, list)},
    **dict.fromkeys(("split", "value_aware"), (int, float)),
    **dict.fromkeys(SWITCHES, (bool,)),
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
        kinds = KINDS.get(name, ())
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UsageError(f"{where}: {flag} = {value!r} is no value of that setting.")
        found[name] = value
    if "rules" in found:
        found["rules"] = tuple(map(parse_rule, flags_listed(found["rules"])))
    if isinstance(found.get("memory"), str):
        found["memory"] = bytes_from(found["memory"])
    images = found.pop("images", None)
    return Configured(None if images is None else Path(images), found)


def resolved(model: Model, settings: Settings, pipeline: Pipeline | None = None) -> "Asked":
    """What was asked for, with what settings leave out, checked.

    Args:
      model: the network.
      settings: as of `quantize`.
      pipeline: how to quantize, instead of names.

    Raises:
      UsageError: for a bad setting, or one that a pipeline says as well.
    """
    names: dict[str, Any] = {k: v for k, v in settings.items() if k in Names.__annotations__}
    said = [name for name in names if name != "method"]
    if pipeline is not None and said:
        raise UsageError(f"{said[0]} is said by a pipeline: leave one of the two out.")
    task = settings.get("task")
    return Asked(
        pipeline or pipeline_for(model, **names),
        None if pipeline is not None else settings.get("preset", "fast"),
        settings.get("method"),
        settings.get("n"),
        settings.get("steps"),
        settings.get("accuracy"),
        settings.get("probes"),
        said_task(task),
        settings.get("seed", 0),
        settings.get("memory"),
    )


def check_synthesis(model: Model, settings: Mapping[str, Any], *, given: bool) -> None:
    """Refuses settings, methods and seeds that are none, and a method beside images given."""
    for name in settings:
        check_choice("setting", name, NAMES)
    check_seed(settings.get("seed", 0))
    method = settings.get("method")
    if method is not None and makes_rows(model):
        method_of(model, name_of_method(method))
    elif method is not None:
        recipe_for(method, settings.get("steps"))
    made = [name for name in ("n", "steps") if settings.get(name) is not None]
    if given and method is not None:
        raise UsageError(
            f"method {name_of_method(method)!r} makes images, and some were given: leave one out."
        )
    if given and made:
        raise UsageError(
            f"{made[0]} is of images that are made, and some were given: leave it out."
        )


def name_of_method(method: str | Recipe) -> str:
    """What a method is called."""
    return method.name if isinstance(method, Recipe) else method


@dataclasses.dataclass(frozen=True)
class Asked:
    """The resolved arguments of `quantize`.

    Attributes:
      pipeline: how the network is quantized.
      preset: whose pipeline that is; None for one of the caller's own.
      method: how images are made, if it was asked for; a recipe, or its name.
      n: how many, likewise.
      steps: of a batch of them, likewise.
      accuracy: top-1 of the float network, if it is known.
      probes: that judge it, if there are some.
      task: what the network is for, if that was said.
      seed: of everything random but the probes.
      memory: bytes that a step may take.
    """

    pipeline: Pipeline
    preset: Preset | None = "fast"
    method: str | Recipe | None = None
    n: int | None = None
    steps: int | None = None
    accuracy: float | None = None
    probes: Examples | None = None
    task: Task | None = None
    seed: int = 0
    memory: int | None = None

    def __post_init__(self) -> None:
        """Refuses values that mean nothing, before any work is done."""
        check_accuracy(self.accuracy)
        for name, value in (("n", self.n), ("steps", self.steps)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}.")

    def without_learning(self) -> "Asked":
        """The same, kernels rounded to nearest."""
        return dataclasses.replace(self, pipeline=self.pipeline.to_nearest())


@dataclasses.dataclass(frozen=True)
class Follow:
    """Who is told of the progress, and where state is kept."""

    watch: Watcher = SILENT
    place: Place = NOWHERE
    foreseen: Mapping[RunPart, float] = dataclasses.field(default_factory=dict)

    def begins(self, part: RunPart) -> None:
        """Tells of a part of the run that begins."""
        if self.watch.phase is not None:
            self.watch.phase(phase_of(part, self.foreseen))


def training_key(seed: int) -> Key[Array, ""]:
    """The key of training, which draws from another than what comes before and after it."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def following(watch: Watcher, folder: str | Path | None) -> Follow:
    """Those who follow a run that keeps its state in a folder, or nowhere."""
    return Follow(watch, Place(None if folder is None else Path(folder)))
