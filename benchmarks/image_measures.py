"""How good a set of images is: what `synthesis_quality.py` measures of each, the same way.

Everything is measured with the plain teacher: no augmentation, no distortion, batches of images
drawn over the whole set.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.graph.graph import Model
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate, guard_biases
from dfq_jax.quantization.plan import parse_scheme, resolve
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.recipes.dfq_biases import corrected
from dfq_jax.recipes.dfq_trials import observing
from dfq_jax.synthesis.terms.classes import penultimate
from dfq_jax.synthesis.terms.match import batch_moments, recorded_std
from dfq_jax.synthesis.terms.targets import Targets, observe

BATCH = 64


def looks(model: Model, targets: Targets, images: Any) -> dict[str, Any]:
    """Statistics at all batch norms, features and classes of a set of images.

    Returns:
      `bn_loss`: squared gaps of mean and deviation over all images, in units of the recorded
      deviation, averaged over channels and layers; `spread`: deviation over images of the images'
      means, in the same units; `cosine`: mean pairwise cosine of pooled features; `classes`: share
      of classes that are some image's first choice (of as many as there are images, at most);
      `confidence`: mean probability of that choice.
    """
    tap = penultimate(model.graph)
    look = jax.jit(lambda model, x: observe(model, targets, x, taps=(tap,)))
    order = np.random.default_rng(0).permutation(len(images))
    seen = [look(model, images[jnp.asarray(part)]) for part in parts(order)]
    merged = jax.tree.map(lambda *v: jnp.concatenate(v), *seen)
    losses, spreads = [], []
    for name, target in targets.items():
        stats, unit = merged.stats[name], recorded_std(target)
        mean, var = batch_moments(stats)
        gap = ((mean - target.mean) ** 2 + (jnp.sqrt(var) - unit) ** 2) / unit**2
        losses.append(float(jnp.mean(gap, where=target.usable)))
        spreads.append(float(jnp.mean(jnp.std(stats.mean, axis=0) / unit, where=target.usable)))
    scores = np.asarray(jax.nn.softmax(merged.logits))
    possible, features = min(scores.shape), np.asarray(merged.taps[tap])
    return {
        "bn_loss": float(np.mean(losses)),
        "spread": float(np.mean(spreads)),
        "cosine": cosine(features.reshape(len(features), -1)),
        "classes": len(set(scores.argmax(1).tolist())) / possible,
        "confidence": float(scores.max(1).mean()),
    }


def parts(order: np.ndarray) -> list[np.ndarray]:
    """Whole batches; images that do not fill one are left out, if there is one at all."""
    size = min(BATCH, len(order))
    return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]


def cosine(features: np.ndarray) -> float:
    """Mean cosine of the features of two different images."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    count = len(unit)
    return float((np.sum(unit.sum(0) ** 2) - count) / (count * (count - 1)))


def fixed_quantizer(
    model: Model, images: Any, scheme: str, layers: Any, observer: Any = None
) -> QuantizedModel:
    """The same for all images: L_p grids per kernel channel and per tensor, biases corrected.

    Ranges of activations come from the images alone, whatever the batch norms say.

    Args:
      model: with its batch norms.
      images: normalised.
      scheme: such as `w4a4`.
      layers: which layers stay at 8 bits.
      observer: how ranges are chosen instead of L_p, e.g. `MinMax()`.

    Returns:
      The quantized network.
    """
    reference = jax.jit(fold_batch_norm)(model)
    plan = resolve(reference.graph, parse_scheme(scheme), layers, ())
    plan = plan if observer is None else observing(plan, observer)
    quantized = calibrate(reference, plan, images, expected=None)
    return guard_biases(corrected(quantized, reference, images, "analytic"))
