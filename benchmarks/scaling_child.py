"""One measurement of scaling in a process of its own: `scaling.py` starts it and reads it.

`spread` synthesizes on several host devices and again on one; `share` is one of several processes
that make one set of images; `cost` counts what a step does and times it; `machine` measures what a
roofline needs. Prints one JSON object. The objective is that of the recipe `best`, whose
statistics are those of the batch.
"""

import argparse
import itertools
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scaling_model
from synthesis_loops import fastest, torch_module

PATIENCE = 600.0
COLLECTIVES = r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
COLLECTIVE = re.compile(rf" = (\(.*?\)|\S+) (?:{COLLECTIVES})(?:-start)?\(")
ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("spread", "share", "cost", "machine"))
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--size", type=int, default=32, help="pixels along each side")
    parser.add_argument("--mode", choices=("apart", "together"), default="apart")
    parser.add_argument("--devices", type=int, default=1, help="host devices of this process")
    parser.add_argument("--cores", type=int, help="bind the process to so many; default: all")
    parser.add_argument("--batch", type=int, default=4, help="images of a device")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=2)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="of `share`, of all processes")
    parser.add_argument("--folder", type=Path, help="of the set that `share` adds to")
    parser.add_argument("--like", type=Path, help="a set that it should equal")
    parser.add_argument("--port", type=int, default=0, help="of jax.distributed; 0: none")
    args = parser.parse_args()
    if args.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    started = time.perf_counter()
    import jax

    jax.config.update("jax_num_cpu_devices", args.devices)
    if args.port:
        address = f"127.0.0.1:{args.port}"
        jax.distributed.initialize(address, args.processes, args.process)
    made = {"spread": spread, "share": share, "cost": cost, "machine": machine}[args.what](args)
    print(json.dumps({**made, "seconds": time.perf_counter() - started}))


def network(args: argparse.Namespace) -> Any:
    """The network with random weights and statistics."""
    from dfq_jax import load

    return load(torch_module(args.network), example=(3, args.size, args.size))


def spread(args: argparse.Namespace) -> dict[str, Any]:
    """Images on several devices, and the same on one."""
    import jax
    import numpy as np

    from dfq_jax.base.parallel import Machine
    from dfq_jax.optim.progress import Watcher
    from dfq_jax.recipes.best import best
    from dfq_jax.synthesis.run.engine import synthesize_images

    model, n = network(args), args.devices * args.batch
    size = n if args.mode == "together" else args.batch
    recipe, key = best(steps=args.steps, batch=size), jax.random.key(0)

    def made(devices: int) -> tuple[np.ndarray, list[Visit]]:
        told: list[Visit] = []
        now = lambda: (time.perf_counter(), time.process_time())
        keep = lambda p: told.append(Visit(p.batch, p.step, *now()))
        machine, watch = Machine(devices, together=args.mode == "together"), Watcher(progress=keep)
        how: Any = {"chunk": args.chunk, "machine": machine, "watch": watch}
        found = synthesize_images(model, recipe, n, key, **how)
        return np.asarray(found.images), told

    images, told = made(args.devices)
    facts: dict[str, Any] = {"step_s": step_seconds(told), "busy": busy(told)}
    facts["core_s"] = core_seconds(told) / n
    if args.devices > 1:
        alone, single = made(1)
        facts |= {"single_s": step_seconds(single), "single_core_s": core_seconds(single) / size}
        facts |= {"difference": float(np.max(np.abs(images - alone)))}
    return facts


class Visit(NamedTuple):
    """The host between two chunks.

    Attributes:
      round: of batches.
      step: steps done in it.
      at: seconds of the clock.
      used: seconds of all cores that this process has had.
    """

    round: int
    step: int
    at: float
    used: float


def chunks(told: Sequence[Visit]) -> list[tuple[Visit, Visit]]:
    """Beginning and end of every chunk but the first of a round, which may compile."""
    pairs = itertools.pairwise(told)
    return [(a, b) for a, b in pairs if a.round == b.round and a.step < b.step]


def step_seconds(told: Sequence[Visit]) -> float:
    """Seconds of a step of all rounds, one after the other; of each the fastest chunk counts."""
    least: dict[int, float] = {}
    for a, b in chunks(told):
        seconds = (b.at - a.at) / (b.step - a.step)
        least[a.round] = min(seconds, least.get(a.round, math.inf))
    return sum(least.values())


def busy(told: Sequence[Visit]) -> float:
    """Cores this process has had on average; fewer than it may use, if they were idle or taken."""
    pairs = chunks(told)
    return sum(b.used - a.used for a, b in pairs) / sum(b.at - a.at for a, b in pairs)


def core_seconds(told: Sequence[Visit]) -> float:
    """Seconds of all cores a step, on average; other work on the machine hardly changes them."""
    pairs = chunks(told)
    return sum(b.used - a.used for a, b in pairs) / sum(b.step - a.step for a, b in pairs)


def share(args: argparse.Namespace) -> dict[str, Any]:
    """The share of one process in a set of images; under `jax.distributed` it finds its place."""
    import jax
    import numpy as np

    from dfq_jax.base.parallel import Machine
    from dfq_jax.optim.progress import Watcher
    from dfq_jax.recipes.best import best
    from dfq_jax.synthesis.run.processes import synthesize_shards
    from dfq_jax.synthesis.run.shards import load_shards

    recipe = best(steps=args.steps, batch=args.batch)
    n = args.rounds * args.devices * args.batch
    visits: list[float] = []

    def visit(_: object) -> None:
        if not visits:
            wait_for_others(args)
        visits.append(time.time())

    which = (None, None) if args.port else (args.process, args.processes)
    machine = Machine(args.devices, process=which[0], processes=which[1])
    given = (network(args), recipe, n, jax.random.key(0), args.folder, {"what": "scaling"})
    made = synthesize_shards(
        *given, chunk=args.chunk, machine=machine, watch=Watcher(progress=visit)
    )
    found: dict[str, Any] = {"visits": visits, "complete": made.complete}
    if made.complete and args.like:
        ours, theirs = (np.asarray(load_shards(f).images) for f in (args.folder, args.like))
        found["difference"] = float(np.max(np.abs(ours - theirs)))
    return found


