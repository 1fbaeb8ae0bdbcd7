"""A start from an output folder: the network in it, and the float one that it stands for."""

from pathlib import Path

import jax
import jax.numpy as jnp

from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.io.artifacts.artifact import load_artifact, weights_sha256
from dfq_jax.passes.before_quantization import Surgery
from dfq_jax.passes.level import LEVEL
from dfq_jax.quantization.plan import Plan, Rule, parse_scheme
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.recipes.dfq import DEFAULT_SURGERY, levelling, operate
from dfq_jax.recipes.dfq_ranges import coarse_tensors
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.synthesis.terms.targets import distrusted_norms

FAR = 0.5
"""Squared distance of kernels, in units of their power, that no rounding makes: channels were
scaled in another way."""


def begun_in(
    folder: Path, model: Model, scheme: str | None, layers: str | None, rules: tuple[Rule, ...]
) -> Quantized:
    """The network of an output folder, as a start for training.

    Args:
      folder: of `quantize` or `train`.
      model: the float network.
      scheme: as asked for, None for that of the folder.
      layers: likewise.
      rules: bits of particular layers, which a start has already.

    Raises:
      UsageError: if the folder is of another network or plan, naming the difference.
      DataError: if it is damaged.
    """
    found = load_artifact(folder)
    if rules:
        raise UsageError(
            f"{folder} has its bits already, and `rules=` would change them: leave one of the two "
            "out."
        )
    if (saved := found.manifest.get("weights_sha256")) != weights_sha256(model):
        name = found.manifest.get("source", {}).get("name") or "weights"
        raise UsageError(
            f"{folder} was made from another network ({name}, SHA-256 of its weights {saved}, of "
            f"this one {weights_sha256(model)}): start from a folder made from this one."
        )
    check_plan(folder, found.quantized.plan, scheme, layers)
    return Quantized(found.quantized, reference_of(folder, found.quantized, model), True)


def check_plan(folder: Path, plan: Plan, scheme: str | None, layers: str | None) -> None:
    """Refuses a start of another plan.

    Raises:
      UsageError: naming what differs.
    """
    asked = {
        "scheme": (str(parse_scheme(scheme)) if scheme else None, str(plan.scheme)),
        "layers": (layers, plan.layers),
    }
    for name, (wanted, there) in asked.items():
        if wanted is not None and wanted != there:
            raise UsageError(
                f'{folder} has {name} {there}, and `{name}="{wanted}"` was asked for: leave that '
                "out, or start from another folder."
            )


def reference_of(folder: Path, quantized: QuantizedModel, model: Model) -> Model:
    """The float network that a quantized one stands for, node for node and channel for channel.

    A folder keeps the float network as it was read; what was done to it first shows in the kernels.

    Raises:
      UsageError: if nothing that is done here leads to these kernels.
    """
    distrusted = distrusted_norms(model)
    whole = operate(model, DEFAULT_SURGERY, distrusted=distrusted)
    plain = operate(model, Surgery(reach=None), distrusted=distrusted)
    level = levelling(whole, LEVEL, only=coarse_tensors(quantized.plan))[0]
    fitting = [m for m in (whole, plain, level) if m.graph == quantized.model.graph]
    apart = [(kernels_apart(m, quantized.model), m) for m in fitting]
    nearest = min(apart, key=lambda each: each[0], default=None)
    if nearest is None or nearest[0] > FAR:
        raise UsageError(
            f"{folder} was made by changing the float network in a way that cannot be repeated "
            "here (split channels, high biases absorbed, or others): quantize it again with a "
            "preset, or leave `start=` out."
        )
    return nearest[1]


@jax.jit
def squares_apart(a: Model, b: Model) -> jax.Array:
    """Mean over layers of the squared distance of kernels, in units of their power."""
    pairs = [
        (a.params[n.name]["kernel"], b.params[n.name]["kernel"]) for n in weighted_nodes(a.graph)
    ]
    power = lambda v: jnp.maximum(jnp.mean(v**2), 1e-30)
    return jnp.mean(jnp.stack([power(x - y) / power(x) for x, y in pairs]))


def kernels_apart(a: Model, b: Model) -> float:
    """`squares_apart`, as a number."""
    return float(squares_apart(a, b))
