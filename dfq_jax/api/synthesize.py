"""Images by the name of a method: `dfq.synthesize` and `dfq.synthesize_set`."""

import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import jax
from jaxtyping import Array, Key

from dfq_jax.errors import UsageError, check_choice
from dfq_jax.examples import Examples, evidence_in
from dfq_jax.graph.graph import Model
from dfq_jax.io.artifacts.artifact import fingerprint
from dfq_jax.optim.compiling import compile_clock
from dfq_jax.optim.progress import Progress
from dfq_jax.recipes.presets import Choice, choice_for
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.processes import synthesize_shards
from dfq_jax.synthesis.terms.targets import Forward, Precision

Tell = Callable[[Progress], None] | None
Say = Callable[[str], None] | None


def synthesize(
    model: Model,
    n: int = 256,
    *,
    method: str = "best",
    key: int = 0,
    steps: int | None = None,
    batch: int | None = None,
    devices: int = 1,
    together: bool = False,
    dtype: str = "float32",
    remat: bool = False,
    memory: int | None = None,
    on_stage: Say = None,
    on_progress: Tell = None,
    state_folder: Path | None = None,
) -> Examples:
    """Makes images from the network alone.

    Args:
      model: network with its batch norms in place.
      n: how many images.
      method: one of `recipes.presets.METHODS`, e.g. `best` (ours). A network without usable
        batch-norm statistics gets noise, unless `gzsq`, which estimates them from the weights, or
        `psaq_vit`, which needs none, is asked for; the provenance notes it.
      key: seed; equal seeds give equal images on one kind of device.
      steps: of a batch; None for the method's own.
      batch: images optimised together; None for the method's own.
      devices: of this process, to use at most: each makes batches of its own.
      together: the devices share every batch instead.
      dtype: of weights and activations; statistics and images are float32 all the same.
      remat: compute activations again instead of keeping them, where that is possible.
      memory: bytes a step may take on a device; batches go through the network in parts that fit.
      on_stage: told how much memory a step will take, and how long compiling took.
      on_progress: called after every few steps.
      state_folder: keeps state here and resumes from it.

    Returns:
      Images in the network's normalised input space, with provenance.

    Raises:
      DfqError: UsageError for bad arguments or a state folder of another run or in use;
        DivergedError; ResourceError; UnsupportedModelError where the method cannot use the network.
    """
    how, choice = forward(dtype, remat, memory), choice_for(model, method, steps, batch)
    order, start = ordered(model, n, key, choice, how, devices, together), time.perf_counter()
    with compile_clock() as compiled:
        made = synthesize_images(
            *order.what,
            **order.options,
            on_stage=on_stage,
            on_progress=announcing(on_progress, on_stage, compiled),
            state_folder=state_folder,
            fingerprint=order.facts,
        )
    facts = {**order.facts, "final_losses": list(made.losses)}
    facts |= {"excluded": [str(u) for u in made.excluded], **durations(start, compiled)}
    if notes := [*choice.notes, *made.notes]:
        facts["notes"] = notes
    return Examples((made.images,), model.inputs, facts, evidence_in(facts))


class Contribution(NamedTuple):
    """What one process did for a set of images.

    Attributes:
      complete: whether the set is finished, by this process or another.
      method: how its images are made.
      excluded: batch norms left out, in words.
      notes: what was done differently than asked for, in sentences.
      seconds: it took.
      compile_seconds: of them, spent compiling.
    """

    complete: bool
    method: str
    excluded: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    compile_seconds: float


