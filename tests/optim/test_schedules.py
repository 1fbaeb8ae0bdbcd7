from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.optim.schedules import adam_with_plateau, reduce_on_plateau, warmup_cosine


def scales(rule, losses):
    """The factor applied at each step."""
    chex.clear_trace_counter()
    step = lambda s, v: rule.update(jnp.ones(()), s, value=v)
    traced = jax.jit(chex.assert_max_traces(step, n=1))
    state, found = rule.init(jnp.ones(())), []
    for loss in losses:
        update, state = traced(state, jnp.float32(loss))
        found.append(float(update))
    return found


@pytest.mark.torch
@pytest.mark.parametrize(
    ("factor", "patience", "threshold", "floor"),
    [(0.1, 3, 1e-4, 0.0), (0.5, 0, 1e-2, 0.0), (0.3, 1, 0.2, 0.05), (0.7, 5, 1e-4, 0.4)],
)
def test_equals_torch_step_by_step(factor, patience, threshold, floor):
    torch = pytest.importorskip("torch")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        losses = np.exp(-np.arange(80) / 20) * rng.uniform(0.5, 1.5, 80)
        losses[20:35] = losses[20]  # a plateau
        losses = losses.astype(np.float32)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        optimizer.step()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            factor=factor,
            patience=patience,
            threshold=threshold,
            min_lr=floor,
            eps=0.0,
        )
        theirs = []
        for loss in losses:
            theirs.append(optimizer.param_groups[0]["lr"])
            scheduler.step(float(loss))
        rule = reduce_on_plateau(factor=factor, patience=patience, threshold=threshold, floor=floor)
        np.testing.assert_allclose(scales(rule, losses), theirs, rtol=1e-5)
        assert min(theirs) < 1


def test_fires_after_patience_plus_one_bad_steps_and_takes_effect_later():
    rule = reduce_on_plateau(factor=0.5, patience=2)
    assert scales(rule, [1.0] * 9) == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_improvement_is_relative():
    rule = reduce_on_plateau(factor=0.5, patience=0, threshold=0.1)
    assert scales(rule, [1.0, 0.95, 0.89, 0.85]) == [1, 1, 0.5, 0.5]


def test_a_floor_never_raises_the_scale():
    """As in PyTorch, where a `min_lr` above the learning rate changes nothing."""
    assert scales(reduce_on_plateau(patience=0, floor=10.0), [1.0] * 4) == [1] * 4


def test_a_forgetful_rule_starts_anew_after_each_cut():
    """Losses falling again from a higher level are improvements; equal ones last a step longer."""
    rule = lambda forget: reduce_on_plateau(factor=0.5, patience=1, forget=forget)
    assert scales(rule(True), [1.0] * 8) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert scales(rule(False), [1.0] * 8) == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]
    jump = [1.0, 9.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    assert scales(rule(True), jump) == [1] * 3 + [0.5] * 5
    assert scales(rule(False), jump) == [1] * 3 + [0.5] * 2 + [0.25] * 2 + [0.125]


@pytest.mark.parametrize("factor", [0.0, 1.0, -0.5])
def test_factor_must_shrink(factor):
    with pytest.raises(
        ValueError, match=rf"reduce_on_plateau\(\) needs 0 < factor < 1, got {factor}"
    ):
        reduce_on_plateau(factor=factor)


def test_adam_with_plateau_has_an_absolute_floor():
    """Adam's steps for a constant slope have the size of the learning rate."""
    rule = adam_with_plateau(0.02, patience=1, floor=0.003, factor=0.5)
    one = jnp.ones(())
    with jax.numpy_dtype_promotion("standard"):
        state, sizes = rule.init(one), []
        step = jax.jit(lambda state: rule.update(one, state, one, value=one))
        for _ in range(9):
            update, state = step(state)
            sizes.append(-float(update))
    wanted = [0.02] * 3 + [0.01] * 2 + [0.005] * 2 + [0.003] * 2
    np.testing.assert_allclose(sizes, wanted, rtol=1e-4)


def test_scales_every_leaf():
    rule = reduce_on_plateau(factor=0.5, patience=0)
    state = rule.init(())
    tree = {"a": jnp.ones(2), "b": jnp.array(3.0)}
    update: Any = tree
    for _ in range(3):
        update, state = rule.update(tree, state, None, value=jnp.float32(1))
    assert update["a"].tolist() == [0.5, 0.5]
    assert float(update["b"]) == 1.5


def test_warmup_then_cosine():
    """Step 0 at a hundredth, step 99 at the rate, then half a cosine that ends at 0."""
    rate = jax.jit(warmup_cosine(0.25, 400))
    found = np.array([float(rate(i)) for i in range(401)])
    assert found[0] == pytest.approx(0.0025)
    assert found[99] == pytest.approx(0.25)
    np.testing.assert_allclose(np.diff(found[:100]), 0.0025, rtol=1e-3)
    wanted = 0.125 * (1 + np.cos(np.pi * np.arange(301) / 300))
    np.testing.assert_allclose(found[100:], wanted, atol=1e-6)
    assert 0 < found[399] < 1e-4 * found.max()
    assert found[400] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("steps", "top"), [(1, 0), (2, 0), (5, 1), (60, 29)])
def test_warmup_takes_no_more_than_half_of_a_short_run(steps, top):
    found = [float(jnp.asarray(warmup_cosine(2.0, steps)(i))) for i in range(steps)]
    assert int(np.argmax(found)) == top
    assert found[top] == pytest.approx(2)
    assert min(found) > 0
