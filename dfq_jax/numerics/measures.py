"""How alike two outputs are, in the measures of tasks: images, directions, next tokens.

All work on NumPy arrays in float64, batch first.
"""

import numpy as np
from jaxtyping import Float

BT601 = np.array([65.481, 128.553, 24.966])
"""Luma of RGB in [0, 1], less its black of 16 (ITU-R BT.601)."""
BLACK = 16.0


def psnr(
    exact: Float[np.ndarray, "n h w c"],
    rough: Float[np.ndarray, "n h w c"],
    *,
    low: float = 0.0,
    high: float = 1.0,
    luma: bool = False,
    border: int = 0,
    rounded: bool = False,
) -> Float[np.ndarray, " n"]:
    """Peak signal to noise ratio of each image in dB: `10 log10(peak^2 / mean squared error)`.

    Args:
      exact: images; of three channels if their luma is compared.
      rough: other images.
      low: value of black.
      high: value of white.
      luma: compare the luma alone, against the peak of 255 that is usual for it.
      border: pixels at each side that do not count.
      rounded: compare values clipped and rounded to 8 bits.

    Returns:
      Infinite for equal images, NaN for values that are not finite.
    """
    pixels = [eight_bit(x, low, high, rounded=rounded) for x in (exact, rough)]
    if luma:
        pixels = [x @ BT601 / 255 + BLACK for x in pixels]
    inner = slice(border, -border or None)
    difference = (pixels[0] - pixels[1])[:, inner, inner]
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / np.mean(difference.reshape(len(exact), -1) ** 2, axis=1))


def eight_bit(x: np.ndarray, low: float, high: float, *, rounded: bool) -> np.ndarray:
    """Values in units of a grey level of 0..255."""
    pixels = (np.asarray(x, np.float64) - low) * (255 / (high - low))
    return np.clip(np.rint(pixels), 0, 255) if rounded else pixels


def cosines(
    exact: Float[np.ndarray, "*n size"], rough: Float[np.ndarray, "*n size"]
) -> Float[np.ndarray, "*n"]:
    """Cosine of the angle between vectors; 1 between two of length 0, 0 to one of them."""
    a, b = (np.asarray(x, np.float64) for x in (exact, rough))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    same = np.all(a == b, axis=-1)
    cosine = np.sum(a * b, axis=-1) / np.where(lengths == 0, 1.0, lengths)
    return np.where(same & (lengths == 0), 1.0, cosine)


def next_token_divergences(
    exact: Float[np.ndarray, "*n ids"], rough: Float[np.ndarray, "*n ids"]
) -> Float[np.ndarray, "*n"]:
    """`KL(softmax(exact) || softmax(rough))` of every row of scores, in nats."""
    log_p, log_q = log_softmax(exact), log_softmax(rough)
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def log_softmax(scores: Float[np.ndarray, "*n ids"]) -> Float[np.ndarray, "*n ids"]:
    """Logarithms of probabilities, without overflow."""
    x = np.asarray(scores, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
