"""Channels that change places: the network computes the same, whatever its structure."""

import numpy as np
import pytest

import dfq_jax as dfq
from dfq_jax.graph.coupling import coupled_channels
from dfq_jax.passes.reorder import exchangeable, places, reordered


@pytest.mark.parametrize("name", ["tiny", "mixed", "dense", "shuffle", "excite"])
def test_the_function_stays(name, nets):
    model = getattr(nets, name)()
    coupled, rng = coupled_channels(model), np.random.default_rng(0)
    source = np.arange(len(coupled))
    for sets in map(np.array, exchangeable(coupled)):
        source[sets] = rng.permutation(sets)
    assert (source != np.arange(len(coupled))).any()
    images = nets.images(model, 4)
    exact, moved = (
        np.asarray(dfq.predict(m, images)) for m in (model, reordered(model, coupled, source))
    )
    assert np.abs(moved - exact).max() <= 1e-5 * np.abs(exact).max()


def test_positions_of_a_set_keep_their_order():
    """Two positions each, as behind a flattened image; what belongs to no set stays."""
    numbers = np.array([1, 2, 0, 1, 2])
    assert places(numbers, np.array([1, 0])).tolist() == [1, 0, 2, 4, 3]
    assert places(numbers, np.array([0, 1])).tolist() == [0, 1, 2, 3, 4]
