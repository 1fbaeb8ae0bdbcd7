"""What a network is for: how its outputs are read, all of them and part by part.

A graph mostly says it itself (`task_of`): softmax, sigmoid and shapes tell scores from values. What
no graph tells can be said, such as that a vector is an embedding and no row of scores.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from dfq_jax.errors import DataError, UsageError, check_choice
from dfq_jax.graph.graph import Model
from dfq_jax.graph.heads import Part, heads_of, is_direction
from dfq_jax.graph.ops import Activation, Add, Clip, Sub
from dfq_jax.graph.query import output_shapes
from dfq_jax.types import Input, InputContract, Tokens


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A vector of scores says which class an image has; several outputs, several questions."""


@dataclasses.dataclass(frozen=True)
class DenseClassifier:
    """Every position has a class, as in segmentation."""


@dataclasses.dataclass(frozen=True)
class ImageToImage:
    """Pixels come out, and are compared by their peak signal to noise ratio.

    Attributes:
      low: value of black in the output.
      high: value of white.
      luma: compare only the luma of RGB (BT.601), as super-resolution is judged.
      border: pixels at each side that do not count.
      rounded: compare what is left after rounding to 8 bits.
    """

    low: float = 0.0
    high: float = 1.0
    luma: bool = False
    border: int = 0
    rounded: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for a range that is none."""
        if not self.low < self.high or self.border < 0:
            raise UsageError(f"black must lie below white, and no border below 0; got {self}.")


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A vector stands for what was read, and only its direction counts."""


@dataclasses.dataclass(frozen=True)
class Detector:
    """Scores say whether there is something, and values where: boxes, offsets, masks."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Every position has scores of the token that comes next."""


@dataclasses.dataclass(frozen=True)
class PlainValues:
    """Numbers that decide nothing."""


Task = (
    Classifier | DenseClassifier | ImageToImage | Embedding | Detector | LanguageModel | PlainValues
)
"""What a network is for."""

Noun = Literal["image", "row"]
"""What people call one example for an input."""

A_NOUN: Mapping[Noun, str] = {"image": "an image", "row": "a row"}
"""{noun: with its article}."""

TASKS: Mapping[str, type[Task]] = {
    "classifier": Classifier,
    "dense": DenseClassifier,
    "image": ImageToImage,
    "embedding": Embedding,
    "detector": Detector,
    "language": LanguageModel,
    "values": PlainValues,
}
"""{what users call it: the task}."""


def task_named(name: str) -> Task:
    """The task that users call so, with its usual options.

    Raises:
      UsageError: if there is none.
    """
    check_choice("task", name, tuple(TASKS))
    return TASKS[name]()


def said_task(task: "Task | str | None") -> "Task | None":
    """The task that somebody names or gives; None if nobody does.

    Raises:
      UsageError: for an unknown name.
    """
    return task_named(task) if isinstance(task, str) else task


def name_of(task: Task) -> str:
    """What users call a task."""
    return next(name for name, kind in TASKS.items() if isinstance(task, kind))


def task_to_json(task: Task) -> dict[str, Any]:
    """A task as `{"name", ...options}`."""
    return {"name": name_of(task), **dataclasses.asdict(task)}


def task_from_json(data: Any) -> Task:
    """The task that `task_to_json` wrote.

    Raises:
      DataError: on anything else.
    """
    try:
        return TASKS[data["name"]](**{key: data[key] for key in data if key != "name"})
    except (KeyError, TypeError, UsageError) as error:
        raise DataError(f"{data!r} is no task; known are {', '.join(TASKS)}.") from error


