"""A second network that images should look different to.

Reference:
  Yin et al. 2020, "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion" (adaptive).
"""

from typing import Literal

from jaxtyping import Array, Key, PyTree

from dfq_jax.errors import UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import classes_of, refusal_of_half
from dfq_jax.synthesis.sources.pixels import from_natural
from dfq_jax.synthesis.terms.base import Observed
from dfq_jax.synthesis.terms.classes import competition
from dfq_jax.synthesis.terms.targets import Targets

Resolution = Literal["multi", "full"]
"""Of the images while they are made: some steps at half the size, or none."""


def agreement(exchanged: bool, observed: Observed) -> Array:
    """The competition with the student that the recipe shares."""
    student = observed.shared
    images = from_natural(observed.natural, student.contract)
    logits = evaluate(student, images)[0][0]
    return competition(logits, observed.logits, exchanged=exchanged)


def admitted(
    student: Model | None,
    resolution: Resolution,
    model: Model,
    targets: Targets,
    key: Key[Array, ""],
) -> PyTree:
    """The student, for the terms to see; nothing without one.

    Raises:
      UsageError: if student and network do not go together, or one cannot read half the size.
    """
    del targets, key
    if resolution == "multi":
        for network in (model, student):
            reads_half_the_size(network)
    if student is None:
        return ()
    kind = lambda m: (m.contract.shape, classes_of(m))
    if kind(student) != kind(model):
        raise UsageError(
            "deepinversion: the student must read the images of the network and know its classes: "
            f"it has (image, classes) = {kind(student)}, the network {kind(model)}."
        )
    return student


def reads_half_the_size(model: Model | None) -> None:
    """Raises UsageError for a network that only runs at its own image size."""
    if model is not None and (reason := refusal_of_half(model)):
        raise UsageError(f'deepinversion: {reason}. Use resolution="full".')