def synthesize_set(
    model: Model,
    n: int,
    folder: str | Path,
    *,
    method: str = "best",
    key: int = 0,
    steps: int | None = None,
    batch: int | None = None,
    devices: int = 1,
    together: bool = False,
    dtype: str = "float32",
    remat: bool = False,
    memory: int | None = None,
    on_stage: Say = None,
    on_progress: Tell = None,
    process: int | None = None,
    processes: int | None = None,
) -> Contribution:
    """Makes a set of images in a folder, or the part of one process in it; again, goes on with it.

    Args:
      model: as in `synthesize`, where more is said.
      n: how many images in all.
      folder: of the set; its parent exists.
      method: as in `synthesize`.
      key: seed.
      steps: of a batch.
      batch: images of a shard, optimised together.
      devices: of each process, to use at most.
      together: the devices share every batch.
      dtype: of weights and activations.
      remat: compute activations again.
      memory: bytes a step may take on one device.
      on_stage: told of memory and compilation.
      on_progress: called after every few steps.
      process: index of this process; by default that of `jax.distributed`.
      processes: how many there are; likewise.

    Returns:
      Whether the set is finished; `dfq_jax.synthesis.run.shards.ImageShards` reads it.

    Raises:
      DfqError: as `synthesize`; UsageError also if the folder holds other images.
    """
    how, choice = forward(dtype, remat, memory), choice_for(model, method, steps, batch)
    order, start = ordered(model, n, key, choice, how, devices, together), time.perf_counter()
    with compile_clock() as compiled:
        made = synthesize_shards(
            *order.what,
            folder,
            order.facts | ({"notes": list(choice.notes)} if choice.notes else {}),
            **order.options,
            on_stage=on_stage,
            on_progress=announcing(on_progress, on_stage, compiled),
            process=process,
            processes=processes,
        )
    told = tuple(map(str, made.excluded)), (*choice.notes, *made.notes)
    return Contribution(made.complete, choice.recipe.name, *told, **durations(start, compiled))


class Order(NamedTuple):
    """What is to be made.

    Attributes:
      what: model, recipe, number of images, key.
      options: precision and devices.
      facts: what the images depend on.
    """

    what: tuple[Model, Recipe, int, Key[Array, ""]]
    options: dict[str, Any]
    facts: dict[str, Any]


def ordered(
    model: Model, n: int, key: int, choice: Choice, how: Forward, devices: int, together: bool
) -> Order:
    """Checks what was asked for, and says what the images depend on.

    Raises:
      UsageError: for a bad number or seed.
    """
    if n < 1:
        raise UsageError(f"synthesize() needs n >= 1, got {n}.")
    check_seed(key)
    sharers = devices if together else 1
    facts = provenance(model, choice.recipe, n, key) | {"dtype": how.dtype, "together": sharers}
    options = {"how": how, "devices": devices, "mode": "together" if together else "apart"}
    return Order((choice.model, choice.recipe, n, jax.random.key(key)), options, facts)


def forward(dtype: str, remat: bool, memory: int | None) -> Forward:
    """How a network is computed.

    Raises:
      UsageError: for an unknown precision.
    """
    check_choice("dtype", dtype, get_args(Precision))
    return Forward(cast(Precision, dtype), remat=remat, memory=memory)


def check_seed(key: int) -> None:
    """Refuses seeds that would not fit, and so repeat those of others.

    Raises:
      UsageError: unless `key` is a whole number of 32 bits.
    """
    if not 0 <= key < 2**32:
        raise UsageError(f"a seed must be 0..{2**32 - 1}, got {key}.")


def provenance(model: Model, recipe: Recipe, n: int, key: int) -> dict[str, Any]:
    """What images depend on; a saved state is usable only if all of it is equal."""
    return {
        "method": recipe.name,
        "settings": dict(recipe.settings),
        "steps": recipe.steps,
        "batch": recipe.batch,
        "n": n,
        "seed": key,
        "weights_sha256": fingerprint(model),
        "size": list(model.contract.shape),
        "versions": {name: importlib.metadata.version(name) for name in ("dfq-jax", "jax")},
        "device": jax.devices()[0].platform,
    }


def announcing(on_progress: Tell, on_stage: Say, compiled: list[float]) -> Tell:
    """A listener to progress that first says how long the compiler took."""
    if on_stage is None:
        return on_progress
    said: list[str] = []

    def listen(at: Progress) -> None:
        if not said:
            said.append(f"compiled in {sum(compiled):.1f} s")
            on_stage(said[0])
        if on_progress is not None:
            on_progress(at)

    return listen


def durations(start: float, compiled: list[float]) -> dict[str, float]:
    """Seconds since the start, and those of them spent compiling."""
    seconds = round(time.perf_counter() - start, 2)
    return {"seconds": seconds, "compile_seconds": round(sum(compiled), 2)}
