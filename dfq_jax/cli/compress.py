"""`dfq compress`: fewer channels or weights, then fewer bits."""

from functools import partial
from pathlib import Path
from typing import Any

from dfq_jax.api.compress import compress
from dfq_jax.api.result import ORIGINAL, Result
from dfq_jax.api.shrinking import demanded, stays_float
from dfq_jax.cli.arguments import settings_of
from dfq_jax.cli.options import CompressOptions
from dfq_jax.cli.refusals import check_places, checks_of, refuse_together
from dfq_jax.cli.verbs import MakingVerb, make_to
from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.io.artifacts.artifact import weights_sha256
from dfq_jax.io.artifacts.output_folder import MANIFEST, read_manifest
from dfq_jax.report.console import Terminal


def compress_to(model: str, options: CompressOptions, terminal: Terminal) -> None:
    """`dfq compress`."""
    refuse_together(
        *checks_of(options),
        partial(demanded, options.prune, options.budget, options.sparsity, options.bits),
        *check_places(model, options),
    )
    work = partial(
        compress,
        prune=options.prune,
        criterion=options.criterion,
        restore=options.restore,
        among=options.among,
        channels=options.channels,
        least=options.least,
        round_to=options.round_to,
        untouched=options.untouched,
        sparsity=options.sparsity,
        bits=options.bits,
        train=options.train,
        **settings_of(options),
    )

    def make(network: Model, *given: Any, **how: Any) -> Result:
        if not options.force:
            check_original(network, options.output)
        return work(network, *given, **how)

    scheme = None if stays_float(options.scheme) else options.scheme
    make_to(MakingVerb("compress", options, make, scheme), model, terminal)


def check_original(model: Model, folder: Path) -> None:
    """Refuses to replace what was pruned from another network.

    Raises:
      UsageError: if the folder holds such a network.
    """
    if not (folder / MANIFEST).is_file():
        return
    known = read_manifest(folder)["report"].get(ORIGINAL)
    if known not in (None, weights_sha256(model)):
        raise UsageError(
            f"{folder} holds a network pruned from another one (weights {known[:12]}...): choose "
            "another output, or replace it with --force."
        )
