"""What a student is told to do: plain functions of one `Lesson`, composed by weighted sums.

With scores `t` of the teacher and `s` of the student for `b` images of `K` classes, labels `y` and
a temperature `T`. Each function says its reduction: papers of one family differ by factors of a
thousand there.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from dfq_jax.graph.cuts import blocks
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import WEIGHTED, Add
from dfq_jax.graph.semantics import Tensor
from dfq_jax.numerics.softmax import divergences
from dfq_jax.values import Bound, bound

OverWhat = Literal["batch", "entries"]
Watch = Callable[[Graph], tuple[str, ...]]
"""graph -> tensors that a term compares."""
SMALLEST_NORM = 1e-8
"""Inside divisions by norms: a tensor of zeros has no direction."""


class Answers(NamedTuple):
    """What a network makes of a batch.

    Attributes:
      logits: its first output; scores of a classifier.
      taps: {tensor: its values}, those that a method watches.
      model: the network itself, a student's with kernels on their levels.
    """

    logits: Float[Array, "b ..."]
    taps: Mapping[str, Tensor]
    model: Model


class Lesson(NamedTuple):
    """Everything a loss of training may look at.

    Attributes:
      images: what both networks were shown, normalised; rows of ids as they are.
      labels: one-hot or soft; what the teacher says, where images were made for none.
      teacher: what it makes of them.
      student: likewise.
      key: fresh randomness for this step.
    """

    images: Shaped[Array, "b ..."]
    labels: Float[Array, "b classes"]
    teacher: Answers
    student: Answers
    key: Key[Array, ""]


def distillation(*, temperature: float = 1.0, reduction: OverWhat = "batch") -> Bound[Array]:
    """KL: how far the student's probabilities are from the teacher's.

        batch:    T^2 / b     sum_b sum_k p_k (log p_k - log q_k),   p = softmax(t / T)
        entries:  T^2 / (b K) sum_b sum_k p_k (log p_k - log q_k),   q = softmax(s / T)

    Args:
      temperature: T; slopes have nearly the same size for all above 5.
      reduction: over the batch, or over all entries, which is less by the number of classes.

    Reference:
      Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; over all entries GDFQ (Xu
      et al. 2020, released code) and Qimera, over the batch IntraQ, HAST and SynQ.
    """
    return bound(distilled, temperature, reduction)


def distilled(temperature: float, reduction: OverWhat, lesson: Lesson) -> Float[Array, ""]:
    """What `distillation` computes."""
    exact, rough = lesson.teacher.logits, lesson.student.logits
    gaps = divergences(exact, rough, temperature)
    shared = exact.shape[-1] if reduction == "entries" else 1
    return temperature**2 * jnp.mean(gaps) / shared


def symmetric_divergence(lesson: Lesson) -> Float[Array, ""]:
    """Half of KL both ways, averaged over images: `KL(p, q) / 2 + KL(q, p) / 2`.

    Reference:
      Zhu et al. 2020, "Towards Accurate Quantization and Pruning via Data-free Knowledge Transfer",
      which calls it Jensen-Shannon's.
    """
    exact, rough = lesson.teacher.logits, lesson.student.logits
    ways = divergences(exact, rough, 1.0), divergences(rough, exact, 1.0)
    return (jnp.mean(ways[0]) + jnp.mean(ways[1])) / 2


def label_loss(lesson: Lesson) -> Float[Array, ""]:
    """CE: `-1/b sum_b sum_k y_k log softmax(s)_k`, of hard or soft labels."""
    scores = jax.nn.log_softmax(lesson.student.logits)
    return -jnp.mean(jnp.sum(lesson.labels * scores, axis=-1))


def easy_label_loss(*, hardest: float) -> Bound[Array]:
    """CE of images that are easy for the teacher, averaged over the batch, hard ones included.

        easy_b = 1[1 - softmax(t)_y <= tau],   1/b sum_b CE(easy_b s, easy_b y)

    Args:
      hardest: `tau`.

    Reference:
      Kim et al. 2025, "SynQ: Accurate Zero-shot Quantization by Synthesis-aware Fine-tuning", as
      released.
    """
    return bound(easy_labels, hardest)


def easy_labels(hardest: float, lesson: Lesson) -> Float[Array, ""]:
    """What `easy_label_loss` computes."""
    sure = jnp.sum(jax.nn.softmax(lesson.teacher.logits) * lesson.labels, -1)
    easy = jax.lax.stop_gradient((1 - sure <= hardest).astype(jnp.float32))
    scores = jax.nn.log_softmax(lesson.student.logits)
    return -jnp.mean(easy * jnp.sum(lesson.labels * scores, axis=-1))


def score_gap(lesson: Lesson) -> Float[Array, ""]:
    """Mean squared distance of the outputs, in units of the teacher's mean square."""
    exact, rough = lesson.teacher.logits, lesson.student.logits
    return jnp.mean((exact - rough) ** 2) / jnp.maximum(jnp.mean(exact**2), SMALLEST_NORM)


