"""FDDA with training: GDFQ whose deep statistics are those of one real image of each class.

Zhong et al. 2022, "Fine-grained Data Distribution Alignment for Post-Training Quantization", as
released for ImageNet. Not free of data: `class_centres` needs a real image of each class, and the
student is shown them too. The generator makes two batches a step, each normalised on its own: `A`
of all classes, `B` of one (`recipes.fdda` has its terms). The student learns from `A` and from real
images, cropped and mirrored; released code fails where it crops what was made.

    generator:  0.5 CE_A + 0.5 CE_B + 0.2 BNS_A + 0.9 D_BNS_B + 0.01 C_BNS_B
    student:    CE + 20 T^2 KL,   KL averaged over images,  T = 20

Labels of real images are what the teacher says. The first epochs' draws of pure noise are left out,
as is the return of the student's rate, which falls to 0 along a cosine once.
"""

import jax.numpy as jnp
import optax

from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.recipes.fdda import terms_of
from dfq_jax.recipes.gdfq import EPOCH, TRACKED, quarters
from dfq_jax.recipes.qat import CROPPED
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.synthesis.terms.centres import ClassCentres, class_centres, logits_and_stats
from dfq_jax.synthesis.terms.one_class import centres_for, one_class, usable_classes
from dfq_jax.training.generator import GeneratorKind, labelled_noise, plain_noise
from dfq_jax.training.losses import distillation, label_loss
from dfq_jax.training.method import GeneratedImages, Training, cosine_sgd, milestones
from dfq_jax.training.student import StudentKind
from dfq_jax.training.tracking import Tracking
from dfq_jax.values import bound

SHOWN = 32
"""Real images of a forward pass."""


def fdda_qat(
    centres: ClassCentres,
    *,
    steps: int = 79_200,
    batch: int = 16,
    learning_rate: float = 1e-4,
    warmup: int = 800,
    statistics: float = 0.2,
    distort: float = 0.9,
    align: float = 0.01,
    noise: tuple[float, float] = (0.5, 1.0),
    alpha: float = 20.0,
    temperature: float = 20.0,
    by_class: bool = False,
) -> Training:
    """FDDA on GDFQ's generator and schedule for CIFAR, of which the paper says nothing.

    For ImageNet it takes `steps=70_000, learning_rate=1e-6, warmup=10_000, by_class=True`.

    Args:
      centres: of the classes, from real images (`parts.class_centres`).
      steps: of the student.
      batch: images of a step that are made, and real ones beside them.
      learning_rate: of the student's SGD.
      warmup: steps of the generator alone.
      statistics: weight of the recorded statistics.
      distort: weight of the distance to a point drawn around the centre.
      align: weight of the distance to the centre.
      noise: deviations of that draw, of means and of variances, absolute.
      alpha: weight of the KL.
      temperature: of the KL.
      by_class: labels are told by norms, as for ImageNet, instead of by codes.

    Raises:
      ValueError: if there is no class whose images the network gets right.
    """
    drawn = plain_noise if by_class else labelled_noise
    alone = bound(one_class, usable_classes(centres, reliable=True))
    generated = GeneratedImages(
        kind=GeneratorKind(*drawn(), by_class=by_class),
        terms=terms_of((statistics, distort, align), noise, positive=False, mixed=True),
        optimizer=milestones(optax.adam, 1e-3, quarters(steps + warmup)),
        warmup=warmup,
        prepare=bound(centres_for, centres),
        second=drawn(labels=alone)[1],
        real=batch,
        augment=CROPPED.augment,
    )
    kl = distillation(temperature=temperature)
    return Training(
        name="fdda_qat",
        steps=steps,
        batch=batch,
        student=StudentKind(live=True, tracking=Tracking(min(max(warmup, 1), TRACKED))),
        images=generated,
        terms=(Term("CE", 1.0, label_loss, True), Term("KL", alpha, kl, True)),
        optimizer=cosine_sgd(learning_rate, steps, decay=1e-4),
        epoch=EPOCH,
    )


def centres_said(model: Model, images: Examples) -> ClassCentres:
    """Statistics of the class that a network sees in each real image, for its name on a command.

    Raises:
      UsageError: if the network is no classifier.
      UnsupportedModelError: if it has no usable batch-norm statistics.
    """
    shown = images.images
    parts = [
        logits_and_stats(model, {}, shown[i : i + SHOWN])[0] for i in range(0, len(shown), SHOWN)
    ]
    scores = jnp.concatenate(parts)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise UsageError(
            "fdda_qat needs a classifier, for the classes of real images, and this network puts "
            f'out {scores.shape[1:]}: `method="best"` needs none.'
        )
    return class_centres(model, shown, jnp.argmax(scores, -1), scores.shape[1])
