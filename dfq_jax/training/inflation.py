"""Updates made larger until they change codes: AIT's gradient inflation.

A small rate moves kernels of few bits, and no code of theirs. The update of each kernel is doubled
until so many of its codes change in a step, then halved into by bisection; no update is made
smaller.

    w <- w + m u,   m >= 1 the least for which  share of codes changed by m u  >=  target

Reference:
  Choi et al. 2022, "It's All In the Teacher: Zero-Shot Quantization Brought Closer to the Teacher".
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PyTree

from dfq_jax.numerics.affine import Affine
from dfq_jax.numerics.levels import codes_of
from dfq_jax.optim.steps import Among, Moving, Now, Step
from dfq_jax.quantization.plan import Plan
from dfq_jax.training.method import falling
from dfq_jax.training.student import StudentKind, StudentStart, float_student, kernel_parameters
from dfq_jax.values import Bound, bound

DOUBLED, HALVED = 20, 20
"""Doublings at most, and bisections."""
Factors = Mapping[str, Float[Array, ""]]
"""{layer: how many times larger its update is}."""


def falling_share(share: float, *, drops: tuple[int, ...], factor: float = 0.1) -> Bound[Array]:
    """round -> the share of a kernel's codes that should change, multiplied at some rounds."""
    return bound(share_at, share, tuple(drops), factor)


def share_at(share: float, drops: tuple[int, ...], factor: float, step: Array) -> Array:
    """What `falling_share` gives."""
    return jnp.asarray(falling(share, drops, factor)(step))


class Inflation(NamedTuple):
    """How updates are made larger; hashable.

    Attributes:
      kind: of student.
      plan: what is quantized.
      share: of `falling_share`.
    """

    kind: StudentKind
    plan: Plan
    share: Bound[Array]


def inflated(inflation: Inflation, step: Step) -> Step:
    """A student's step with larger updates of its kernels.

    Args:
      inflation: how much larger.
      step: how it moves otherwise.
    """
    return Step(step.begin, bound(inflated_take, inflation, step))


def inflated_take(
    inflation: Inflation, step: Step, state: Moving, context: Among, now: Now
) -> tuple[Moving, Float[Array, ""], Mapping[str, Any]]:
    """One step of `inflated`."""
    kind, plan, share = inflation
    after, loss, parts = step.take(state, context, now)
    start = context.context.context.start
    with jax.numpy_dtype_promotion("standard"):
        wanted = share(now.step)
    by = factors(kind, plan, start, state.x, after.x, wanted)
    mean = jnp.mean(jnp.stack(list(by.values())))
    return after._replace(x=further(state.x, after.x, by)), loss, {**parts, "inflation": mean}


def factors(
    kind: StudentKind,
    plan: Plan,
    start: StudentStart,
    before: PyTree,
    after: PyTree,
    wanted: Float[Array, ""],
) -> Factors:
    """The least factors, 1 or more, at which so many codes of each kernel change.

    Args:
      kind: of student.
      plan: what is quantized.
      start: what of the student is not trained.
      before: what is trained, before the step.
      after: after it.
      wanted: share of codes.
    """
    old = steps_from_zero(kind, plan, before, start)

    def few(by: Factors) -> dict[str, Array]:
        new = steps_from_zero(kind, plan, further(before, after, by), start)
        return {
            name: jnp.mean((new[name] != old[name]).astype(jnp.float32)) < wanted for name in by
        }

    def double(_: Array, by: Factors) -> Factors:
        return {name: jnp.where(short, 2 * by[name], by[name]) for name, short in few(by).items()}

    def halve(_: Array, ends: tuple[Factors, Factors]) -> tuple[Factors, Factors]:
        low, high = ends
        middle = jax.tree.map(lambda a, b: (a + b) / 2, low, high)
        short = few(middle)
        raised = {name: jnp.where(short[name], middle[name], low[name]) for name in short}
        return raised, {n: jnp.where(short[n], high[n], middle[n]) for n in short}

    high = jax.lax.fori_loop(0, DOUBLED, double, {name: jnp.ones(()) for name in old})
    low = jax.tree.map(lambda v: jnp.maximum(v / 2, 1.0), high)
    return jax.lax.fori_loop(0, HALVED, halve, (low, high))[1]


def steps_from_zero(
    kind: StudentKind, plan: Plan, x: PyTree, start: StudentStart
) -> dict[str, Integer[Array, "..."]]:
    """{layer: codes of its kernel less the zero point}, whose moves alone change no weight."""
    model, table, found = float_student(kind, x, start), plan.table, {}
    for site, now in kernel_parameters(kind, plan, x, start, model).items():
        codes = codes_of(model.params[site.node]["kernel"], table[site].levels, now)
        zero = now.zero_point if isinstance(now, Affine) else jnp.zeros((), jnp.int32)
        found[site.node] = codes.astype(jnp.int32) - zero.astype(jnp.int32)
    return found


def further(before: PyTree, after: PyTree, by: Factors) -> PyTree:
    """What is trained after a step whose updates of kernels are so many times larger."""
    old, new = before["weights"], after["weights"]
    kernels = {n: old[n]["kernel"] + by[n] * (new[n]["kernel"] - old[n]["kernel"]) for n in by}
    return {**after, "weights": {**new, **{n: {**new[n], "kernel": v} for n, v in kernels.items()}}}