def score_distance(lesson: Lesson) -> Float[Array, ""]:
    """Mean absolute distance of the outputs, over images and entries: `mean |t - s|`."""
    return jnp.mean(jnp.abs(lesson.teacher.logits - lesson.student.logits))


def direction_gap(lesson: Lesson) -> Float[Array, ""]:
    """Mean squared distance of the outputs as directions: `1/b sum_b |t/|t| - s/|s||^2`.

    For networks whose outputs are embeddings (the MSE of normalised embeddings).
    """
    return directions_between(lesson.teacher.logits, lesson.student.logits)


def directions_between(
    exact: Float[Array, "b ..."], rough: Float[Array, "b ..."]
) -> Float[Array, ""]:
    """What `direction_gap` computes: twice what the mean cosine lacks to 1."""
    return jnp.mean(jnp.sum((unit_rows(exact) - unit_rows(rough)) ** 2, -1))


def embedding_loss(lesson: Lesson) -> Float[Array, ""]:
    """MSE of outputs as directions, over images and their `D` entries: `direction_gap / D`.

        1/(b D) sum_b |t/|t| - s/|s||^2 = 2/(b D) sum_b (1 - cos(t, s))

    Reference:
      Boutros et al. 2022, "QuantFace: Towards Lightweight Face Recognition by Synthetic Data
      Low-bit Quantization", as released.
    """
    exact = lesson.teacher.logits
    return direction_gap(lesson) * len(exact) / exact.size


def margin_loss(*, margin: float = 1.0) -> Bound[Array]:
    """How far the label's score is from leading all others by a margin.

        1/b sum_b [m - s_y + max_{k != y} s_k]+

    Reference:
      Crammer and Singer 2001, "On the Algorithmic Implementation of Multiclass Kernel-based Vector
      Machines".
    """
    return bound(margin_of, margin)


def margin_of(margin: float, lesson: Lesson) -> Float[Array, ""]:
    """What `margin_loss` computes; of soft labels the largest counts."""
    scores = lesson.student.logits
    named = jax.nn.one_hot(jnp.argmax(lesson.labels, -1), scores.shape[-1], dtype=bool)
    own = jnp.sum(jnp.where(named, scores, 0.0), -1)
    best_other = jnp.max(jnp.where(named, -jnp.inf, scores), -1)
    return jnp.mean(jax.nn.relu(margin - own + best_other))


def relation_loss(lesson: Lesson) -> Float[Array, ""]:
    """How alike images are to each other, for the student as for the teacher.

        1/b^2 |G(t) - G(s)|_F^2,   G = cosines of all pairs of outputs

    Reference:
      Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", Eq. 4; of outputs.
    """
    gram = lambda v: unit_rows(v) @ unit_rows(v).T
    exact, rough = gram(lesson.teacher.logits), gram(lesson.student.logits)
    return jnp.mean((exact - rough) ** 2)


def channel_attention(*, of: Watch | None = None) -> Bound[Array]:
    """FA: channels have the energy they have in the teacher, summed over tensors.

        a = mean_{h,w} x^2,   sum_l mean_{b,c} (a_T / |a_T| - a_S / |a_S|)^2

    The mean over channels makes a layer count less the more of them it has, so a weight fits one
    width of network.

    Args:
      of: which tensors; None for `branch_outputs`.

    Reference:
      Li et al. 2023, "Hard Sample Matters a Lot in Zero-Shot Quantization" (HAST), as released.
    """
    return bound(energies_apart, of or branch_outputs, channel_energy)


def spatial_attention(*, of: Watch | None = None) -> Bound[Array]:
    """AT: places have the energy they have in the teacher, summed over tensors.

        a = mean_c x^2 of every place,   sum_l mean (a_T / |a_T| - a_S / |a_S|)^2

    Args:
      of: which tensors; None for `block_outputs`.

    Reference:
      Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", Eq. 2 with p = 2.
    """
    return bound(energies_apart, of or block_outputs, place_energy)


def attention_transfer(*, of: Watch | None = None) -> Bound[Array]:
    """R_a: the distance of normalised energies of places, summed over tensors.

        a = mean_c x^2 of every place,   sum_l 1/b sum_b | a_S / |a_S| - a_T / |a_T| |_2

    A root where `spatial_attention` has squares: its slope does not vanish near the teacher.

    Args:
      of: which tensors; None for `block_outputs`.

    Reference:
      Zhu et al. 2020, "Towards Accurate Quantization and Pruning via Data-free Knowledge Transfer".
    """
    return bound(directions_apart, of or block_outputs)


def directions_apart(of: Watch, lesson: Lesson) -> Float[Array, ""]:
    """What `attention_transfer` computes."""
    unit = lambda x: unit_rows(place_energy(x))
    squares = [jnp.sum((unit(a) - unit(b)) ** 2, -1) for a, b in pairs(of, lesson)]
    return sum((jnp.mean(jnp.sqrt(s + SMALLEST_NORM)) for s in squares), jnp.zeros(()))


