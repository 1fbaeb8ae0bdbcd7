"""What `dfq train` does, between parsed arguments and the Python API."""

from typing import Any

from dfq_jax.api.train import SCHEME, train
from dfq_jax.cli.claims import check_apart, claimed, state_folder
from dfq_jax.cli.config import CONFIG, other_model, settings_toml
from dfq_jax.cli.delivery import checked_and_timed, deliver
from dfq_jax.cli.options import TrainOptions
from dfq_jax.cli.sizes import foretell
from dfq_jax.cli.verbs import read_model, source_of
from dfq_jax.graph.query import parameter_count
from dfq_jax.io.artifacts.artifact import check_output_folder
from dfq_jax.io.onnx.export import check_size
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.quantization.rules import parse_rule
from dfq_jax.report.console import Terminal, one_line
from dfq_jax.report.trust import check_accuracy
from dfq_jax.synthesis.run.memory import bytes_from


def train_to(model: str, options: TrainOptions, terminal: Terminal) -> None:
    """`dfq train`."""
    inputs = {"images": options.images, "start": options.start}
    check_apart(MODEL=model, **inputs, output=options.output)
    with claimed(options.output):
        train_there(model, options, terminal)


def train_there(model: str, options: TrainOptions, terminal: Terminal) -> None:
    """`dfq train` once its output is claimed."""
    settings = settings_of(options)
    check_output_folder(options.output, options.force, names=(CONFIG,))
    with terminal.progress():
        loaded = read_model(model, options.reading, terminal)
        if other := other_model(options.config, loaded.sha256):
            terminal.note(f"  {one_line(other)}")
        check_size(4 * parameter_count(loaded.model))
        if options.start is None:
            scheme = parse_scheme(options.scheme or SCHEME)
            foretell(scheme, options.store or "packed", terminal)
        result = train(
            loaded.model,
            options.images,
            **settings,
            watch=terminal.watcher,
            state_folder=state_folder(options.output),
        )
        verified = checked_and_timed(result, terminal)
    source = source_of(loaded)
    config = settings_toml("train", options, source)
    deliver(result, verified, options.output, options.force, source, config, terminal)


def settings_of(options: TrainOptions) -> dict[str, Any]:
    """What `train` is told, checked before a model is read."""
    parse_scheme(options.scheme or SCHEME)
    check_accuracy(options.accuracy)
    return {
        "method": options.method,
        "start": options.start,
        "scheme": options.scheme,
        "layers": options.layers,
        "rules": tuple(parse_rule(text) for text in options.rule),
        "n": options.n,
        "steps": options.steps,
        "batch": options.batch,
        "seed": options.seed,
        "accuracy": options.accuracy,
        "memory": None if options.memory is None else bytes_from(options.memory),
        "task": options.task,
        "store": options.store,
    }
