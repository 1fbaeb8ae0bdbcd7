"""Weights at zero, and what the others make of it."""

import numpy as np
import pytest

from dfq_jax.numerics.sparsity import Pattern, error, sparse, surviving

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 16)) @ RNG.normal(size=(16, 16))
GRAM, W = X.T @ X / 300, RNG.normal(size=(16, 5))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(0.3)])
def test_as_many_stay_as_the_pattern_says(pattern):
    found = sparse(W, GRAM, pattern) != 0
    if pattern.among:
        assert (found.reshape(-1, pattern.among, 5).sum(1) == pattern.kept).all()
    else:
        assert found.sum() == round(0.3 * W.size)
    largest = surviving(np.abs(W), pattern)
    assert largest.sum() == found.sum()
    assert error(sparse(W, GRAM, pattern) - W, GRAM) < error(W * largest - W, GRAM)


def test_without_correlation_the_smallest_go_and_nothing_else_moves():
    found = sparse(W, np.eye(16), Pattern(2, 4))
    assert np.allclose(found, W * surviving(np.abs(W), Pattern(2, 4)))


def test_one_weight_gone_is_the_least_squares_of_the_rest():
    """The last input's weight is made up for by none, the first's by all: that of least squares."""
    w = np.abs(W[:, :1]) + 1
    w[0] = 1e-3
    found = sparse(w, GRAM, Pattern(15 / 16))
    rest = np.linalg.lstsq(X[:, 1:], X @ w, rcond=None)[0]
    assert found[0] == 0
    assert np.allclose(found[1:], rest, atol=1e-3)


def test_words():
    assert (str(Pattern(2, 4)), str(Pattern(0.2))) == ("2:4", "80% zeros")
    assert Pattern(2, 4).fits(16)
    assert not Pattern(2, 4).fits(3)