def energies_apart(
    of: Watch, energy: Callable[[Tensor], Float[Array, "b n"]], lesson: Lesson
) -> Float[Array, ""]:
    """Mean squared distance of normalised energies, summed over tensors."""
    gap = lambda a, b: jnp.mean((unit_rows(energy(a)) - unit_rows(energy(b))) ** 2)
    each = [gap(exact, rough) for exact, rough in pairs(of, lesson)]
    return sum(each, jnp.zeros(()))


def channel_relations(*, of: Watch | None = None) -> Bound[Array]:
    """CRM: how alike channels are to each other, in the student as in the teacher.

        sum_l mean_b 1/C^2 sum_ij |G_T - G_S|_ij,   G = cosines of all pairs of an image's channels

    Args:
      of: which tensors; None for `block_outputs`.

    Reference:
      Liu et al. 2021, "Zero-shot Adversarial Quantization" (ZAQ), channel relation maps. Its
      released code compares attended features instead.
    """
    return bound(relations_apart, of or block_outputs)


def relations_apart(of: Watch, lesson: Lesson) -> Float[Array, ""]:
    """What `channel_relations` computes."""
    each = [jnp.mean(jnp.abs(relations(a) - relations(b))) for a, b in pairs(of, lesson)]
    return sum(each, jnp.zeros(()))


def relations(x: Tensor) -> Float[Array, "b c c"]:
    """Cosines of all pairs of channels of each image."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    unit = flat * jax.lax.rsqrt(jnp.sum(flat**2, 1, keepdims=True) + SMALLEST_NORM)
    return jnp.einsum("bpi,bpj->bij", unit, unit)


def feature_gap(*, of: Watch | None = None) -> Bound[Array]:
    """FitNets: mean squared distance of tensors in units of the teacher's variance.

        mean_l |x_T - x_S|^2 / |x_T - mean x_T|^2

    Args:
      of: which tensors; None for `block_outputs`.

    Reference:
      Romero et al. 2015, "FitNets: Hints for Thin Deep Nets"; the units are ours.
    """
    return bound(features_apart, of or block_outputs)


def features_apart(of: Watch, lesson: Lesson) -> Float[Array, ""]:
    """What `feature_gap` computes; 0 for a network of one block."""
    unit = lambda v: jnp.maximum(jnp.mean(jnp.var(v, range(v.ndim - 1))), SMALLEST_NORM)
    each = [jnp.mean((rough - exact) ** 2) / unit(exact) for exact, rough in pairs(of, lesson)]
    return jnp.mean(jnp.stack(each)) if each else jnp.zeros(())


def pairs(of: Watch, lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the teacher and of the student, those that a term is of."""
    names = of(lesson.teacher.model.graph)
    return [(lesson.teacher.taps[name], lesson.student.taps[name]) for name in names]


def channel_energy(x: Tensor) -> Float[Array, "b c"]:
    """Mean square of every channel over places."""
    return jnp.mean(x**2, tuple(range(1, x.ndim - 1)))


def place_energy(x: Tensor) -> Float[Array, "b places"]:
    """Mean square of every place over channels."""
    return jnp.mean(x**2, -1).reshape(len(x), -1)


def unit_rows(x: Float[Array, "b ..."]) -> Float[Array, "b n"]:
    """Every example as a direction."""
    flat = x.reshape(len(x), -1)
    return flat * jax.lax.rsqrt(jnp.sum(flat**2, -1, keepdims=True) + SMALLEST_NORM)


def nothing_watched(graph: Graph) -> tuple[str, ...]:
    """No tensor."""
    del graph
    return ()


def block_outputs(graph: Graph) -> tuple[str, ...]:
    """What every block puts out but the last, which puts out scores."""
    ends = [block.graph.outputs[0] for block in blocks(graph)]
    return tuple(name for name in dict.fromkeys(ends) if name not in graph.outputs)


def branch_outputs(graph: Graph) -> tuple[str, ...]:
    """What residual branches put out, before it is added to what bypasses them.

    Of each sum the operand that most layers lead to, since a shortcut may have one of its own; what
    every block puts out, where nothing is added.
    """
    depth = dict.fromkeys(graph.inputs, 0)
    for node in graph.nodes:
        below = max((depth[name] for name in node.inputs), default=0)
        depth[node.name] = below + isinstance(node.op, WEIGHTED)
    sums = [node for node in graph.nodes if isinstance(node.op, Add)]
    found = tuple(dict.fromkeys(max(node.inputs, key=depth.__getitem__) for node in sums))
    return found or block_outputs(graph)


def watched_by(*watches: Watch) -> Bound[tuple[str, ...]]:
    """All that several terms watch."""
    return bound(all_watched, watches)


def all_watched(watches: tuple[Watch, ...], graph: Graph) -> tuple[str, ...]:
    """What `watched_by` watches."""
    return tuple(dict.fromkeys(name for watch in watches for name in watch(graph)))
