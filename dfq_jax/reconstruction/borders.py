"""Learned borders of rounding: a channel's values round up where their fraction reaches its border.

With a value `x / s = k + f`, `k` whole and `f` in [0, 1), and a border for each channel `c`,

    code = k + [f >= B_c(k)],   B_c(k) = 1/2 + a_c + b_c (k + 1/2)

which is rounding to nearest of `(x / s - a_c) / (1 + b_c)`: a gain and a shift before rounding.
The layer that makes the channel can take both, so that nothing is left to compute at inference. It
can where all that read the channel read it rounded, and nothing but a ReLU lies between: a shift by
less than half a step changes no code of what a ReLU made 0. Elsewhere (behind sums, pooling, ReLU6
and in what a unit reads) the border stays at 1/2.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import Tensor
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import WEIGHTED, Relu
from dfq_jax.graph.query import consumers
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import Affine
from dfq_jax.quantization.plan import Plan, Site

MOST_SHIFT = 0.49
"""Of a step."""
LEAST_GAIN = 0.5


class Border(NamedTuple):
    """A border of each channel, as what is done before rounding.

    Attributes:
      gain: `1 / (1 + b)`.
      shift: `-a / (1 + b)`, in steps.
    """

    gain: Float[Array, " c"]
    shift: Float[Array, " c"]


def border_of(trained: Mapping[str, Array]) -> Border:
    """The border that `a` (`offset`) and `b` (`slope`) say; within what layers can take."""
    gain = jnp.clip(1 / (1 + trained["slope"]), LEAST_GAIN, 1 / LEAST_GAIN)
    return Border(gain, jnp.clip(-trained["offset"] * gain, -MOST_SHIFT, MOST_SHIFT))


def makers(graph: Graph, plan: Plan) -> dict[str, str]:
    """{tensor of a plan: layer that can take its border}, where one can.

    Args:
      graph: of a unit.
      plan: of it; tensors of fewer than 8 bits have borders.
    """
    readers, nodes, found = consumers(graph), graph.by_name, {}
    for tensor, sites in plan.groups:
        sources = {nodes[s.node].inputs[s.argument or 0] for s in sites}
        source = sources.pop()
        if sources or plan.table[sites[0]].levels.bits >= 8 or source not in nodes:
            continue
        chain = [source]
        if nodes[source].op == Relu():
            chain.append(nodes[source].inputs[0])
        maker = chain[-1]
        if maker not in nodes or not isinstance(nodes[maker].op, WEIGHTED):
            continue
        read = {(n.name, i) for n, i in readers[source]} <= {(s.node, s.argument) for s in sites}
        alone = all(len(readers[name]) == 1 for name in chain[1:])
        spec = plan.spec(Site(maker))
        apart = spec is None or spec.grid.axis is not None  # one scale has no room for gains
        if read and alone and apart and not set(chain) & set(graph.outputs):
            found[tensor] = maker
    return found


def borders_at_first(model: Model, plan: Plan) -> dict[str, dict[str, Array]]:
    """{tensor: what is trained of its border}, at 1/2, where a layer has a bias to take shifts."""
    made = makers(model.graph, plan)
    layers = {t: model.params[layer] for t, layer in made.items()}
    zeros = {t: jnp.zeros_like(slots["bias"]) for t, slots in layers.items() if "bias" in slots}
    return {t: {"offset": zero, "slope": zero} for t, zero in zeros.items()}


def bordered(x: Tensor, border: Border, scale: Float[Array, ""]) -> Tensor:
    """What is rounded to nearest where `x` is rounded at its border; channels last."""
    return x * border.gain + border.shift * scale


def absorbed(
    model: Model,
    qparams: Mapping[Site, Affine],
    plan: Plan,
    borders: Mapping[str, Mapping[str, Array]],
) -> tuple[Model, dict[Site, Affine]]:
    """A unit whose layers make channels as borders have them; codes are the same.

    Args:
      model: the unit, kernels on their grids.
      qparams: its scales, those of activations as learned.
      plan: of the unit.
      borders: as trained.
    """
    made, groups = makers(model.graph, plan), dict(plan.groups)
    params, scales = {}, dict(qparams)
    for tensor, trained in borders.items():
        layer, border = made[tensor], border_of(trained)
        slots, site = model.params[layer], Site(layer)
        shift = border.shift * scales[groups[tensor][0]].scale
        params[layer] = {
            "kernel": slots["kernel"] * border.gain,
            "bias": slots["bias"] * border.gain + shift,
        }
        if site in scales:
            scale = scales[site].scale
            gain = jnp.broadcast_to(border.gain, scale.shape)
            scales[site] = Affine(scale * gain, scales[site].zero_point)
    return with_params(model, params), scales
