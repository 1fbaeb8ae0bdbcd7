import heapq

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.channels import input_ranges
from dfq_jax.numerics.splitting import plan_splits, split_inputs


def greedy(ranges, count):
    """{original channel: sorted sizes of its copies}, with a heap."""
    heap = [(-r, i) for i, r in enumerate(ranges)]
    heapq.heapify(heap)
    for _ in range(count):
        size, i = heapq.heappop(heap)
        heapq.heappush(heap, (size / 2, i))
        heapq.heappush(heap, (size / 2, i))
    return sorted((i, -size) for size, i in heap)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_the_widest_channel_is_split_each_time(count):
    rng = np.random.default_rng(count)
    kernel = rng.normal(size=(3, 2, 7, 4)) * np.exp(rng.normal(size=(7, 1)))
    kernel = jnp.asarray(kernel, jnp.float32)
    splits = plan_splits(input_ranges(kernel), count)
    found = input_ranges(split_inputs(kernel, splits))
    wanted = greedy(np.asarray(input_ranges(kernel)).tolist(), count)
    pairs = sorted(zip(splits.source.tolist(), found.tolist(), strict=True))
    np.testing.assert_allclose(pairs, wanted, rtol=1e-6)


@pytest.mark.parametrize("step", [None, 0.1])
def test_copies_sum_to_the_channel(step):
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    grid = None if step is None else jnp.asarray(rng.uniform(0.05, 0.2, (1, 3)), jnp.float32)
    splits = plan_splits(input_ranges(w), 6)
    x = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    found = x[:, splits.source] @ split_inputs(w, splits, grid)
    np.testing.assert_allclose(found, x @ w, atol=1e-6)


def test_one_outlier_halves_and_quarters():
    w = jnp.ones((6, 2)).at[3].set(8.0)
    most = [float(jnp.max(split_inputs(w, plan_splits(input_ranges(w), n)))) for n in (0, 1, 2, 3)]
    assert most == [8, 4, 4, 2]


def test_codes_of_the_copies_sum_to_the_code_of_the_whole():
    """`round(a/2 - 1/4) + round(a/2 + 1/4) = round(a)`, for a channel split again and again too."""
    rng = np.random.default_rng(2)
    step = jnp.asarray(rng.uniform(0.05, 0.2, (1, 200)), jnp.float32)
    whole = rng.integers(-60, 60, (40, 200)) + rng.uniform(-0.49, 0.49, (40, 200))
    w = jnp.asarray(whole, jnp.float32) * step
    splits = plan_splits(input_ranges(w), 50)
    codes = np.rint(np.asarray(split_inputs(w, splits, step) / step, np.float64))
    total = np.zeros((40, 200))
    np.add.at(total, np.asarray(splits.source), codes)
    clear = np.abs(np.abs(whole % 1 - 0.5)) > 1e-3  # not so near a tie that floats decide
    np.testing.assert_array_equal(total[clear], np.rint(whole)[clear])
    naive = np.rint(np.asarray(split_inputs(w, splits) / step, np.float64))
    rough = np.zeros((40, 200))
    np.add.at(rough, np.asarray(splits.source), naive)
    assert (rough[clear] != np.rint(whole)[clear]).mean() > 0.05


@pytest.mark.parametrize(("bits", "gain"), [(4, 5), (5, 6)])
def test_an_outlier_column_costs_far_less_when_split(bits, gain):
    """The card's measurement: three splits cut the error of a single scale about elevenfold."""
    w = np.random.default_rng(0).normal(size=(64, 64))
    w[5] *= 10
    w = jnp.asarray(w, jnp.float32)

    def error(splits):
        parts = np.asarray(split_inputs(w, splits), np.float64)
        scale = np.abs(parts).max() / (2 ** (bits - 1) - 1)
        total = np.zeros((64, 64))
        np.add.at(total, np.asarray(splits.source), np.rint(parts / scale) * scale)
        return ((total - np.asarray(w)) ** 2).mean()

    before, after = (error(plan_splits(input_ranges(w), n)) for n in (0, 3))
    assert after < before / gain
