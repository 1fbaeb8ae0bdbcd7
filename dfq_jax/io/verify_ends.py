"""Scores of every way to run a quantized network, compared with those of the simulator."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.semantics import Tensor


@dataclasses.dataclass(frozen=True)
class EndCheck:
    """Scores of one way to run the network, compared with those of the simulator.

    Attributes:
      runner: `integer`, `onnxruntime off`, `onnxruntime on` or `onnx reference`.
      difference: largest absolute difference of a score, of any output.
      agreement: share of images (of pixels, where each has scores) with the same top class, of
        those on which the simulator is decided.
      undecided: share of images whose two best scores are closer than rounding itself moves them
        (`decided`); the runtime may pick either.
    """

    runner: str
    difference: float
    agreement: float
    undecided: float = 0.0


@jax.jit
def first_output(model: Model, images: Float[Array, "n h w c"]) -> Tensor:
    """Scores of the network with its kernels not rounded."""
    return evaluate(model, images)[0][0]


def decided(scores: Float[np.ndarray, "..."], plain: Float[np.ndarray, "..."]) -> np.ndarray:
    """Where the two best scores are further apart than rounding moves them.

    Args:
      scores: of the quantized network, classes last.
      plain: of the same network before rounding.

    Returns:
      Bool, without the last axis: whether the margin exceeds three deviations of what two ways to
      round may differ by. With an error of deviation s in every score, a margin errs by
      `sqrt(2) s`, and two margins rounded independently differ by `2 s`. All of them, if that
      would leave out more than three quarters.
    """
    if scores.shape[-1] < 2:
        return np.ones(scores.shape[:-1], bool)
    best = np.partition(scores, -2, axis=-1)
    margin = best[..., -1] - best[..., -2]
    clear = margin > 3 * 2 * np.sqrt(np.mean((scores - plain) ** 2))
    return clear if clear.mean() >= 0.25 else np.ones_like(clear)


def end_gaps(
    runs: Sequence[Sequence[np.ndarray]], counted: np.ndarray
) -> Float[np.ndarray, "runners 4"]:
    """Every runner after the first compared with the first, on one batch.

    Args:
      runs: outputs of each runner; of the first output, the last axis counts classes.
      counted: which decisions count.

    Returns:
      Largest absolute difference of any output; how often the top class is the same; out of how
      many decisions that count; of how many in all.
    """
    simulator, *others = runs
    rows = []
    for other in others:
        gaps = [np.max(np.abs(a - b)) for a, b in zip(other, simulator, strict=True)]
        same = other[0].argmax(-1) == simulator[0].argmax(-1)
        rows.append((max(gaps), same[counted].sum(), counted.sum(), counted.size))
    return np.array(rows, np.float64)


def end_checks(
    gaps: Float[np.ndarray, "batches runners 4"], names: Sequence[str]
) -> tuple[EndCheck, ...]:
    """One entry per runner, from what `end_gaps` found in each batch."""
    differences, (agreeing, counted, every) = gaps[..., 0].max(0), gaps[..., 1:].sum(0).T
    return tuple(
        EndCheck(
            name,
            float(differences[i]),
            float(agreeing[i] / counted[i]),
            float(1 - counted[i] / every[i]),
        )
        for i, name in enumerate(names)
    )
