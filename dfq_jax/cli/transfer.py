"""`dfq adapt` and `dfq distill`: what is learned in float first, then fewer bits."""

from functools import partial
from pathlib import Path
from typing import Any

from dfq_jax.api.transfer import adapt, distill, distillation_for
from dfq_jax.cli.arguments import settings_of
from dfq_jax.cli.claims import check_apart
from dfq_jax.cli.options import AdaptOptions, DistillOptions
from dfq_jax.cli.verbs import MakingVerb, make_to
from dfq_jax.errors import UsageError
from dfq_jax.recipes.trainings import check_positive
from dfq_jax.report.console import Terminal


def adapt_to(model: str, options: AdaptOptions, terminal: Terminal) -> None:
    """`dfq adapt`.

    Raises:
      UsageError: without pictures, or for numbers below 1, before a model is read.
    """
    if options.images is None:
        raise UsageError(
            "adapting is to pictures, and there are none: give a folder or a zip of them with "
            "`images=`, without labels, of where the network will work."
        )
    told = {"epochs": options.epochs, "batch": options.batch}
    for name, value in told.items():
        check_positive(name, value)
    work = partial(adapt, **told, **settings_of(options))
    make_to(MakingVerb("adapt", options, work, options.scheme), model, terminal)


def distill_to(model: str, options: DistillOptions, terminal: Terminal) -> None:
    """`dfq distill`."""
    student = Path(options.student)
    check_apart(STUDENT=student if student.is_file() else None, output=options.output)
    distillation_for(options.train, options.batch)
    told: Any = {"student": options.student, "train": options.train, "batch": options.batch}
    how = settings_of(options)
    work = lambda network, images, **follow: distill(
        network, images=images, **told, **how, **follow
    )
    make_to(MakingVerb("distill", options, work, options.scheme), model, terminal)
