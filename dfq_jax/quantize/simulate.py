"""The quantized network and its float simulation, a hook of the one evaluator."""

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import Hook, Slots, Tensor, evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.numerics.affine import (
    Affine,
    bias_scale,
    dequantize,
    fake_quantize,
    quantize_bias,
)
from dfq_jax.numerics.basis import Basis, snap
from dfq_jax.quantize.plan import Plan, Site

QParams = Mapping[Site, Affine]
"""{site: scale and zero point}: the traced half of a plan."""


@partial(jax.tree_util.register_dataclass, data_fields=["model", "qparams"], meta_fields=["plan"])
@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A folded network with everything needed to run it in integers.

    Attributes:
      model: float parameters; kernels need not be on their grids (nearest rounding puts them
        there, and leaves kernels that learned rounding already placed).
      plan: what is quantized, static.
      qparams: scales and zero points.
    """

    model: Model
    plan: Plan
    qparams: QParams


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["model", "qparams", "bases"],
    meta_fields=["plan"],
)
@dataclasses.dataclass(frozen=True)
class LevelledModel:
    """A folded network of which some sites have levels that no uniform grid has (LQ-Nets).

    Attributes:
      model: float parameters; kernels with a basis lie on their levels, others as in
        `QuantizedModel`.
      plan: what is quantized, static; sites with a basis have as many levels as their grids.
      qparams: scales and zero points of the other sites.
      bases: levels of the rest.
    """

    model: Model
    plan: Plan
    qparams: QParams
    bases: Mapping[Site, Basis]


Simulated = QuantizedModel | LevelledModel


def hook_of(quantized: Simulated) -> Hook:
    """What simulates a quantized network. Build it inside the jitted function."""
    match quantized:
        case QuantizedModel():
            return simulation_hook(quantized.plan, quantized.qparams)
        case LevelledModel():
            return levelled_hook(quantized)


def levelled_hook(quantized: LevelledModel) -> Hook:
    """Snaps edges with a basis to their levels, and simulates the rest of the plan.

    Biases of layers that read or store levels stay in float, as sums of bit planes do.
    """
    plan, bases = quantized.plan, quantized.bases
    uniform = tuple(entry for entry in plan.entries if entry[0] not in bases)
    rest = simulation_hook(dataclasses.replace(plan, entries=uniform), quantized.qparams)

    def level(site: Site, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return snap(x.reshape(1, -1), bases[site]).reshape(x.shape) if site in bases else x

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        slots, args = rest(node, slots, args)
        return slots, tuple(level(Site(node.name, f"input{i}"), x) for i, x in enumerate(args))

    return hook


def simulation_hook(plan: Plan, qparams: QParams) -> Hook:
    """Fake-quantizes kernels, biases and edges as `plan` says. Build it inside the jitted function.

    Biases of layers whose kernel and input are both quantized sit on the int32 grid of scale
    `x_scale * w_scale`, as in the deployed file.
    """
    edges = argument_hook(plan, qparams)
    table = plan.table

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        _, args = edges(node, slots, args)
        kernel, data = Site(node.name, "kernel"), Site(node.name, "input0")
        if kernel in table:
            snapped = fake_quantize(slots["kernel"], qparams[kernel], table[kernel].grid)
            slots = {**slots, "kernel": snapped}
            if "bias" in slots and data in table:
                bias = snap_bias(slots["bias"], qparams[data], qparams[kernel])
                slots = {**slots, "bias": bias}
        return slots, args

    return hook


def argument_hook(plan: Plan, qparams: QParams) -> Hook:
    """Fake-quantizes edges only."""
    table = plan.table

    def snap(site: Site, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if site not in table:
            return x
        return fake_quantize(x, qparams[site], table[site].grid)

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        return slots, tuple(snap(Site(node.name, f"input{i}"), x) for i, x in enumerate(args))

    return hook


def snap_bias(bias: Float[Array, " chan"], data: Affine, kernel: Affine) -> Float[Array, " chan"]:
    """A bias rounded to its int32 grid."""
    scale = bias_scale(data.scale, kernel.scale)
    codes = quantize_bias(bias, data.scale, kernel.scale)
    return dequantize(codes, Affine(scale, codes[:1] * 0))


def simulate(quantized: Simulated, images: Float[Array, "n h w c"]) -> Tensor:
    """First output of the quantized network, computed in float with fake quantization.

    Args:
      quantized: the network.
      images: normalised, NHWC.

    Returns:
      Logits, Float[n classes] for a classifier.
    """
    return evaluate(quantized.model, images, hook=hook_of(quantized))[0][0]
