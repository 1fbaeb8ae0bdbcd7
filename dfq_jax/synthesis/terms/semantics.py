"""Where a class token should look, and several classes in one image: the terms of SARDFQ.

Zhong et al. 2025, "Semantic Alignment and Reinforcement for Data-Free Quantization of Vision
Transformers". What its text leaves open is ours, and said where it is.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import MatMul, Softmax
from dfq_jax.synthesis.recipe import random_labels
from dfq_jax.synthesis.sources.augment import resized_window
from dfq_jax.synthesis.sources.pixels import from_natural
from dfq_jax.synthesis.terms.base import Observed, cross_entropy
from dfq_jax.synthesis.terms.patches import unreadable
from dfq_jax.synthesis.terms.targets import Targets

CROPS = 4
"""Most of one image."""
GAUSSIANS = 5
"""Most of one map."""
SPREADS = (0.05, 0.25)
"""Deviations of a map's Gaussians along either axis, as shares of it (ours)."""
SPLITS = (0.35, 0.65)
"""Where an image may be split into quarters, one for each of its crops (ours)."""
SIDES = (0.6, 1.0)
"""Sides of a crop as shares of those of its quarter (ours)."""
LEAST, MOST = 5.0, 10.0
"""Range of a wanted class's score."""
LONGEST = 2.0
"""Patches are no longer than so many times their width."""


class Semantics(NamedTuple):
    """What the images of a batch should show.

    Attributes:
      labels: soft, of whole images.
      windows: of crops that do not overlap (top, left, height, width as shares of the image).
      crop_labels: soft, of each crop.
      present: which of the crops there are; the first always.
    """

    labels: Float[Array, "b classes"]
    windows: Float[Array, "b crops 4"]
    crop_labels: Float[Array, "b crops classes"]
    present: Bool[Array, "b crops"]


class Prior(NamedTuple):
    """What all batches of a run share.

    Attributes:
      model: the network, which looks at crops too.
      key: of the maps of attention.
    """

    model: Model
    key: Key[Array, ""]


def prior_of(model: Model, targets: Targets, key: Key[Array, ""]) -> Prior:
    """A recipe's `prepare`."""
    del targets
    return Prior(model, key)


def attention_weights(graph: Graph) -> dict[str, str]:
    """A recipe's `watch`: what softmax gives for all tokens, in every block.

    Returns:
      {softmax: product with the values, which reads it as its first argument}, first block first.

    Raises:
      UnsupportedModelError: if there is none.
    """
    weights = {node.name for node in graph.nodes if isinstance(node.op, Softmax)}
    products = [node for node in graph.nodes if isinstance(node.op, MatMul)]
    found = {node.inputs[0]: node.name for node in products if node.inputs[0] in weights}
    if not found:
        raise unreadable("no softmax is multiplied with values")
    return found


def soft_semantics(key: Key[Array, ""], size: int, classes: int) -> Semantics:
    """A recipe's `condition`: classes of images and of their crops, and where these are.

    As many images have one crop as have two, three and four, give or take one.
    """
    whole_key, crop_key, window_key, count_key = jax.random.split(key, 4)
    labels = soft_targets(whole_key, size, classes)
    crop_labels = soft_targets(crop_key, size * CROPS, classes).reshape(size, CROPS, classes)
    counts = jax.random.permutation(count_key, jnp.arange(size) % CROPS) + 1
    present = jnp.arange(CROPS) < counts[:, None]
    return Semantics(labels, windows_apart(window_key, size), crop_labels, present)


def soft_targets(key: Key[Array, ""], size: int, classes: int) -> Float[Array, "n classes"]:
    """Soft labels of random classes: `softmax(u y)`, `u ~ U(5, 10)`.

    The other entries are 0 before softmax (ours: only the wanted one is said).
    """
    label_key, score_key = jax.random.split(key)
    scores = jax.random.uniform(score_key, (size, 1), minval=LEAST, maxval=MOST)
    return jax.nn.softmax(scores * random_labels(label_key, size, classes))


def windows_apart(key: Key[Array, ""], size: int) -> Float[Array, "b 4 4"]:
    """Four windows of each image that do not overlap, in random order.

    An image is split at a random point; each quarter holds one window of random sides.
    """
    split_key, side_key, place_key, order_key = jax.random.split(key, 4)
    split = jax.random.uniform(split_key, (size, 1, 2), minval=SPLITS[0], maxval=SPLITS[1])
    which = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    corners = jnp.where(which == 0, 0.0, split)
    quarters = jnp.where(which == 0, split, 1 - split)
    shares = jax.random.uniform(side_key, (size, CROPS, 2), minval=SIDES[0], maxval=SIDES[1])
    sides = quarters * shares
    places = corners + jax.random.uniform(place_key, (size, CROPS, 2)) * (quarters - sides)
    order = jax.vmap(lambda k: jax.random.permutation(k, CROPS))(jax.random.split(order_key, size))
    windows = jnp.concatenate([places, sides], axis=2)
    return jnp.take_along_axis(windows, order[:, :, None], axis=1)


def prior_maps(
    key: Key[Array, ""], maps: tuple[int, ...], grid: tuple[int, int]
) -> Float[Array, "*maps patches"]:
    """Random mixtures of one to five Gaussians over a grid of patches, each with a sum of 1.

    Args:
      key: the only source of randomness.
      maps: shape of what is drawn.
      grid: rows and columns.

    Reference:
      SARDFQ, attention priors; centres lie anywhere, and deviations and weights are ours.
    """
    count_key, centre_key, spread_key, weight_key = jax.random.split(key, 4)
    counts = jax.random.randint(count_key, (*maps, 1), 1, GAUSSIANS + 1)
    mixed = (*maps, GAUSSIANS)
    centres = jax.random.uniform(centre_key, (*mixed, 2))
    spreads = jax.random.uniform(spread_key, (*mixed, 2), minval=SPREADS[0], maxval=SPREADS[1])
    weights = jax.random.uniform(weight_key, mixed, minval=0.5, maxval=1.0)
    weights = jnp.where(jnp.arange(GAUSSIANS) < counts, weights, 0.0)
    return mixture(centres, spreads, weights, grid)


