"""What can be done to a float network: `Model -> Model`, and what such edits ask it.

Folding, equalization, absorption, splitting and smoothing keep what it computes; `select` takes
channels away that hang together, and `masked` puts zeros in their place; `prune` chooses them, and
has what is left make up for them; `sparsified` puts zeros among weights.
"""

from dfq_jax.graph.channels import ChannelGroup, channel_groups
from dfq_jax.graph.coupling import Coupled, Coupling, coupled_channels
from dfq_jax.graph.query import batch_norms, macs, parameter_count, weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.passes.absorb import absorb_high_biases
from dfq_jax.passes.before_quantization import Surgery, operated
from dfq_jax.passes.channel_split import split_channels
from dfq_jax.passes.equalize import equalize_cross_layer, uncapped
from dfq_jax.passes.estimate import with_estimated_norms
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.level import level_channels
from dfq_jax.passes.moments import correct_biases_analytically, expected_moments
from dfq_jax.passes.ranges import expected_ranges
from dfq_jax.passes.reorder import exchangeable, reordered
from dfq_jax.passes.select import masked, select
from dfq_jax.passes.smooth import smooth
from dfq_jax.passes.value_split import split_values
from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.prune import Pruned, Pruning, prune
from dfq_jax.pruning.sparse import sparsified

__all__ = [
    "ChannelGroup",
    "Coupled",
    "Coupling",
    "Pruned",
    "Pruning",
    "Subject",
    "Surgery",
    "absorb_high_biases",
    "batch_norms",
    "channel_groups",
    "correct_biases_analytically",
    "coupled_channels",
    "equalize_cross_layer",
    "exchangeable",
    "expected_moments",
    "expected_ranges",
    "fold_batch_norm",
    "level_channels",
    "macs",
    "masked",
    "operated",
    "parameter_count",
    "prune",
    "reordered",
    "select",
    "smooth",
    "sparsified",
    "split_channels",
    "split_values",
    "uncapped",
    "weighted_nodes",
    "with_estimated_norms",
    "with_params",
]
