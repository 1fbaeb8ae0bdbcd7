"""The one optimisation loop: chunks of `lax.scan` under `jit`, everything else between chunks.

Randomness is `fold_in(key, step)`, and the state that early stopping and divergence depend on is
part of the saved state, so a run that is killed and resumed gives the same bits as one that was
not.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from dfq_jax.base.parallel import no_mesh, on_every_device, remembered, settled, stack, unstack
from dfq_jax.optim.chunk_data import Fed
from dfq_jax.optim.out_of_memory import sparing
from dfq_jax.optim.progress import Metrics
from dfq_jax.optim.state import StateStore
from dfq_jax.optim.steps import Moving, Now, Step

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
    step: Step,
    x: PyTree,
    context: PyTree,
    *,
    steps: int,
    key: Key[Array, ""],
    memory: PyTree = (),
    chunk: int = 10,
    patience: int | None = None,
    on_chunk: Callable[[int, Metrics], None] | None = None,
    store: StateStore | None = None,
    lighter: Callable[[], Step] | None = None,
    feed: Callable[[int, int], PyTree] | None = None,
) -> FitResult:
    """Takes steps until they are over, `x` no longer gets better, or is no number any more.

    Args:
      step: how to take one, e.g. `descent(objective, optimizer)`; equal ones compile once.
      x: initial variables, left untouched. If some arrays lie on a mesh, all are brought there, and
        it is the whole arrays that are meant: statistics are those of all devices.
      context: weights, targets, labels: passed to the objective, never differentiated.
      steps: most steps to take.
      key: the only source of randomness; step i uses `fold_in(key, i)`.
      memory: what objectives are given at the first step; then what they returned a step ago.
      chunk: most steps between two visits of the host.
      patience: stop after this many steps without a relative improvement of 1e-4.
      on_chunk: called on the host with (step, last metrics) after each chunk.
      store: where to save state; if it holds one, the run resumes from it.
      lighter: where memory does not suffice -> an equal step that takes less; see `sparing`.
      feed: (first step, how many) -> what the objective reads in those steps, one entry a step;
        its context is then a `Fed`. For data too large to lie on the device as a whole.

    Returns:
      Variables, history and status.

    Raises:
      ValueError: if steps or chunk is less than 1.
      KeyboardInterrupt: after saving the last finished chunk.
    """
    if steps < 1 or chunk < 1:
        raise ValueError(f"fit() needs steps and chunk >= 1, got {steps} and {chunk}.")
    with no_mesh():
        begun = start_state(*settled((x, memory)), step)
        state, context, key = settled((begun, context, key))
        if store is not None:
            state = store.load(state)
    length = chunk_length(max(steps - int(state.step), 1), chunk)
    keep, report = partial(keep_one, store), partial(report_one, on_chunk)
    given = lambda at: context if feed is None else Fed(context, jnp.int32(at), feed(at, length))
    go = lambda way, s: run_chunk(s, given(int(s.step)), key, way, length)
    advance = sparing(go, step, lighter)
    over = lambda s: ended(s, steps, patience)
    return result(*loop(state, advance, over, keep, report), steps)


class RunStart(NamedTuple):
    """What one of several runs begins with.

    Attributes:
      x: initial variables.
      key: the only source of its randomness.
      memory: before the first step.
      store: where it saves its state, if anywhere.
    """

    x: PyTree
    key: Key[Array, ""]
    memory: PyTree = ()
    store: StateStore | None = None


class Apart(NamedTuple):
    """Where several runs go on at the same time; hashable.

    Attributes:
      mesh: as many devices as runs.
      own: prefix of the context: whether a part is stacked, one entry a run, or the same for all.
    """

    mesh: Mesh
    own: PyTree


def fit_apart(
    step: Step,
    runs: Sequence[RunStart],
    context: PyTree,
    apart: Apart,
    *,
    steps: int,
    chunk: int = 10,
    on_chunk: Callable[[int, Metrics], None] | None = None,
    lighter: Callable[[], Step] | None = None,
) -> list[FitResult]:
    """Several runs of `fit` at the same time, one a device: `run_chunk` on each, nothing shared.

    A run that diverges stands still until all have ended. The states are kept as `fit` keeps them,
    so either can resume what the other began; but runs found at different steps begin anew.

    Args:
      step: as of `fit`.
      runs: what each begins with.
      context: what the step is passed, on the devices of the mesh.
      apart: the devices, and which parts of the context differ from run to run.
      steps: of each run.
      chunk: most steps between two visits of the host.
      on_chunk: called on the host with (step, last metrics averaged over the runs).
      lighter: as of `fit`.

    Returns:
      What `fit` would return for each run, bit for bit where the compiler makes the same program
      for one device and for many.

    Raises:
      ValueError: if steps or chunk is less than 1, or there are not as many runs as devices.
      KeyboardInterrupt: after saving the last finished chunk.
    """
    if steps < 1 or chunk < 1:
        raise ValueError(f"fit_apart() needs steps and chunk >= 1, got {steps} and {chunk}.")
    mesh, stores = apart.mesh, [run.store for run in runs]
    if len(runs) != mesh.size:
        raise ValueError(f"fit_apart() got {len(runs)} runs for {mesh.size} devices.")
    begun = [start_state(run.x, run.memory, step) for run in runs]
    state, key = stack(resumed(begun, stores), mesh), stack([run.key for run in runs], mesh)
    length = chunk_length(max(steps - steps_of(state), 1), chunk)
    keep, report = partial(keep_apart, stores), partial(report_apart, on_chunk)
    go = lambda way, s: run_chunks(s, context, key, way, length, apart)
    advance = sparing(go, step, lighter)
    over = lambda s: steps_of(s) >= steps or bool(np.all(np.asarray(s.diverged_at) >= 0))
    state, history = loop(state, advance, over, keep, report)
    each = [{k: np.asarray(v) for k, v in metrics.items()} for metrics in history]
    alone = lambda i: [{k: v[i] for k, v in metrics.items()} for metrics in each]
    return [result(run, alone(i), steps) for i, run in enumerate(unstack(state))]


def keep_one(store: StateStore | None, state: FitState, force: bool) -> None:
    """Saves the state of a run, if the last time is long enough ago or it must."""
    if store is not None:
        store.save(int(state.step), state, force=force)


def report_one(
    on_chunk: Callable[[int, Metrics], None] | None, state: FitState, metrics: Mapping[str, Array]
) -> None:
    """Tells of the last metrics of a chunk."""
    if on_chunk is not None:
        on_chunk(int(state.step), {k: float(np.asarray(v)[-1]) for k, v in metrics.items()})


def keep_apart(stores: Sequence[StateStore | None], state: FitState, force: bool) -> None:
    """Saves the state of every run, if the last time is long enough ago or it must."""
    if force or any(due(store) for store in stores):
        for store, each in zip(stores, unstack(state), strict=False):
            if store is not None:
                store.save(int(each.step), each, force=True)


def report_apart(
    on_chunk: Callable[[int, Metrics], None] | None, state: FitState, metrics: Mapping[str, Array]
) -> None:
    """Tells of a chunk of several runs: the last metrics, averaged over them."""
    if on_chunk is not None:
        last = {k: float(np.mean(np.asarray(v)[:, -1])) for k, v in metrics.items()}
        on_chunk(steps_of(state), last)


def loop(
    state: FitState,
    advance: Callable[[FitState, Callable[[], FitState]], tuple[FitState, Mapping[str, Array]]],
    over: Callable[[FitState], bool],
    keep: Callable[[FitState, bool], None],
    report: Callable[[FitState, Mapping[str, Array]], None],
) -> tuple[FitState, list[Mapping[str, Array]]]:
    """Chunk after chunk until the run is over; what happens between chunks happens here.

    Args:
      state: to begin with; consumed.
      advance: (state, a function that gives it again) -> state and metrics a chunk later.
      over: whether to stop.
      keep: saves the state; the second argument says whether it must, or may wait.
      report: tells of a chunk.

    Returns:
      The last state, and the metrics of every chunk.

    Raises:
      KeyboardInterrupt: after saving the last finished chunk.
    """
    history: list[Mapping[str, Array]] = []
    again = remembered(state)
    try:
        while not over(state):
            with no_mesh():
                state, metrics = advance(state, again)
                again = remembered(state)
            history.append(metrics)
            keep(state, False)
            report(state, metrics)
    except KeyboardInterrupt:
        keep(again(), True)
        raise
    return state, history


def resumed(begun: Sequence[FitState], stores: Sequence[StateStore | None]) -> Sequence[FitState]:
    """The states saved earlier, if all runs have one of the same step; else as they begin."""
    pairs = zip(begun, stores, strict=True)
    found = [state if store is None else store.load(state) for state, store in pairs]
    return found if len({int(s.step) for s in found}) == 1 else begun


def due(store: StateStore | None) -> bool:
    """Whether the last save is long enough ago."""
    return store is not None and time.monotonic() - store.saved_at >= store.every_seconds


def steps_of(state: FitState) -> int:
    """Steps taken by runs that go at the same pace."""
    return int(np.asarray(state.step)[0])


def start_state(x: PyTree, memory: PyTree, step: Step) -> FitState:
    """The state before the first step; every array is its own, so that all can be consumed."""
    zero, never, infinite = map(jax.device_put, (np.int32(0), np.int32(-1), np.float32(np.inf)))
    strict = lambda v: jnp.array(v, v.dtype)  # not weakly typed: one trace serves all
    x, memory = jax.tree.map(strict, (x, memory))
    state = FitState(x, step.begin(x), memory, zero, infinite, infinite, zero, never)
    return jax.tree.map(strict, state)


def chunk_length(steps: int, at_most: int) -> int:
    """The largest divisor of `steps` that is at most `at_most`: one compilation serves all."""
    return next(d for d in range(min(steps, at_most), 0, -1) if steps % d == 0)


def ended(state: FitState, steps: int, patience: int | None) -> bool:
    """Whether a run is over."""
    step = int(state.step)
    stalled = patience is not None and step - int(state.best_step) > patience
    return step >= steps or stalled or int(state.diverged_at) >= 0


@partial(jax.jit, static_argnames=("step", "length"), donate_argnums=0)
def run_chunk(
    state: FitState,
    context: PyTree,
    key: Key[Array, ""],
    step: Step,
    length: int,
) -> tuple[FitState, Mapping[str, Array]]:
    """`length` steps; after a loss or step that is not finite the state stands still.

    The state is consumed: what comes after takes its memory.
    """

    def one(s: FitState, _):
        now = Now(jax.random.fold_in(key, s.step), s.step, s.memory)
        moved, loss, parts = step.take(Moving(s.x, s.opt, s.memory), context, now)
        sound = jnp.isfinite(loss) & all_finite(moved.x) & (s.diverged_at < 0)
        keep = lambda new, old: jnp.where(sound, new, old)
        improved = loss < s.best * (1 - 1e-4)
        kept = jax.tree.map(keep, moved, Moving(s.x, s.opt, s.memory))
        new = FitState(
            kept.x,
            kept.opt,
            kept.memory,
            s.step + 1,
            loss,
            jnp.where(sound & improved, loss, s.best),
            jnp.where(sound & improved, s.step, s.best_step),
            jnp.where(sound | (s.diverged_at >= 0), s.diverged_at, s.step),
        )
        return new, {"loss": loss, **parts}

    return jax.lax.scan(one, state, length=length)


@partial(jax.jit, static_argnames=("step", "length", "apart"), donate_argnums=0)
def run_chunks(
    state: FitState,
    context: PyTree,
    key: Key[Array, " runs"],
    step: Step,
    length: int,
    apart: Apart,
) -> tuple[FitState, Mapping[str, Array]]:
    """`run_chunk` on every device, with a state and a key of its own."""
    one = lambda s, c, k: run_chunk(s, c, k, step, length)
    return on_every_device(one, apart.mesh, (True, apart.own, True))(state, context, key)


def all_finite(x: PyTree) -> Bool[Array, ""]:
    """Whether no leaf holds a NaN or infinity."""
    return jax.tree.reduce(lambda sound, v: sound & jnp.all(jnp.isfinite(v)), x, jnp.array(True))


def result(state: FitState, history: Sequence[Mapping[str, Any]], steps: int) -> FitResult:
    """Gathers the history and names the way the run ended."""
    joined = (
        {k: np.concatenate([np.asarray(h[k]) for h in history]) for k in history[0]}
        if history
        else {}
    )
    failed = int(state.diverged_at)
    if failed >= 0:
        return FitResult(state.x, state.memory, joined, "diverged", failed, float(state.loss))
    status: Status = "finished" if int(state.step) >= steps else "stopped early"
    return FitResult(state.x, state.memory, joined, status, int(state.step), float(state.loss))
