from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.synthesis.terms.aggregate import (
    IMAGE,
    MomentTable,
    ShiftedMoments,
    aggregate_gaps,
    aggregate_match,
    empty_table,
    moments_about,
    outlying,
    output_range,
    refreshed,
    row_of,
    together,
)
from dfq_jax.synthesis.terms.targets import Stats


def f32(x):
    return jnp.asarray(x, jnp.float32)


def turn(index):
    return jnp.array(index, jnp.int32)


USABLE = {"a": np.ones(4, bool), "b": np.array([1, 1, 0, 1, 1], bool)}


@pytest.fixture(scope="module")
def batches():
    """Three batches of two images of 4x6, and their activations in the layers "a" and "b"."""
    rng = np.random.default_rng(0)
    make = lambda h, w, c: (
        rng.normal(size=(2, h, w, c)) * rng.uniform(0.5, 2, c) + rng.normal(size=c)
    )
    return [{"a": make(3, 2, 4), "b": make(2, 2, 5), IMAGE: make(4, 6, 3)} for _ in range(3)]


@pytest.fixture(scope="module")
def targets(scenes: Any):
    rng = np.random.default_rng(1)
    return {
        k: scenes.target(rng.normal(size=u.size), rng.uniform(0.5, 2, u.size), u)
        for k, u in USABLE.items()
    }


@pytest.fixture(scope="module")
def shown(scenes: Any, batches, targets):
    """(batch, table, turn) -> what a term sees."""

    def look(index, memory, whose):
        stats = {k: scenes.stats_of(batches[index][k]) for k in USABLE}
        return scenes.observed(
            images=batches[index][IMAGE],
            stats=stats,
            targets=targets,
            memory=memory,
            turn=turn(whose),
        )

    return look


@pytest.fixture(scope="module")
def full(shown, targets):
    """A table of all three batches."""
    table = empty_table(targets, 3, 3)
    for i in range(3):
        table = refreshed(table, turn(i), row_of(shown(i, table, i)))
    return table


def numpy_gaps(batches, targets, indices):
    """{layer: (mean gap, deviation gap)} of all samples of some batches taken together."""
    gaps = {}
    for name in (*USABLE, IMAGE):
        x = np.concatenate(
            [batches[i][name].reshape(-1, batches[i][name].shape[-1]) for i in indices]
        )
        mean, var, usable = 0.0, 1.0, np.ones(x.shape[1])
        if name != IMAGE:
            mean, var, usable = (np.asarray(v, float) for v in targets[name])
        std = np.sqrt(x.var(0) + 1e-6)
        gaps[name] = ((x.mean(0) - mean) * usable, (std - np.sqrt(var)) * usable)
    return gaps


def numpy_match(gaps, spread):
    squares = {k: m**2 + spread * s**2 for k, (m, s) in gaps.items()}
    return (squares["a"].mean() + squares["b"].mean() + squares[IMAGE].sum()) / 3


@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_a_single_batch_is_matched_by_itself(spread, shown, batches, targets):
    observed = shown(0, empty_table(targets, 1, 3), 0)
    wanted = numpy_match(numpy_gaps(batches, targets, [0]), spread)
    assert float(aggregate_match(observed, spread)) == pytest.approx(wanted, rel=1e-5)


def test_all_batches_count_as_one_large_batch(shown, full, batches, targets):
    for name, gap in aggregate_gaps(shown(1, full, 1)).items():
        wanted = numpy_gaps(batches, targets, [0, 1, 2])[name]
        np.testing.assert_allclose(gap.mean, wanted[0], atol=2e-6)
        np.testing.assert_allclose(gap.spread, wanted[1], atol=2e-6)


def test_the_own_row_is_that_of_now(shown, full, batches, targets):
    """Batch 2 is shown in the place of batch 0: its stored row is out of date."""
    found = float(aggregate_match(shown(2, full, 0)))
    wanted = numpy_match(numpy_gaps(batches, targets, [2, 1, 2]), 1.0)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert found != pytest.approx(float(aggregate_match(shown(0, full, 0))), rel=1e-2)


def test_rows_not_yet_seen_do_not_count(shown, batches, targets):
    table = empty_table(targets, 3, 3)
    assert not table.seen.any()
    table = table._replace(rows=jax.tree.map(lambda rows: rows + 5, dict(table.rows)))
    alone = float(aggregate_match(shown(1, table, 2)))
    assert alone == pytest.approx(numpy_match(numpy_gaps(batches, targets, [1]), 1.0), rel=1e-5)
    one = refreshed(table, turn(0), row_of(shown(0, table, 0)))
    pair = float(aggregate_match(shown(1, one, 2)))
    assert pair == pytest.approx(numpy_match(numpy_gaps(batches, targets, [0, 1]), 1.0), rel=1e-5)


def test_refreshing_a_row_leaves_the_others(shown, full, targets):
    again = refreshed(full, turn(1), row_of(shown(0, full, 1)))
    for name, rows in again.rows.items():
        for new, old in zip(rows, full.rows[name], strict=True):
            np.testing.assert_array_equal(new[np.array([0, 2])], old[np.array([0, 2])])
            np.testing.assert_array_equal(new[1], old[0])  # the row of batch 0
    first = refreshed(empty_table(targets, 3, 3), turn(1), row_of(shown(0, full, 1)))
    assert first.seen.tolist() == [False, True, False]


