"""What `dfq train` does, between parsed arguments and the Python API."""

from functools import partial
from typing import Any

from dfq_jax.api.train import train
from dfq_jax.base.parallel import Machine
from dfq_jax.cli.options import TrainOptions
from dfq_jax.cli.refusals import check_places, checks_of, refuse_together
from dfq_jax.cli.verbs import MakingVerb, make_to
from dfq_jax.quantization.rules import parse_rule
from dfq_jax.recipes.trainings import scheme_for
from dfq_jax.report.console import Terminal
from dfq_jax.synthesis.run.memory import bytes_from


def train_to(model: str, options: TrainOptions, terminal: Terminal) -> None:
    """`dfq train`."""
    start = options.start
    refuse_together(*checks_of(options), *check_places(model, options, start=start))
    scheme = None if start else options.scheme or scheme_for(options.method)
    work = partial(train, **settings_of(options))
    make_to(MakingVerb("train", options, work, scheme), model, terminal)


def settings_of(options: TrainOptions) -> dict[str, Any]:
    """What `train` is told."""
    return {
        "method": options.method,
        "start": options.start,
        "scheme": options.scheme,
        "layers": options.layers,
        "rules": tuple(parse_rule(text) for text in options.rule),
        "n": options.n,
        "steps": options.steps,
        "batch": options.batch,
        "gradient_bits": options.gradient_bits,
        "seed": options.seed,
        "accuracy": options.accuracy,
        "memory": None if options.memory is None else bytes_from(options.memory),
        "machine": Machine(devices=options.devices, dtype=options.dtype),
        "task": options.task,
        "store": options.store,
    }
