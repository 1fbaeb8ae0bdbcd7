"""Updates that are made as large as it takes to change codes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.optim.steps import Among, Moving, Now, Step
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.recipes.ait import ait
from dfq_jax.recipes.gdfq import gdfq
from dfq_jax.training.inflation import (
    DOUBLED,
    Inflation,
    factors,
    falling_share,
    further,
    inflated,
    steps_from_zero,
)
from dfq_jax.training.student import (
    StudentKind,
    student_start,
    trained_at_first,
)

KIND = StudentKind(live=True)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def begun(nets):
    """A plan, what is not trained, and what is."""
    model = nets.stem()
    folded = fold_batch_norm(model)
    plan = resolve(folded.graph, Scheme(4, 4), "zsq_all_low")
    start = student_start(KIND, calibrate(folded, plan, nets.images(folded, 4)), model)
    return plan, start, trained_at_first(KIND, plan, start)


def noisy(x, size):
    """Variables after an update of noise in units of their own."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda v: v * (1 + size * rng.normal(size=v.shape).astype("f")), x)


def test_so_many_codes_change_and_no_update_is_smaller(begun):
    plan, start, x = begun
    find = jax.jit(lambda a, b: factors(KIND, plan, start, a, b, jnp.float32(0.2)))
    after = noisy(x, 1e-3)
    found = find(x, after)
    moved = further(x, after, found)
    steps = jax.jit(lambda v: steps_from_zero(KIND, plan, v, start))
    old, new = steps(x), steps(moved)
    for name, codes in old.items():
        assert float(found[name]) > 1
        changed = float(np.mean(np.asarray(codes != new[name])))
        assert 0.2 - 1e-6 <= changed <= 0.22 + 2 / codes.size
    same = (v["weights"]["bn1"]["scale"] for v in (moved, after))
    np.testing.assert_array_equal(*same)
    assert {float(v) for v in find(x, noisy(x, 5.0)).values()} == {1.0}
    assert {float(v) for v in find(x, x).values()} == {2.0**DOUBLED}  # of nothing, which stays so


def halves(state: Moving, context, now):
    """A step that changes nothing but a little."""
    return state._replace(x=noisy(state.x, 1e-3)), jnp.float32(2), {"own": jnp.float32(3)}


@pytest.mark.slow
def test_a_step_is_otherwise_what_it_was(begun):
    plan, start, x = begun
    nothing: Any = None
    step = inflated(Inflation(KIND, plan, falling_share(0.5, drops=(4,))), Step(nothing, halves))
    given: Any = type("", (), {"context": type("", (), {"start": start})})
    take = jax.jit(
        lambda x, n: step.take(Moving(x, (), ()), Among(given, {}), Now(KEY, jnp.int32(n)))
    )
    early, loss, parts = take(x, 0)
    late, _, fewer = take(x, 4)
    assert float(loss) == 2
    assert float(parts["own"]) == 3
    assert float(parts["inflation"]) > float(fewer["inflation"]) > 1
    before, after, small = (steps_from_zero(KIND, plan, v, start) for v in (x, early.x, late.x))
    share = lambda new: np.mean(np.asarray(before["conv1"] != new["conv1"]))
    np.testing.assert_allclose([share(after), share(small)], [0.5, 0.05], atol=0.02)


def test_ait_learns_from_the_teacher_alone():
    made, base = ait(), gdfq()
    assert [term.name for term in made.terms] == ["KL"]
    assert made.images == base.images
    assert made.inflation is not None
    assert base.inflation is None
    share = [float(made.inflation(jnp.float32(n))) for n in (0, 19_999, 20_000, 60_000)]
    np.testing.assert_allclose(share, [1e-3, 1e-3, 1e-4, 1e-6], rtol=1e-4)
