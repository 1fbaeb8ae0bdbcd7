"""Class activation maps: which places make a network say what it says.

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks", for networks whose scores
are a linear layer of pooled features, where the slopes need no second pass: with features `F`,
classes `k` and the classifier's weights `W`,

    alpha_c = [mean_{h,w} d s_k / d F_hwc]+  ~  [W_ck]+,   map_hw = sum_c alpha_c F_hwc
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import GlobalAvgPool
from dfq_jax.graph.query import ancestors
from dfq_jax.synthesis.terms.classes import penultimate
from dfq_jax.training.losses import Answers, Lesson

FLAT = 1e-8
"""Of a map that is the same everywhere nothing is divided."""


def feature_map(graph: Graph) -> tuple[str, ...]:
    """What the pooling before the final linear layer reads.

    Raises:
      UnsupportedModelError: for a network that does not end so.
    """
    last = penultimate(graph)
    above = ancestors(graph, graph[last].inputs[0])
    pools = [n for n in graph.nodes if n.name in above and isinstance(n.op, GlobalAvgPool)]
    if not pools:
        raise UnsupportedModelError(
            f"class activation maps are of networks that pool features before {last!r}, and this "
            "one does not: train by a method without them (hast, best)."
        )
    return (pools[-1].inputs[0],)


def activation_map_loss(lesson: Lesson) -> Float[Array, ""]:
    """CAM: mean squared distance of the maps of teacher and student, each of its own class.

    Maps are enlarged to the image, and reach from 0 to 1 in every image; no slope passes to the
    weights of channels.

    Reference:
      Kim et al. 2025, "SynQ: Accurate Zero-shot Quantization by Synthesis-aware Fine-tuning", as
      released.
    """
    height, width = lesson.images.shape[1:3]
    look = lambda answers: activation_map(answers, (height, width))
    exact, rough = look(lesson.teacher), look(lesson.student)
    return jnp.mean((jax.lax.stop_gradient(exact) - rough) ** 2)


def activation_map(answers: Answers, size: tuple[int, int]) -> Float[Array, "b h w"]:
    """The map of the class that a network says, from 0 to 1."""
    features = answers.taps[feature_map(answers.model.graph)[0]]
    said = jnp.argmax(answers.logits, -1)
    weights = jax.nn.relu(classifier(answers.model).T[said])  # b c
    seen = jnp.einsum("bhwc,bc->bhw", features, jax.lax.stop_gradient(weights))
    large = jax.image.resize(seen, (len(seen), *size), "bilinear")
    low = jnp.min(large, (1, 2), keepdims=True)
    high = jnp.max(large, (1, 2), keepdims=True)
    return (large - low) / jnp.maximum(high - low, FLAT)


def classifier(model: Model) -> Float[Array, "c classes"]:
    """The weights of the final linear layer."""
    return model.params[penultimate(model.graph)]["kernel"]
