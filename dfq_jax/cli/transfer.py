"""`dfq adapt` and `dfq distill`: what is learned in float first, then fewer bits."""

from functools import partial
from pathlib import Path
from typing import Any

from dfq_jax.api.transfer import adapt, distill
from dfq_jax.cli.arguments import settings_of
from dfq_jax.cli.options import AdaptOptions, DistillOptions
from dfq_jax.cli.refusals import check_places, checks_of, refuse_together
from dfq_jax.cli.verbs import MakingVerb, make_to
from dfq_jax.errors import UsageError
from dfq_jax.recipes.trainings import check_positive
from dfq_jax.report.console import Terminal


def adapt_to(model: str, options: AdaptOptions, terminal: Terminal) -> None:
    """`dfq adapt`.

    Raises:
      UsageError: without pictures, or for numbers below 1, before a model is read.
    """
    refuse_together(
        partial(check_given, options.images), *checks_of(options), *check_places(model, options)
    )
    told = {"epochs": options.epochs, "batch": options.batch}
    work = partial(adapt, **told, **settings_of(options))
    make_to(MakingVerb("adapt", options, work, options.scheme), model, terminal)


def check_given(images: Path | None) -> None:
    """Refuses to adapt to nothing.

    Raises:
      UsageError: without pictures.
    """
    if images is None:
        raise UsageError(
            "adapting is to pictures, and there are none: give a folder or a zip of them with "
            "`images=`, without labels, of where the network will work."
        )


def distill_to(model: str, options: DistillOptions, terminal: Terminal) -> None:
    """`dfq distill`."""
    student = Path(options.student)
    read = student if student.is_file() else None
    refuse_together(
        *checks_of(options),
        partial(check_positive, "train", options.train),
        *check_places(model, options, STUDENT=read),
    )
    told: Any = {"student": options.student, "train": options.train, "batch": options.batch}
    how = settings_of(options)
    work = lambda network, images, **follow: distill(
        network, images=images, **told, **how, **follow
    )
    make_to(MakingVerb("distill", options, work, options.scheme), model, terminal)
