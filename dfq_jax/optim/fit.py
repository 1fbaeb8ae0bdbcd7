"""The one optimisation loop: chunks of `lax.scan` under `jit`, everything else between chunks.

Randomness is `fold_in(key, step)`, and the state that early stopping and divergence depend on is
part of the saved state, so a run that is killed and resumed gives the same bits as one that was
not.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from dfq_jax.optim.state import StateStore


class Now(NamedTuple):
    """Where in a run an objective is evaluated.

    Attributes:
      key: fresh randomness for this step.
      step: steps taken so far.
      memory: what the objective returned as its memory a step ago.
    """

    key: Key[Array, ""]
    step: Int[Array, ""]
    memory: PyTree = ()


Objective = Callable[
    [PyTree, PyTree, Now], tuple[Float[Array, ""], tuple[Mapping[str, Any], PyTree]]
]
"""`objective(x, context, now) -> (loss, (parts, memory))`; only `x` is differentiated."""

Metrics = Mapping[str, float]
Status = Literal["finished", "stopped early", "diverged"]


class FitState(NamedTuple):
    """Everything a resumed run needs."""

    x: PyTree
    opt: PyTree
    memory: PyTree
    step: Int[Array, ""]
    loss: Float[Array, ""]
    best: Float[Array, ""]
    best_step: Int[Array, ""]
    diverged_at: Int[Array, ""]


class FitResult(NamedTuple):
    """What `fit` returns.

    Attributes:
      x: the optimised variables; the last finite ones if the run diverged.
      memory: the objective's, likewise.
      history: {"loss", part names}: one value a step of this process, in order.
      status: how the run ended.
      steps: steps taken in all, resumed ones included; the failing one if it diverged.
      loss: at the last step, also where this process took none because the run was over.
    """

    x: PyTree
    memory: PyTree
    history: Mapping[str, np.ndarray]
    status: Status
    steps: int
    loss: float


def fit(
    objective: Objective,
    x: PyTree,
    context: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    key: Key[Array, ""],
    memory: PyTree = (),
    chunk: int = 10,
    patience: int | None = None,
    on_chunk: Callable[[int, Metrics], None] | None = None,
    store: StateStore | None = None,
) -> FitResult:
    """Minimises `objective` over `x`.

    Args:
      objective: pure; define it once and reuse it, since each new function compiles anew.
      x: initial variables, left untouched.
      context: weights, targets, labels: passed to the objective, never differentiated.
      optimizer: optax transform; receives `value=loss`, so plateau rules work.
      steps: most steps to take.
      key: the only source of randomness; step i uses `fold_in(key, i)`.
      memory: what the objective is given at the first step; then what it returned a step ago.
      chunk: most steps between two visits of the host.
      patience: stop after this many steps without a relative improvement of 1e-4.
      on_chunk: called on the host with (step, last metrics) after each chunk.
      store: where to save state; if it holds one, the run resumes from it.

    Returns:
      Variables, history and status.

    Raises:
      ValueError: if steps or chunk is less than 1.
      KeyboardInterrupt: after saving the last finished chunk.
    """
    if steps < 1 or chunk < 1:
        raise ValueError(f"fit() needs steps and chunk >= 1, got {steps} and {chunk}.")
    state = start_state(x, memory, optimizer)
    if store is not None:
        state = store.load(state)
    length = chunk_length(max(steps - int(state.step), 1), chunk)
    history: list[Mapping[str, Array]] = []
    try:
        while not ended(state, steps, patience):
            state, metrics = run_chunk(state, context, key, objective, optimizer, length)
            jax.block_until_ready(state)
            history.append(metrics)
            if store is not None:
                store.save(int(state.step), state)
            if on_chunk is not None:
                on_chunk(int(state.step), {k: float(v[-1]) for k, v in metrics.items()})
    except KeyboardInterrupt:
        if store is not None:
            store.save(int(state.step), state, force=True)
        raise
    return result(state, history, steps)


def start_state(x: PyTree, memory: PyTree, optimizer: optax.GradientTransformation) -> FitState:
    """The state before the first step; `x` and `memory` are copied."""
    never = jnp.full((), -1, jnp.int32)
    zero, infinite = jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, jnp.float32)
    strict = lambda v: jnp.array(v, v.dtype)  # not weakly typed: one trace serves all
    x, memory = jax.tree.map(strict, (x, memory))
    return FitState(x, optimizer.init(x), memory, zero, infinite, infinite, zero, never)


def chunk_length(steps: int, at_most: int) -> int:
    """The largest divisor of `steps` that is at most `at_most`: one compilation serves all."""
    return next(d for d in range(min(steps, at_most), 0, -1) if steps % d == 0)


def ended(state: FitState, steps: int, patience: int | None) -> bool:
    """Whether a run is over."""
    step = int(state.step)
    stalled = patience is not None and step - int(state.best_step) > patience
    return step >= steps or stalled or int(state.diverged_at) >= 0


@partial(jax.jit, static_argnames=("objective", "optimizer", "length"))
def run_chunk(
    state: FitState,
    context: PyTree,
    key: Key[Array, ""],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    length: int,
) -> tuple[FitState, Mapping[str, Array]]:
    """`length` steps; after a loss or step that is not finite the state stands still."""
    update = optax.with_extra_args_support(optimizer).update
    slope = jax.value_and_grad(objective, has_aux=True)

    def one(s: FitState, _):
        now = Now(jax.random.fold_in(key, s.step), s.step, s.memory)
        (loss, (parts, memory)), grads = slope(s.x, context, now)
        with jax.numpy_dtype_promotion("standard"):  # Adam raises floats to integer powers
            updates, opt = update(grads, s.opt, s.x, value=loss)
            x = optax.apply_updates(s.x, updates)
        sound = jnp.isfinite(loss) & all_finite(x) & (s.diverged_at < 0)
        keep = lambda new, old: jnp.where(sound, new, old)
        improved = loss < s.best * (1 - 1e-4)
        new = FitState(
            jax.tree.map(keep, x, s.x),
            jax.tree.map(keep, opt, s.opt),
            jax.tree.map(keep, memory, s.memory),
            s.step + 1,
            loss,
            jnp.where(sound & improved, loss, s.best),
            jnp.where(sound & improved, s.step, s.best_step),
            jnp.where(sound | (s.diverged_at >= 0), s.diverged_at, s.step),
        )
        return new, {"loss": loss, **parts}

    return jax.lax.scan(one, state, length=length)


def all_finite(x: PyTree) -> Bool[Array, ""]:
    """Whether no leaf holds a NaN or infinity."""
    return jax.tree.reduce(lambda sound, v: sound & jnp.all(jnp.isfinite(v)), x, jnp.array(True))


def result(state: FitState, history: list[Mapping[str, Array]], steps: int) -> FitResult:
    """Gathers the history and names the way the run ended."""
    joined = (
        {k: np.concatenate([np.asarray(h[k]) for h in history]) for k in history[0]}
        if (history)
        else {}
    )
    failed = int(state.diverged_at)
    if failed >= 0:
        return FitResult(state.x, state.memory, joined, "diverged", failed, float(state.loss))
    status: Status = "finished" if int(state.step) >= steps else "stopped early"
    return FitResult(state.x, state.memory, joined, status, int(state.step), float(state.loss))