def test_opposite_batches_match_together_though_not_alone(scenes):
    """Means +a and -a, target 0: alone each costs a^2, together nothing, for the same spread."""
    a, target = 0.7, scenes.target([0.0], [1.0 + 0.7**2])
    stats = lambda mean: {"bn": Stats(f32([[mean]]), f32([[1.0 - 1e-6]]), 4)}
    images = np.array([1, -1, 1, -1], float).reshape(1, 2, 2, 1)
    given = {"targets": {"bn": target}, "images": images}
    table = empty_table({"bn": target}, 2, 1)
    one = scenes.observed(stats=stats(a), memory=table, turn=turn(0), **given)
    table = refreshed(table, turn(0), row_of(one))
    other = scenes.observed(stats=stats(-a), memory=table, turn=turn(1), **given)
    assert float(aggregate_match(other)) < 1e-11
    alone = other._replace(memory=empty_table({"bn": target}, 2, 1))
    gap = aggregate_gaps(alone)["bn"]
    assert float(gap.mean[0]) == pytest.approx(-a)
    assert float(aggregate_match(alone)) > a**2 / 2 * 0.99


def test_slopes_reach_the_own_batch_only_and_shrink_with_the_number_of_batches(
    shown, full, targets
):
    def loss(observed, table):
        return aggregate_match(observed._replace(memory=table))

    observed = shown(1, full, 1)
    own, others = jax.grad(loss, argnums=(0, 1), allow_int=True)(observed, full)
    for leaf in jax.tree.leaves(others.rows):
        np.testing.assert_array_equal(leaf, 0)
    assert np.abs(own.natural).min() > 0
    assert np.abs(own.stats["a"].mean).min() > 0
    same = MomentTable(jax.tree.map(lambda v: jnp.tile(v[1:2], (3, 1)), dict(full.rows)), full.seen)
    among, _ = jax.grad(loss, argnums=(0, 1), allow_int=True)(observed, same)
    alone, _ = jax.grad(loss, argnums=(0, 1), allow_int=True)(observed, empty_table(targets, 3, 3))
    np.testing.assert_allclose(3 * among.natural, alone.natural, rtol=1e-3, atol=1e-6)


def test_moments_are_taken_about_a_constant_and_lose_no_digits():
    """Variance 1 around 3000: `E[x^2] - E[x]^2` in single precision would be off by whole units."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, 50, 2)) + 3000
    stats = Stats(f32(x.mean(1)), f32(x.var(1)), 50)
    row = moments_about(stats, f32([2999.0, 3001.0]))
    table = MomentTable({"a": ShiftedMoments(row.first[None], row.second[None])}, jnp.ones(1, bool))
    first, second = together(table)["a"]
    np.testing.assert_allclose(first, x.mean((0, 1)) - [2999, 3001], atol=1e-3)
    np.testing.assert_allclose(second - first**2, x.reshape(-1, 2).var(0), rtol=1e-2)


def test_output_range():
    outputs = f32([[1.0, 4.0, -2.0], [0.5, 0.5, 0.5]])
    assert float(output_range(outputs)) == 3
    assert float(output_range(outputs.reshape(2, 1, 3))) == 3
    slope = jax.grad(output_range)(outputs[:1])
    np.testing.assert_array_equal(slope, [[0, 1, -1]])


@pytest.mark.torch
def test_outlying_against_torch(scenes):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    x = rng.normal(size=(5, 3, 4, 6)) * rng.uniform(0.3, 2.5, (5, 1, 1, 1)) + rng.normal(
        size=(5, 1, 1, 1)
    )
    mean, var = rng.normal(size=6) * 0.1, rng.uniform(0.5, 1.5, 6)
    t = torch.tensor(x)
    far = lambda measured, recorded: torch.relu(
        ((measured - torch.tensor(recorded)) ** 2).sum(1) / 6 - 0.5
    )
    parts = far(t.mean((1, 2)), mean), far(t.std((1, 2)), np.sqrt(var))
    found = outlying(scenes.stats_of(x), scenes.target(mean, var))
    assert float(found) == pytest.approx(float((parts[0] + parts[1]).mean()), rel=1e-4)
    assert 0 < float((parts[0] > 0).double().mean()) < 1  # some images are inside
    assert 0 < float((parts[1] > 0).double().mean()) < 1


def test_typical_images_cost_nothing(scenes):
    target = scenes.target([0.0, 0.0], [1.0, 1.0])
    loss = lambda mean: outlying(Stats(mean, jnp.ones((1, 2)), 100), target)
    value, slope = jax.value_and_grad(loss)(f32([[0.6, 0.6]]))
    assert float(value) == 0
    np.testing.assert_array_equal(slope, 0)
    assert float(loss(f32([[1.0, 1.0]]))) == pytest.approx(0.5, rel=1e-4)
