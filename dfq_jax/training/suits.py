"""What a method of training asks of a network and of images, before any work is done."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from dfq_jax.errors import UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import predicts_tokens
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.synthesis.terms.targets import batch_norm_targets
from dfq_jax.training.images import generator_refusal
from dfq_jax.training.method import GeneratedImages, SoftRows, Training
from dfq_jax.training.soft_tokens import table_of
from dfq_jax.types import InputContract, in_words


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
            f"{method.name} takes {method.batch} {method.examples} a step and there are {count} to "
            f"learn from: give more, or `batch={max(count, 1)}`."
        )


def check_classes(method: Training, teacher: Model) -> None:
    """Refuses terms that need scores of classes or of the next token, where there are none.

    Raises:
      UsageError: naming them.
    """
    if method.rows and predicts_tokens(teacher):
        return
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
      UsageError: if it is no classifier, or reads images that no generator makes, or rows where
        the method shows images.
      UnsupportedModelError: without statistics to match, without what the losses compare, or
        without a table where rows are mixtures of what it has.
    """
    check_source(method, model)
    check_classes(method, model)
    method.watch(fold_batch_norm(model).graph)
    if isinstance(method.images, GeneratedImages):
        check_shape(method.images, model)
        batch_norm_targets(model)
    if isinstance(method.images, SoftRows):
        table_of(model)


def check_source(method: Training, model: Model) -> None:
    """Refuses images for a network of rows, and rows for one of images.

    Raises:
      UsageError: naming what it reads, and what does.
    """
    images = len(model.inputs) == 1 and isinstance(model.inputs[0], InputContract)
    if images == method.rows:
        shows, other = ("rows of ids", '"best"') if method.rows else ("images", '"best" or "zsaq"')
        raise UsageError(
            f"{method.name} shows {shows}, and this network reads {in_words(model.inputs)}: take "
            f"method {other}."
        )


def check_shape(images: GeneratedImages, model: Model) -> None:
    """Refuses images of a size that a generator does not make.

    Raises:
      UsageError: with both sizes.
    """
    if refusal := generator_refusal(images.kind, model.contract.shape):
        raise UsageError(refusal)


def example(model: Model) -> Shaped[Array, "1 ..."]:
    """One example of zeros."""
    return jnp.zeros((1, *model.input.shape), model.input.dtype)