def wait_for_others(args: argparse.Namespace) -> None:
    """Returns when every process has compiled, so that what is timed is work side by side."""
    mark = lambda process: args.folder.with_name(f"{args.folder.name}.ready-{process}")
    mark(args.process).touch()
    deadline = time.monotonic() + PATIENCE
    while not all(mark(process).exists() for process in range(args.processes)):
        if time.monotonic() > deadline:
            raise SystemExit("the other process does not get ready")
        time.sleep(0.002)


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """What a step does by our count and by XLA's, what it takes, and what two devices exchange."""
    import jax

    from dfq_jax.synthesis.terms.targets import batch_norm_targets

    model = network(args)
    targets, _ = batch_norm_targets(model)
    channels = sum(target.mean.size for target in targets.values())
    work = scaling_model.work_of(model, channels, len(targets))
    start = time.perf_counter()
    program, given = compiled(model, args, 1)
    compile_s = time.perf_counter() - start
    counted = program.cost_analysis()
    counted = counted[0] if isinstance(counted, list) else counted or {}
    step = fastest(lambda: jax.block_until_ready(program(given))) / args.steps
    sums = exchanged(compiled(model, args, args.devices)[0].as_text() or "")
    return {
        "work": work._asdict(),
        "batch": args.batch,
        "xla_flops": float(counted.get("flops", 0.0)) / args.batch,
        "xla_bytes": float(counted.get("bytes accessed", 0.0)) / args.batch,
        "step_s": step,
        "compile_s": compile_s,
        "collectives": len(sums),
        "collective_bytes": sum(sums),
        "shard_s": shard_seconds(model, args.batch),
    }


def compiled(model: Any, args: argparse.Namespace, devices: int) -> tuple[Any, list[Any]]:
    """A chunk of one batch spread over devices, compiled, and the arrays to call it with.

    XLA counts the body of a loop once, so the cost of the program is that of a step. Convolutions
    multiply as on a chip, not by tiles.
    """
    import jax

    from dfq_jax.base.parallel import Machine, settled
    from dfq_jax.optim.fit import run_chunk, start_state
    from dfq_jax.recipes.best import best
    from dfq_jax.synthesis.run.attempts import BatchStart, begin
    from dfq_jax.synthesis.run.engine import measured, ready, spread_of
    from dfq_jax.synthesis.terms.targets import Forward

    size, how = args.batch * devices, Forward(tiles=False)
    work = measured(model, best(steps=args.steps, batch=size), size)
    run = ready(
        model, jax.random.key(0), work, spread_of(work, Machine(devices, together=True)), how
    )
    batch = begin(run.job, BatchStart(run.shared, run.memory, jax.random.key(1)))
    plan = run.job.plans[0]
    step = plan.step(run.job.parts[-1])
    begun = start_state(*settled((batch.x, batch.memory)), step)
    arrays, structure = jax.tree.flatten(settled((begun, batch.context, batch.key)))
    static = (step, args.steps)
    whole = jax.jit(lambda arrays: run_chunk(*structure.unflatten(arrays), *static))
    return whole.lower(arrays).compile(), arrays


def exchanged(program: str) -> list[int]:
    """Bytes that each collective operation of a compiled program yields."""
    widths = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}

    def size(kind: str, shape: str) -> int:
        return widths.get(kind, 4) * math.prod(int(n) for n in shape.split(",") if n)

    return [sum(size(*a) for a in ARRAY.findall(m[1])) for m in COLLECTIVE.finditer(program)]


def shard_seconds(model: Any, batch: int) -> float:
    """Seconds to write a shard of a batch."""
    import numpy as np

    from dfq_jax.synthesis.run.shards import ShardSet, write_shard

    with tempfile.TemporaryDirectory() as folder:
        shards = ShardSet(Path(folder), batch, batch, model.contract, {})
        images = np.zeros((batch, *model.contract.shape), np.float32)
        return fastest(lambda: write_shard(shards, 0, images))


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Peak of a matrix product, bandwidth of memory, and what a visit of the host takes."""
    import jax
    import jax.numpy as jnp
    import optax

    from dfq_jax.optim.fit import fit
    from dfq_jax.optim.steps import descent
    from dfq_jax.values import bound

    side, length, times = 1024, 2**24, 10
    a, x = jnp.ones((side, side)), jnp.ones(length)
    product = jax.jit(jnp.matmul)
    change = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, v: v * 0.5 + 1.0, x))
    visits: list[float] = []
    fit(
        descent(lambda x, context, now: (jnp.sum(x**2), ({}, ())), bound(optax.sgd, 0.1)),
        jnp.ones(4),
        (),
        steps=50,
        chunk=1,
        key=jax.random.key(0),
        on_chunk=lambda *_: visits.append(time.perf_counter()),
    )
    done: Callable[[Any], object] = jax.block_until_ready
    return {
        "flops": 2 * side**3 / fastest(lambda: done(product(a, a)), 10),
        "bandwidth": 2 * 4 * length * times / fastest(lambda: done(change(x)), 5),
        "visit_s": sorted(b - a for a, b in itertools.pairwise(visits))[24],
    }


if __name__ == "__main__":
    main()
