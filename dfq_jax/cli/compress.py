"""`dfq compress`: fewer channels, then fewer bits."""

from functools import partial

from dfq_jax.api.compress import compress, demanded
from dfq_jax.cli.arguments import settings_of
from dfq_jax.cli.options import CompressOptions
from dfq_jax.cli.verbs import make_to
from dfq_jax.report.console import Terminal


def compress_to(model: str, options: CompressOptions, terminal: Terminal) -> None:
    """`dfq compress`."""
    demanded(options.prune, options.budget)
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
        **settings_of(options),
    )
    make_to("compress", model, options, work, terminal)
