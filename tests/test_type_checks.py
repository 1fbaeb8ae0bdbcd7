"""Types, shapes and axes of one name are checked in every call of the package."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Array, Float
from type_checks import checked

from dfq_jax.numerics.histogram import BINS, Histogram, magnitudes
from dfq_jax.quantization.plan import parse_scheme

check = checked(typechecker=beartype)
Rows = Float[np.ndarray, "rows columns"]


@check
def product(
    a: Rows, b: Float[np.ndarray, " columns"], wrong: bool = False
) -> Float[Array, " rows"]:
    return jax.device_put(a.T @ a if wrong else a @ b)


@check
def halves(a: Float[np.ndarray, " columns"]) -> Iterator[np.ndarray]:
    yield from (a[: len(a) // 2], a[len(a) // 2 :])


@check
def halves_of_rows(a: Rows) -> list[np.ndarray]:
    return [half for row in a.T for half in halves(row)]


@check
@dataclasses.dataclass(frozen=True)
class Kept:
    x: Rows


X, Y = np.ones((2, 3), np.float32), np.ones(3, np.float32)


def test_what_fits_passes_and_names_stay():
    assert product(X, Y).shape == (2,)
    assert product(X[:1], Y).shape == (1,)  # lengths are those of one call
    assert product.__name__ == "product"
    assert len(halves_of_rows(X)) == 6  # also of what runs after its call
    assert Kept(X).x is X


@pytest.mark.parametrize(
    "call",
    [
        lambda: product(X, [1.0, 1.0, 1.0]),
        lambda: product(X, X),
        lambda: product(X, Y[:2]),
        lambda: product(X, Y, wrong=True),
        lambda: Kept(Y),
        lambda: halves(X),
    ],
    ids=["type", "rank", "axis of one name", "result", "field", "generator"],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(TypeError):
        call()


def test_the_package_is_checked(request):
    if not request.config.getoption("--jaxtyping-packages"):
        pytest.skip("asked for without")
    with pytest.raises(TypeError):
        parse_scheme(8)  # pyright: ignore[reportArgumentType]
    counts, edge = np.ones(BINS, np.float32), np.float32(1)
    made, _ = magnitudes(Histogram(*map(jax.device_put, (counts, -edge, edge))), 8)
    assert made.shape == (8,)
