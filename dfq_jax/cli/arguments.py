"""From options of the command line to arguments of the Python API."""

from dfq_jax.api.request import Settings
from dfq_jax.cli.options import IntegerOptions, QuantizeOptions
from dfq_jax.quantization.rules import parse_rule
from dfq_jax.synthesis.run.memory import bytes_from


def settings_of(options: IntegerOptions) -> Settings:
    """What `quantize` is told."""
    how: Settings = {
        "scheme": options.scheme,
        "preset": options.preset,
        "layers": options.layers,
        "rules": tuple(parse_rule(text) for text in options.rule),
        "reconstruction": options.reconstruction,
        "reconstruction_steps": options.reconstruction_steps,
        "observer": options.observer,
        "weight_observer": options.weight_observer,
        "equalize": options.equalize,
        "relu6": options.relu6,
        "absorb": options.absorb,
        "split": options.split,
        "value_aware": options.value_aware,
        "bias_correction": options.bias_correction,
        "reestimate": options.reestimate,
        "raw_images": options.raw_images,
        "budget": options.budget,
        "sensitivity": options.sensitivity,
        "accuracy": options.accuracy,
        "task": options.task,
        "store": options.store,
        "seed": options.seed,
        "memory": None if options.memory is None else bytes_from(options.memory),
    }
    if not isinstance(options, QuantizeOptions):
        return how
    return {**how, "method": options.method, "n": options.n, "steps": options.steps}