def task_of(model: Model) -> Task:
    """What a network is for, as far as its graph and its inputs tell.

    One output that is an image like the one that is read is an image (`restored`); scores of every
    token of a text are a language model's; one vector divided by its length is an embedding. Of the
    rest the parts of the outputs decide.
    """
    parts = [part for head in heads_of(model) for part in head.parts]
    if (image := restored(model)) is not None:
        return image
    if predicts_tokens(model):
        return LanguageModel()
    nodes = model.graph.by_name
    if len(parts) == 1 and parts[0].where.ndim == 1 and is_direction(nodes, parts[0].tensor):
        return Embedding()
    decide = [part.kind != "values" for part in parts]
    if not any(decide):
        return PlainValues()
    if not all(decide):
        return Detector()
    dense = any(
        part.kind == "classes" and part.axis is not None and several(part) for part in parts
    )
    return DenseClassifier() if dense else Classifier()


def noun_of(read: Input) -> Noun:
    """What people call one example for an input: lines, spectra, ids and numbers are rows."""
    return "image" if isinstance(read, InputContract) and read.is_picture else "row"


def several(part: Part) -> bool:
    """Whether an image has more than one decision of a part between classes."""
    return part.axis is not None and part.where.size > part.where.shape[part.axis]


def restored(model: Model) -> ImageToImage | None:
    """The task of a network whose one output is an image like the one it reads; None of others.

    An output of the same size is one if it says so: it adds to what was read, as a denoiser does,
    or its values end as those of pixels do. Masks of one channel behind a sigmoid are decisions.
    """
    read = model.inputs[0] if len(model.inputs) == 1 else None
    if not isinstance(read, InputContract) or len(model.graph.outputs) != 1:
        return None
    if any(part.curve == "softmax" for head in heads_of(model) for part in head.parts):
        return None
    shape = output_shapes(model)[model.graph.outputs[0]][1:]
    if len(shape) != 3 or shape[2] != read.channels:
        return None
    if shape[0] > read.height and shape[1] > read.width:
        return ImageToImage(*read.value_range)
    return ended(model, read) if shape == read.shape else None


def ended(model: Model, read: InputContract) -> ImageToImage | None:
    """The task of a network that returns an image of its own size, by the last operators."""
    nodes = model.graph.by_name
    last = nodes.get(model.graph.outputs[0])
    colours = read.channels >= 3
    match last.op if last is not None else None:
        case Activation("sigmoid") if colours:
            return ImageToImage()
        case Activation("tanh") if colours:
            return ImageToImage(-1.0, 1.0)
        case Clip(low, high) if low is not None and high is not None:
            return ImageToImage(low, high)
        case Add() | Sub() if last is not None and set(last.inputs) & set(model.graph.inputs):
            return ImageToImage(*read.value_range)
        case _:
            return None


def predicts_tokens(model: Model) -> bool:
    """Whether the first output has scores of every id at every token of the first input."""
    read = model.inputs[0] if model.inputs else None
    if not isinstance(read, Tokens) or read.mask or not model.graph.outputs:
        return False
    return output_shapes(model)[model.graph.outputs[0]][1:] == (read.length, read.vocabulary)


def parts_of(model: Model, task: Task | None = None) -> tuple[Part, ...]:
    """All parts of all outputs, read as the task says.

    Args:
      model: the network.
      task: what it is for, as somebody says; None for what its graph tells.
    """
    parts = tuple(part for head in heads_of(model) for part in head.parts)
    if task is not None:
        return tuple(read_as(part, task) for part in parts)
    return tuple(read_as(part, image) for part in parts) if (image := restored(model)) else parts


def read_as(part: Part, task: Task) -> Part:
    """A part as a task reads it; what its own softmax or sigmoid says stands in a classifier."""
    match task:
        case ImageToImage() | Embedding() | PlainValues():
            return dataclasses.replace(part, kind="values", axis=None, certain=True)
        case Detector():
            return part
        case Classifier() | DenseClassifier() | LanguageModel():
            pass
    if part.curve is not None and part.kind != "values":
        return part
    shape = part.where.shape
    if not shape or shape[-1] == 1:
        return dataclasses.replace(part, kind="signs", axis=None, certain=True)
    return dataclasses.replace(part, kind="classes", axis=len(shape) - 1, certain=True)
