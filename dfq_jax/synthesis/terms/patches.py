"""How diverse the patches of an image look to a vision transformer: entropy of similarities.

Li et al. 2022, "Patch Similarity Aware Data-Free Quantization for Vision Transformers" (PSAQ-ViT),
the patch similarity metric; details as in its released code.
"""

from math import pi, sqrt

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import MatMul, Softmax
from dfq_jax.graph.query import consumers
from dfq_jax.synthesis.terms.base import EPS, Observed, total_variation
from dfq_jax.synthesis.terms.targets import Targets

BANDWIDTH = 0.01
POINTS = 10
FEWEST = 2
"""Patches that have a similarity worth the name."""


def attention_outputs(graph: Graph) -> dict[str, str]:
    """A recipe's `watch`: what attention makes of the values, in every block.

    Args:
      graph: of the network.

    Returns:
      {product of softmax and values: node that reads it as its first argument}.

    Raises:
      UnsupportedModelError: if there is no such product, or nothing reads one that way.
    """
    weights = {node.name for node in graph.nodes if isinstance(node.op, Softmax)}
    readers, found = consumers(graph), {}
    for node in graph.nodes:
        if isinstance(node.op, MatMul) and node.inputs[0] in weights:
            first = [reader.name for reader, index in readers[node.name] if index == 0]
            if not first:
                raise unreadable(f"no node reads {node.name!r} as its first argument")
            found[node.name] = first[0]
    if not found:
        raise unreadable("no softmax is multiplied with values")
    return found


def unreadable(reason: str) -> UnsupportedModelError:
    """The error for a network without attention as it is known here."""
    return UnsupportedModelError(
        f"the network has no attention that a method for transformers can read: {reason}. Use "
        "another method, such as zeroq for a network with batch norms, or images of your own "
        "(`images=`)."
    )


def patch_similarity(attended: Float[Array, "b *heads n d"]) -> Float[Array, "b values"]:
    """Cosine similarities of all pairs of patches of each image.

    Args:
      attended: attention times values. The third axis from the end is heads, where there are that
        many; axes between it and the first are windows, within which patches are compared.

    Returns:
      Similarities in [-1, 1] of the mean over heads, the first token left out.

    Reference:
      PSAQ-ViT, patch similarity, as released (which leaves out a token of Swin's windows as well).
    """
    tokens = attended.astype(jnp.float32)
    tokens = jnp.mean(tokens, axis=-3) if tokens.ndim > 3 else tokens
    patches = tokens[..., 1:, :]
    unit = patches * jax.lax.rsqrt(jnp.sum(patches**2, axis=-1, keepdims=True) + EPS**2)
    return jnp.matmul(unit, jnp.swapaxes(unit, -1, -2)).reshape(attended.shape[0], -1)


def density(
    values: Float[Array, "b n"], points: Float[Array, " k"], bandwidth: float = BANDWIDTH
) -> Float[Array, "b k"]:
    """Kernel density of each row's values with a Gaussian kernel.

    One point after the other, and once more for the gradient, so that memory holds one kernel for
    each value, not for each value and point.

    Args:
      values: to be described.
      points: where.
      bandwidth: standard deviation of the kernel.

    Returns:
      Densities, per unit of the values.

    Reference:
      PSAQ-ViT, kernel density estimation.
    """

    @jax.checkpoint
    def at(point: Float[Array, ""]) -> Float[Array, " b"]:
        kernel = jnp.exp(-0.5 * ((point - values) / bandwidth) ** 2)
        return jnp.mean(kernel, axis=1) / (bandwidth * sqrt(2 * pi))

    return jax.lax.map(at, points).T


def even_points(values: Float[Array, "..."], count: int = POINTS) -> Float[Array, " count"]:
    """Points at equal distances from the least to the largest value, at least 1e-6 in all.

    No gradient passes: it is the similarities that are to change, not where they are counted. (The
    released code does the same.)
    """
    values = jax.lax.stop_gradient(values)
    low = jnp.min(values)
    return low + jnp.linspace(0, 1, count) * jnp.maximum(jnp.max(values) - low, 1e-6)


def differential_entropy(
    density: Float[Array, "b k"], points: Float[Array, " k"]
) -> Float[Array, " b"]:
    """`-integral of p log p` by the trapezoidal rule, with `p` 1e-4 above the density.

    Reference:
      PSAQ-ViT, differential entropy, as released.
    """
    raised = density + 1e-4
    return jnp.trapezoid(-raised * jnp.log(raised), points, axis=1)


def layer_entropy(attended: Float[Array, "b *heads n d"]) -> Float[Array, ""]:
    """Mean over images of the entropy of patch similarities of one attention's output."""
    similar = patch_similarity(attended)
    points = even_points(similar)
    return jnp.mean(differential_entropy(density(similar, points), points))


def patch_entropy(observed: Observed) -> Float[Array, ""]:
    """Sum over blocks of the entropy of patch similarities; a term of negative weight.

    Args:
      observed: `taps` are outputs of attention and nothing else.

    Returns:
      The entropy: high for diverse patches, as in photographs, low for noise.

    Raises:
      UnsupportedModelError: if no attention has two patches beside the first token.

    Reference:
      PSAQ-ViT, patch similarity entropy loss.
    """
    layers = [x for x in observed.taps.values() if x.shape[-2] > FEWEST]
    if not layers:
        raise unreadable("it never sees two patches beside a first token")
    return sum((layer_entropy(x) for x in layers), jnp.zeros(()))


PAPER_VALUES = 32 * 224 * 224 * 3
"""Numbers in a batch of the paper, for which its range of variations is meant."""


def drawn_variation(model: Model, targets: Targets, key: Key[Array, ""]) -> Float[Array, ""]:
    """A variation that a batch of the paper's should have."""
    del model, targets
    return jax.random.uniform(key, minval=2500.0, maxval=3000.0)


def variation_gap(observed: Observed) -> Float[Array, ""]:
    """Distance of the total variation to the one drawn for the run.

    The norms of a batch grow with the root of its size, and what was drawn is meant for 32 images
    of 224x224 pixels; for others it is scaled accordingly (ours).

    Reference:
      Li et al. 2022, "Patch Similarity Aware Data-Free Quantization for Vision Transformers",
      total variance, as released.
    """
    wanted = observed.shared * (observed.natural.size / PAPER_VALUES) ** 0.5
    return jnp.abs(total_variation(observed.natural) - wanted)