def mixture(
    centres: Float[Array, "*maps k 2"],
    spreads: Float[Array, "*maps k 2"],
    weights: Float[Array, "*maps k"],
    grid: tuple[int, int],
) -> Float[Array, "*maps patches"]:
    """A mixture of Gaussians at the centres of patches, with a sum of 1, as attention has.

    Args:
      centres: (row, column) as shares of the image.
      spreads: deviations along both axes, likewise.
      weights: of the Gaussians' heights, not all 0.
      grid: rows and columns.
    """
    down, right = ((jnp.arange(n, dtype=jnp.float32) + 0.5) / n for n in grid)
    along = lambda places, axis: (
        -0.5 * ((places - centres[..., axis, None]) / spreads[..., axis, None]) ** 2
    )
    heights = along(down, 0)[..., :, None] + along(right, 1)[..., None, :]
    logs = heights.reshape(*heights.shape[:-2], -1) + jnp.log(weights)[..., None]
    return jax.nn.softmax(jax.nn.logsumexp(logs, axis=-2), axis=-1)


def patch_grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of so many patches of an image, nearest to squares.

    Raises:
      UnsupportedModelError: if all would be long strips.
    """
    pairs = [(n, patches // n) for n in range(1, patches + 1) if patches % n == 0]
    length = lambda pair: abs(math.log(height * pair[1] / (width * pair[0])))
    best = min(pairs, key=length, default=None)
    if best is None or length(best) > math.log(LONGEST):
        raise unreadable(
            f"{patches} tokens beside the first are no grid of {height}x{width} pixels"
        )
    return best


def attention_prior(observed: Observed) -> Float[Array, ""]:
    """APA: attention of the class token, in the deep half, drawn to maps of Gaussians.

        sum_{l >= L/2} l/L sum_h mean_{images, patches} (A_{l,h}[0, 1:] - map_{l,h})^2

    Images of a batch, blocks and heads have maps of their own, which stay for the whole run.

    Args:
      observed: `taps` are weights of attention, of all blocks in order; `shared` a `Prior`.

    Raises:
      UnsupportedModelError: where attention is not among all tokens of an image, the first of which
        is the class token's.
    """
    count, (height, width) = len(observed.taps), observed.natural.shape[1:3]
    total = jnp.zeros(())
    for number, (name, tap) in enumerate(observed.taps.items(), 1):
        if 2 * number < count:
            continue
        attended = class_attention(name, tap, observed.natural.shape[0])
        grid = patch_grid(attended.shape[-1], height, width)
        key = jax.random.fold_in(observed.shared.key, number)
        wanted = prior_maps(key, attended.shape[:2], grid)
        gaps = jnp.mean((attended - wanted) ** 2, axis=(0, 2))
        total = total + number / count * jnp.sum(gaps)
    return total


def class_attention(name: str, weights: Array, images: int) -> Float[Array, "b heads patches"]:
    """What the first token attends to in all others.

    Raises:
      UnsupportedModelError: if attention is within windows, or sees a single token.
    """
    by_head = weights[:, None] if weights.ndim == 3 else weights
    whole = by_head.ndim == 4 and by_head.shape[0] == images
    if not whole or by_head.shape[2] != by_head.shape[3] or by_head.shape[3] < 2:
        shape = "x".join(map(str, weights.shape))
        raise unreadable(f"{name!r} is {shape}, not of all tokens of an image, a class token first")
    return by_head[:, :, 0, 1:].astype(jnp.float32)


def soft_label_entropy(observed: Observed) -> Float[Array, ""]:
    """SL: cross-entropy of whole images to their soft labels."""
    return cross_entropy(observed.logits, observed.labels.labels)


def crop_entropy(observed: Observed) -> Float[Array, ""]:
    """MSR: mean cross-entropy of crops, each as large as an image, to labels of their own.

    The gradient goes into a crop's pixels alone. One more forward pass, of all crops together.
    """
    semantics: Semantics = observed.labels
    size = observed.natural.shape[0]
    total = sum(1 + number % CROPS for number in range(size))
    image, crop = jnp.nonzero(semantics.present, size=total)
    views = crops_of(observed.natural, image, semantics.windows[image, crop])
    model = observed.shared.model
    logits = evaluate(model, from_natural(views, model.contract))[0][0]
    return cross_entropy(logits, semantics.crop_labels[image, crop])


def crops_of(
    natural: Float[Array, "b h w c"], image: Int[Array, " n"], windows: Float[Array, "n 4"]
) -> Float[Array, "n h w c"]:
    """Windows of images, resized to whole ones; gradients reach pixels with their centre inside."""

    def view(index: Array, window: Array) -> Array:
        whole = natural[index]
        fixed = jax.lax.stop_gradient(whole)
        return resized_window(jnp.where(inside(window, whole.shape), whole, fixed), window)

    return jax.vmap(view)(image, windows)


def inside(window: Float[Array, "4"], shape: tuple[int, ...]) -> Bool[Array, "h w 1"]:
    """Which pixels have their centre in a window."""
    down, right = ((jnp.arange(n, dtype=jnp.float32) + 0.5) / n for n in shape[:2])
    within = lambda at, axis: (at >= window[axis]) & (at < window[axis] + window[axis + 2])
    return (within(down, 0)[:, None] & within(right, 1)[None, :])[..., None]
