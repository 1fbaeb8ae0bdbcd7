"""LQ-Nets: levels that are inner products of a small learned basis with binary codes.

With levels `C v`, the codes `C` all rows of n signs (weights) or bits (rectified activations), a
dot product of two quantized vectors still falls apart into products of bit planes. The basis is
fitted by turns: assign values to the nearest level, solve for the basis in least squares.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

LevelKind = Literal["signs", "bits"]
TURNS = 30
"""Turns after which a basis hardly moves."""
PULL = 1e-6
"""Weight of the old basis in each solution, in units of all values: keeps it solvable."""
NORMAL = 0.6745
"""Median of the absolute value of a standard normal variable."""


WIDTHS = np.arange(2, 17, dtype=np.float32) / 4
"""Multiples of the paper's start that are tried: with 16 levels it covers half of the values'
range, and from there the fit takes hundreds of turns to the ends."""


@dataclasses.dataclass(frozen=True)
class LearnedLevels:
    """The static half of a quantizer on learned levels; codes are numbers of rows of `codes`.

    Attributes:
      bits: length of the basis, 1..4.
      kind: of its codes.
      axis: -1 for a basis of each output channel, None for one.
    """

    bits: int
    kind: LevelKind
    axis: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError unless 1 <= bits <= 4."""
        check_length(self.bits)

    @property
    def dtype(self) -> np.dtype:
        """Storage type of codes."""
        return np.dtype(np.uint8)

    def rows(self, x: Array) -> Array:
        """The values that share a basis, a row each."""
        return x.reshape(1, -1) if self.axis is None else x.reshape(-1, x.shape[-1]).T

    def whole(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """A tensor again, out of its rows."""
        return (rows if self.axis is None else rows.T).reshape(shape)


def check_length(n: int) -> None:
    """Refuses a basis of another length than 1 to 4.

    Raises:
      ValueError: saying so.
    """
    if not 1 <= n <= 4:
        raise ValueError(f"a basis has 1 to 4 vectors, got {n}.")


class Basis(NamedTuple):
    """The traced half: a set of levels.

    Attributes:
      vectors: n numbers for each channel (or one channel for all).
      codes: the codes of all 2^n levels, -1 and 1 or 0 and 1.
    """

    vectors: Float[Array, "chan n"]
    codes: Float[Array, "levels n"]


class Fit(NamedTuple):
    """A fitted basis.

    Attributes:
      basis: the last one.
      errors: mean squared error of each channel before each turn.
    """

    basis: Basis
    errors: Float[Array, "turns chan"]


def codes(n: int, kind: LevelKind) -> Float[np.ndarray, "levels n"]:
    """All codes of n signs, or n bits."""
    bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    return (2 * bits - 1 if kind == "signs" else bits).astype(np.float32)


def start(
    x: Float[Array, "chan m"], weight: Float[Array, "chan m"], n: int, kind: LevelKind
) -> Basis:
    """Evenly spaced levels, of the spread of the values.

    Args:
      x: values of each channel.
      weight: how often each occurs; sums to 1 over a channel.
      n: length of the basis.
      kind: of its codes.

    Returns:
      `0.6745 sigma 2^(j - n + 1)` for signs and `0.6745 sigma 2^(j + 1) / (2^n - 1)` for bits. The
      paper's `sigma` is that of He's initialisation (weights) and 1 (activations); ours is the
      root mean square of the values, of positive ones for bits.

    Reference:
      Zhang et al. 2018, "LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep
      Neural Networks", the released code.
    """
    counted = weight if kind == "signs" else jnp.where(x > 0, weight, 0.0)
    total = jnp.maximum(jnp.sum(counted, 1, keepdims=True), 1e-30)
    sigma = jnp.sqrt(jnp.sum(counted * x**2, 1, keepdims=True) / total)
    unit = 2.0 ** (1 - n) if kind == "signs" else 2.0 / (2**n - 1)
    steps = NORMAL * unit * 2.0 ** np.arange(n)
    return Basis(sigma * steps.astype(np.float32), jnp.asarray(codes(n, kind)))


def best_start(
    x: Float[Array, "chan m"], weight: Float[Array, "chan m"], n: int, kind: LevelKind
) -> Basis:
    """The multiple of `start` with the least error, channel by channel."""
    narrow = start(x, weight, n, kind)
    widened = lambda width: narrow._replace(vectors=width * narrow.vectors)
    errors = lax.map(lambda width: error(x, weight, widened(width)), jnp.asarray(WIDTHS))
    return widened(jnp.asarray(WIDTHS)[jnp.argmin(errors, axis=0)][:, None])


def levels(basis: Basis) -> Float[Array, "chan levels"]:
    """The levels of each channel, in the order of their codes."""
    return jnp.einsum("cn,ln->cl", basis.vectors, basis.codes, precision=lax.Precision.HIGHEST)


def assign(x: Float[Array, "chan m"], basis: Basis) -> Int[Array, "chan m"]:
    """The code of the level nearest to each value; thresholds lie halfway between levels."""

    def one(x: Float[Array, " m"], levels: Float[Array, " levels"]) -> Int[Array, " m"]:
        order = jnp.argsort(levels)
        ordered = levels[order]
        return order[jnp.searchsorted((ordered[1:] + ordered[:-1]) / 2, x)]

    return jax.vmap(one)(x, levels(basis))


def level_of(assigned: Int[Array, "chan m"], basis: Basis) -> Float[Array, "chan m"]:
    """The levels of codes."""
    return jnp.take_along_axis(levels(basis), assigned, axis=1)


def snap(x: Float[Array, "chan m"], basis: Basis) -> Float[Array, "chan m"]:
    """The level nearest to each value."""
    return level_of(assign(x, basis), basis)


def on_basis(x: Float[Array, "chan m"], basis: Basis) -> Float[Array, "chan m"]:
    """`snap`, differentiable: by `x` like the identity between the outer levels."""
    ends = lax.stop_gradient(levels(basis))
    inside = jnp.clip(x, jnp.min(ends, 1, keepdims=True), jnp.max(ends, 1, keepdims=True))
    return snap(x, basis) + (inside - lax.stop_gradient(inside))


def error(
    x: Float[Array, "chan m"], weight: Float[Array, "chan m"], basis: Basis
) -> Float[Array, " chan"]:
    """Mean squared distance of values from their levels."""
    return jnp.sum(weight * (x - snap(x, basis)) ** 2, axis=1)


def refit_basis(
    x: Float[Array, "chan m"],
    weight: Float[Array, "chan m"],
    assigned: Int[Array, "chan m"],
    basis: Basis,
) -> Basis:
    """The basis that is best for given codes, from counts and sums by code.

    Args:
      x: values of each channel.
      weight: how often each occurs; sums to 1 over a channel.
      assigned: their codes.
      basis: the old one.

    Returns:
      `(B^T B + p I)^-1 (B^T x + p v)`, with `B^T B = C^T diag(count) C` and `B^T x = C^T sum`. The
      old basis `v` pulls at the new only where codes leave it undetermined.

    Reference:
      Zhang et al. 2018, section 3.2 (least squares given codes).
    """
    size, n = basis.codes.shape

    def one(x, weight, assigned, vectors):
        count = jax.ops.segment_sum(weight, assigned, size)
        total = jax.ops.segment_sum(weight * x, assigned, size)
        square = basis.codes.T @ (count[:, None] * basis.codes) + PULL * jnp.eye(n)
        return jnp.linalg.solve(square, basis.codes.T @ total + PULL * vectors)

    return basis._replace(vectors=jax.vmap(one)(x, weight, assigned, basis.vectors))


def fit_basis(
    x: Float[Array, "chan m"],
    n: int,
    kind: LevelKind,
    *,
    weight: Float[Array, "chan m"] | None = None,
    turns: int = TURNS,
) -> Fit:
    """The basis of each channel by turns of assigning and solving; no turn makes it worse.

    Args:
      x: values of each channel.
      n: length of the basis, 1..4.
      kind: of its codes: `bits` for values without negative ones.
      weight: how often each value occurs; None for once.
      turns: how many.

    Returns:
      The basis and the errors on the way.

    Raises:
      ValueError: unless 1 <= n <= 4.
    """
    check_length(n)
    weight = jnp.ones_like(x) if weight is None else weight
    weight = weight / jnp.maximum(jnp.sum(weight, 1, keepdims=True), 1e-30)

    def turn(basis: Basis, _: None) -> tuple[Basis, Float[Array, " chan"]]:
        return refit_basis(x, weight, assign(x, basis), basis), error(x, weight, basis)

    return Fit(*lax.scan(turn, best_start(x, weight, n, kind), length=turns))
