"""What may be done to a float network before it is quantized, chosen by name and done in order."""

from typing import NamedTuple, get_args

from dfq_jax.base.words import Relu6
from dfq_jax.errors import check_choice
from dfq_jax.graph.graph import Model
from dfq_jax.passes.absorb import absorb_high_biases
from dfq_jax.passes.equalize import Reach, capped_between, equalize_cross_layer, uncapped
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.value_split import split_values


class Surgery(NamedTuple):
    """Changes of a float network.

    Attributes:
      reach: which layers are equalized: `pairs`, as in the paper, or `groups`, across sums too;
        None for no equalization.
      relu6: `replace` makes ReLUs of those ReLU6 that keep layers from equalization. That changes
        the function: activations above 6 are no longer cut.
      absorb: whether high biases move on behind ReLUs; changes the function slightly.
      split: share of input channels to split in every layer where that is possible.
      value_aware: share of each layer's weights, the largest, that have 8 bits in a layer of their
        own (`passes.value_split`).
    """

    reach: Reach | None = "pairs"
    relu6: Relu6 = "keep"
    absorb: bool = False
    split: float = 0.0
    value_aware: float = 0.0


def operated(model: Model, surgery: Surgery, *, distrusted: frozenset[str] = frozenset()) -> Model:
    """The folded network after all of a surgery but splitting.

    Args:
      model: network with its batch norms in place.
      surgery: what to do.
      distrusted: batch norms whose statistics say nothing; see `fold_batch_norm`.

    Returns:
      The network, folded.

    Raises:
      UsageError: if the surgery names what there is not.

    Reference:
      Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization ...", Figure 4: the
      order of the steps.
    """
    if surgery.reach is not None:
        check_choice("reach of equalization", surgery.reach, get_args(Reach))
    check_choice("relu6", surgery.relu6, get_args(Relu6))
    model = fold_batch_norm(model, distrusted=distrusted)
    if surgery.reach is not None:
        if surgery.relu6 == "replace":
            model = uncapped(model, capped_between(model, surgery.reach))
        model = equalize_cross_layer(model, reach=surgery.reach)
    model = absorb_high_biases(model) if surgery.absorb else model
    return split_values(model, surgery.value_aware)


def replaced_relu6(before: Model, after: Model) -> tuple[str, ...]:
    """Names of the activations that lost their ceiling."""
    ops = {n.name: n.op for n in before.graph.nodes}
    return tuple(n.name for n in after.graph.nodes if ops.get(n.name, n.op) != n.op)
