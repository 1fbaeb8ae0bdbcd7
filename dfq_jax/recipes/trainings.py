"""What `dfq train --method` means: methods of training without data by name."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from dfq_jax.base.elsewhere import check_method
from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import Embedding, Task, predicts_tokens, said_task
from dfq_jax.numerics.bit_planes import TOP
from dfq_jax.numerics.ranges import MinMax
from dfq_jax.passes.before_quantization import Surgery
from dfq_jax.quantization.observers import Observers
from dfq_jax.recipes.aac_abn import aac_abn
from dfq_jax.recipes.adadfq import adadfq
from dfq_jax.recipes.ait import ait
from dfq_jax.recipes.best_training import IMAGES, SMALL_IMAGES, best_training
from dfq_jax.recipes.choi import choi
from dfq_jax.recipes.clusterq_qat import clusterq_qat
from dfq_jax.recipes.dir_net import dir_net
from dfq_jax.recipes.dsg_qat import dsg_qat
from dfq_jax.recipes.fdda_qat import centres_said, fdda_qat
from dfq_jax.recipes.gdfq import GDFQ_BY_CLASS, gdfq
from dfq_jax.recipes.hast import hast
from dfq_jax.recipes.intraq_qat import intraq_qat
from dfq_jax.recipes.ir_net import ir_net
from dfq_jax.recipes.pipeline import Pipeline, pipeline_for
from dfq_jax.recipes.qimera import qimera
from dfq_jax.recipes.quantface import quantface
from dfq_jax.recipes.retraining import retraining
from dfq_jax.recipes.rows import makes_rows
from dfq_jax.recipes.sizes import is_small
from dfq_jax.recipes.synq import synq
from dfq_jax.recipes.vertical_layered import vertical_layered
from dfq_jax.recipes.zaq import zaq
from dfq_jax.recipes.zhu import zhu
from dfq_jax.recipes.zsaq import zsaq
from dfq_jax.report.trust import judges_classes
from dfq_jax.training.method import Training


class TrainingOffer(NamedTuple):
    """A method as its name offers it.

    Attributes:
      make: the factory, with the paper's values for small images.
      large: its arguments for large ones.
      suited: (network, its task as somebody says) -> arguments that they decide.
      scheme: bits that it is for, where nobody says others.
      shown: (network, real images) -> what the factory is given first; None where it needs none.
    """

    make: Callable[..., Training]
    large: Mapping[str, Any] = {}
    suited: Callable[[Model, Task | None], Mapping[str, Any]] | None = None
    scheme: str = "w4a4"
    shown: Callable[[Model, Examples], Any] | None = None


def by_network(model: Model, task: Task | None = None) -> Mapping[str, Any]:
    """What students of ours are told of a network: `by_outputs`, and whether it reads rows."""
    if not makes_rows(model):
        return by_outputs(model, task)
    return {"classes": predicts_tokens(model), "rows": True, "features": 0.0, "batch": 8}


def our_student(model: Model, task: Task | None = None) -> Mapping[str, Any]:
    """`by_network`, with lower rates where it reads rows, of which there are few."""
    rates = {"learning_rate": 2e-4, "step_rate": 1e-4} if makes_rows(model) else {}
    return {**by_network(model, task), **rates}


def by_outputs(model: Model, task: Task | None = None) -> Mapping[str, Any]:
    """Whether a network's outputs are scores of classes; an embedding's are none."""
    return {"classes": judges_classes(model, task)}


FIXED = {"batch": 16, "learning_rate": 1e-6}
GENERATED = {**FIXED, "steps": 70_000, "warmup": 10_000}
"""What released code takes for ImageNet."""
SIGNS, WHOLE = "w1a8", "w8a8"
"""Kernels of signs; of 8 bits, of which fewer can be read."""
TRAININGS: Mapping[str, TrainingOffer] = {
    "best": TrainingOffer(best_training, {"n": IMAGES}, suited=our_student),
    "gdfq": TrainingOffer(gdfq, {**GENERATED, "kind": GDFQ_BY_CLASS}),
    "qimera": TrainingOffer(qimera, {**GENERATED, "mixed": 500, "length": 100, "by_class": True}),
    "dsg_qat": TrainingOffer(dsg_qat, {**GENERATED, "kind": GDFQ_BY_CLASS}),
    "clusterq_qat": TrainingOffer(clusterq_qat, {**GENERATED, "kind": GDFQ_BY_CLASS}),
    "aac_abn": TrainingOffer(aac_abn, {**GENERATED, "kind": GDFQ_BY_CLASS}),
    "adadfq": TrainingOffer(adadfq, {**GENERATED, "kind": GDFQ_BY_CLASS}),
    "fdda_qat": TrainingOffer(fdda_qat, {**GENERATED, "by_class": True}, shown=centres_said),
    "choi": TrainingOffer(choi),
    "zaq": TrainingOffer(zaq),
    "zhu": TrainingOffer(zhu, scheme=SIGNS),
    "ir_net": TrainingOffer(ir_net, scheme=SIGNS),
    "dir_net": TrainingOffer(dir_net, scheme=SIGNS),
    "vertical_layered": TrainingOffer(vertical_layered, suited=by_outputs, scheme=WHOLE),
    "intraq_qat": TrainingOffer(intraq_qat, {**FIXED, "drops": (100, 200, 350)}),
    "hast": TrainingOffer(hast, {**FIXED, "attention": 4000.0}),
    "synq": TrainingOffer(synq, {**FIXED, "attention": 4000.0, "hardest": 0.5}),
    "quantface": TrainingOffer(quantface, scheme="w6a6"),
    "ait": TrainingOffer(ait, {**GENERATED, "learning_rate": 1e-4, "kind": GDFQ_BY_CLASS}),
    "zsaq": TrainingOffer(zsaq, scheme="w2a8"),
}


def training_for(
    method: str | Training,
    steps: int | None = None,
    batch: int | None = None,
    *,
    model: Model | None = None,
    images: Examples | None = None,
    task: Task | None = None,
) -> Training:
    """A method of training, with its steps and batch replaced where given.

    Args:
      method: one of `TRAININGS`, or a `Training`, which is returned as it is.
      steps: of the student.
      batch: images of a step.
      model: the network, where a method has other values for large images.
      images: real ones, for methods that begin by looking at some.
      task: what the network is for, as somebody says; None for what its graph says.

    Raises:
      UsageError: for an unknown method, steps or batch below 1, or either beside a `Training`; for
        a method that looks at real images, where there are none.
    """
    for name, value in (("steps", steps), ("batch", batch)):
        check_positive(name, value)
        if value is not None and isinstance(method, Training):
            raise UsageError(
                f"{name}={value} beside a method of training, which has its own: make it with that."
            )
    if isinstance(method, Training):
        return method
    check_method("method of training", method, TRAININGS)
    offer = TRAININGS[method]
    given = {k: v for k, v in (("steps", steps), ("batch", batch)) if v is not None}
    if model is not None:
        large = {} if is_small(model.input) else offer.large
        given = {**large, **(offer.suited(model, task) if offer.suited else {}), **given}
    if offer.shown is not None:
        if model is None or images is None or not images.given:
            raise UsageError(
                f"{method} learns from a few real images, one of each class at least: give some by "
                "`images=`; those made from the network do not show what it has seen."
            )
        return judged_as(offer.make(offer.shown(model, images), **given), task)
    return judged_as(offer.make(**given), task)


def judged_as(method: Training, task: Task | None) -> Training:
    """A method whose students are judged by directions, where outputs are said to be such."""
    return method._replace(directions=True) if isinstance(task, Embedding) else method


def retraining_for(model: Model, steps: int, task: Task | str | None = None) -> Training:
    """How what is left of a pruned network learns from the whole one.

    Args:
      model: the whole one.
      steps: of the student.
      task: what the network is for, as somebody says, or the name of that.

    Raises:
      UsageError: for steps below 1, and an unknown task.
    """
    check_positive("train", steps)
    said, n = said_task(task), SMALL_IMAGES if is_small(model.input) else IMAGES
    return judged_as(retraining(steps=steps, n=n, **by_network(model, said)), said)


def check_positive(name: str, value: int | None) -> None:
    """Refuses a number below 1.

    Raises:
      UsageError: naming it.
    """
    if value is not None and value < 1:
        raise UsageError(f"{name} must be at least 1, got {value}.")


def scheme_for(method: str | Training) -> str:
    """Bits that a method is for, where nobody says others."""
    offer = TRAININGS.get(method) if isinstance(method, str) else None
    return (offer or TrainingOffer(best_training)).scheme


def check_kernels(method: Training, bits: Collection[int]) -> None:
    """Refuses a method for kernels of 1 bit, or that cuts those of 8, where there are none.

    Args:
      method: of training.
      bits: of kernels, those that will be.

    Raises:
      UsageError: naming the scheme that has.
    """
    if method.student.signs is not None and 1 not in bits:
        raise UsageError(
            f"{method.name} trains kernels of 1 bit, and there are none: take a scheme like "
            f'`scheme="{SIGNS}"` or `scheme="w1"`.'
        )
    if method.student.widths and TOP not in bits:
        raise UsageError(
            f"{method.name} cuts kernels of {TOP} bits, and there are none: take a scheme like "
            f'`scheme="{WHOLE}"`.'
        )


def pipeline_of_start(method: Training, model: Model, **names: Any) -> Pipeline:
    """How a network is quantized before it is trained.

    As in the papers: nothing is done to it, ranges are the extremes of images, and kernels are
    rounded to nearest. Ours begins where learned rounding ends.

    Args:
      method: whose start it is.
      model: the network.
      **names: of `pipeline_for`: scheme, layers, rules, store.
    """
    if method.start == "post_training":
        return pipeline_for(model, preset="best", **names)
    extremes = Observers(MinMax(), MinMax())
    bare = {"surgery": Surgery(reach=None), "observers": extremes, "bias": "none", "spare": False}
    bare["reestimate"] = method.reestimate
    return dataclasses.replace(pipeline_for(model, **names), **bare)
