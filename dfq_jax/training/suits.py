"""What a method of training asks of a network and of images, before any work is done."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.errors import UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.synthesis.terms.targets import batch_norm_targets
from dfq_jax.training.images import generator_refusal
from dfq_jax.training.method import GeneratedImages, Training


def check_images(method: Training, count: int) -> None:
    """Refuses fewer images than a step takes, and none where some are shown beside those made.

    Raises:
      UsageError: with both numbers.
    """
    if isinstance(method.images, GeneratedImages):
        if method.images.real and (not count or method.images.lessons > 1):
            raise UsageError(
                f"{method.name} shows {method.images.real} real images in every round: there must "
                f"be some, and one lesson a round; got {count} and {method.images.lessons}."
            )
    elif count < method.batch:
        raise UsageError(
            f"{method.name} takes {method.batch} images a step and there are {count} to learn "
            f"from: give more, or `batch={max(count, 1)}`."
        )


def check_classes(method: Training, teacher: Model) -> None:
    """Refuses terms that need scores of classes, for a network that gives none.

    Raises:
      UsageError: naming them.
    """
    shape = jax.eval_shape(lambda m: evaluate(m, example(m))[0][0], teacher).shape
    if method.classes and (len(shape) != 2 or shape[1] < 2):
        raise UsageError(
            f"{method.name} needs a classifier for {', '.join(method.classes)}, and this network "
            f'puts out {shape[1:]}: `method="best"` needs none.'
        )


def check_suits(method: Training, model: Model) -> None:
    """Refuses a network that a method cannot train, before images are made for it.

    Args:
      method: of training.
      model: the float network with its batch norms.

    Raises:
      UsageError: if it is no classifier, or reads images that no generator makes.
      UnsupportedModelError: without statistics to match, or without what the losses compare.
    """
    check_classes(method, model)
    method.watch(fold_batch_norm(model).graph)
    if isinstance(method.images, GeneratedImages):
        check_shape(method.images, model)
        batch_norm_targets(model)


def check_shape(images: GeneratedImages, model: Model) -> None:
    """Refuses images of a size that a generator does not make.

    Raises:
      UsageError: with both sizes.
    """
    if refusal := generator_refusal(images.kind, model.contract.shape):
        raise UsageError(refusal)


def example(model: Model) -> Float[Array, "1 h w c"]:
    """One image of zeros."""
    return jnp.zeros((1, *model.contract.shape))
