"""How long the parts of a quantization are foreseen to take, before any of them begins.

Only their proportions matter much: the pace of the machine shows as soon as the first part is over.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import macs
from dfq_jax.optim.progress import RunPhase
from dfq_jax.recipes import probes
from dfq_jax.recipes.expense import SHARE, expected_seconds, speed
from dfq_jax.recipes.presets import ImageBudget, choice_for
from dfq_jax.recipes.rows import makes_rows
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.effort import PASSING, STEP
from dfq_jax.reconstruction.footprint import Method
from dfq_jax.reconstruction.method import batch_of

RunPart = Literal[
    "making images",
    "pruning",
    "calibrating",
    "learning",
    "training",
    "making probes",
    "judging",
    "verifying",
]
PARTS: tuple[RunPart, ...] = get_args(RunPart)
COMPILING: Mapping[RunPart, float] = {
    **{"making images": 0.29, "pruning": 0.18, "calibrating": 0.18, "learning": 0.30},
    "training": 0.60,
    **{"making probes": 0.29, "judging": 0.17, "verifying": 0.08},
}
"""Seconds for each node of a network on one CPU core, mostly spent compiling, of images for each
stage of their making: means of first runs of EfficientNet-lite0 and ResNet-20, but for `pruning`,
`learning` and `training`, which are by comparison."""
LOOKS: Mapping[RunPart, float] = {
    **{"pruning": 8.0, "calibrating": 4.0, "learning": 60.0, "verifying": 20.0}
}
"""Passes through the network for each image."""
TRAINED = 8.0
"""The same of a step of training: teacher, student, and the student's slopes."""
VERIFIED = 16
INWARDS = 4
"""How much smaller than the image is what units read, in the mean; steps take few large maps."""


def foreseen(
    model: Model,
    making: ImageBudget | None,
    images: int,
    *,
    methods: Sequence[Method],
    judges: bool,
    shown: int = 0,
) -> dict[RunPart, float]:
    """Seconds of each part that there will be, in order.

    Args:
      model: the network.
      making: how images are made; None where they were given.
      images: how many there are to calibrate with.
      methods: by which rounding is learned or solved.
      judges: whether the expected loss is estimated, from probes that are made.
      shown: images that a student is shown in all, where one is trained.
    """
    nodes, rate = len(model.graph.nodes), SHARE * speed()
    image = sum(macs(model).values()) / rate
    there = {"learning": bool(methods), "training": shown > 0, "making probes": judges}
    there |= {"making images": making is not None, "pruning": False}
    found: dict[RunPart, float] = {
        part: COMPILING[part] * nodes for part in PARTS if there.get(part, True)
    }
    if making is not None:
        found["making images"] *= stages_of(model, making)
        found["making images"] += expected_seconds(model, making, rate)
    found["calibrating"] += LOOKS["calibrating"] * images * image
    if methods:
        found["learning"] += image * sum(passes(method, model, images) for method in methods)
    if shown:
        found |= training_foreseen(model, shown)
    if judges:
        probing = ImageBudget("best", *probes.base_of(model))
        new = 0 if making == probing else stages_of(model, probing)  # the same programs, or others
        found["making probes"] *= new
        found["making probes"] += expected_seconds(model, probing, rate)
        found["judging"] += 2 * probes.PROBES * image
    found["verifying"] += LOOKS["verifying"] * VERIFIED * image
    return found


def passes(method: Method, model: Model, images: int) -> float:
    """How often an image passes through the network while a method learns or solves.

    A unit takes all steps, but is a part of the network: together they take the steps of one.
    """
    if isinstance(method, ClosedForm):
        return LOOKS["learning"] * images
    read = model.input.shape
    inside = tuple(max(size // INWARDS, 1) for size in read[:-1] or read)
    batch = batch_of(method, (1, *inside, 1))
    solving = LOOKS["learning"] if method.start else float(PASSING)
    return solving * images + STEP * batch * sum(phase.steps for phase in method.phases)


def pruning_foreseen(model: Model, images: int) -> dict[RunPart, float]:
    """Seconds that cutting channels out takes, and restoring what is left on so many images."""
    looks = LOOKS["pruning"] * images * sum(macs(model).values()) / (SHARE * speed())
    return {"pruning": COMPILING["pruning"] * len(model.graph.nodes) + looks}


def training_foreseen(model: Model, shown: int) -> dict[RunPart, float]:
    """Seconds in which a student learns that is shown so many images in all."""
    image = sum(macs(model).values()) / (SHARE * speed())
    return {"training": COMPILING["training"] * len(model.graph.nodes) + TRAINED * shown * image}


def stages_of(model: Model, budget: ImageBudget) -> int:
    """How many programs make images: one a stage, since each has its own size; none noise."""
    if makes_rows(model):
        return 1
    return len(choice_for(model, budget.method).recipe.stages)


def phase_of(part: RunPart, seconds: Mapping[RunPart, float]) -> RunPhase:
    """A part as it is told to whoever follows; one that was not foreseen takes no time."""
    rest = sum(seconds.get(later, 0.0) for later in PARTS[PARTS.index(part) + 1 :])
    return RunPhase(part, seconds.get(part, 0.0), rest)


def phase_of_synthesis(model: Model, method: str, n: int, steps: int | None) -> RunPhase:
    """All of `dfq synthesize`; noise takes no time."""
    found = choice_for(model, method, steps).recipe
    budget = ImageBudget(found.name, n, found.steps)
    compiling = COMPILING["making images"] * len(model.graph.nodes) * len(found.stages)
    return RunPhase("making images", compiling + expected_seconds(model, budget), 0.0)
