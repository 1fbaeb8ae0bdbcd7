"""Times convolutions on the CPU: XLA as it is, `dfq_jax` (graph/lowering.py), PyTorch.

Gradients are those of a given output gradient, without the forward pass. PyTorch runs in a process
of its own, in the better of its two memory layouts, 2 threads. All take turns, and the fastest turn
of each counts, since a disturbance only ever adds time. A ratio above 1 means that dfq_jax is
faster. The second table does five gradient steps on the input in one `lax.scan`, as synthesis does,
and gives milliseconds a step.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import common
from common import Column, Row

THREADS = 2
STEPS = 5
PATIENCE = 15.0
LEAST_ROUNDS = 3
HOPELESS = 4.0
KINDS = ("forward", "input", "full")
LAYOUTS = ("contiguous", "channels_last")


class Case(NamedTuple):
    """A convolution with equal sides and padding that keeps the size at stride 1."""

    name: str
    n: int
    size: int
    cin: int
    cout: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def out(self) -> int:
        """Pixels along each side of the output."""
        return (self.size - 1) // self.stride + 1

    @property
    def gflop(self) -> float:
        """Billions of floating-point operations of the forward pass."""
        taps = self.kernel**2 * self.cin // self.groups
        return 2e-9 * self.n * self.out**2 * taps * self.cout

    @property
    def title(self) -> str:
        """What people call it."""
        kind = f"{self.kernel}x{self.kernel}"
        if self.groups == self.cin:
            kind = f"depthwise {kind}"
        elif self.groups > 1:
            kind = f"{kind} in {self.groups} groups"
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        channels = f"{self.cin}" if self.cin == self.cout else f"{self.cin}→{self.cout}"
        return f"{kind}{stride}, {self.n}x{self.size}x{self.size}x{channels}"


CASES = (
    Case("dw3", 16, 112, 32, 32, 3, groups=32),
    Case("dw3s2", 16, 112, 96, 96, 3, stride=2, groups=96),
    Case("dw3mid", 16, 56, 144, 144, 3, groups=144),
    Case("dw5", 16, 14, 480, 480, 5, groups=480),
    Case("pw24", 16, 56, 24, 144, 1),
    Case("pw112", 16, 14, 112, 672, 1),
    Case("c16", 128, 32, 16, 16, 3),
    Case("c16s2", 128, 32, 16, 32, 3, stride=2),
    Case("c64", 128, 8, 64, 64, 3),
    Case("stem", 16, 224, 3, 32, 3, stride=2),
    Case("group24", 16, 28, 96, 96, 3, groups=4),
    Case("group24s2", 16, 28, 96, 240, 3, stride=2, groups=4),
    Case("tiny", 2, 8, 8, 8, 3),
)
SCANNED = ("c16", "c16s2", "c64", "group24", "dw3mid", "pw24", "tiny")
BY_NAME = {case.name: case for case in CASES}
DEFAULT = tuple(name for name in BY_NAME if name != "tiny")

TIMES = (
    Column("native_ms", "XLA ms", ".2f"),
    Column("ours_ms", "dfq_jax ms", ".2f"),
    Column("torch_ms", "PyTorch ms", ".2f"),
    Column("layout", "its layout"),
    Column("native_ratio", "XLA/dfq_jax", ".2f"),
    Column("torch_ratio", "PyTorch/dfq_jax", ".2f"),
)
FIRST = Column("convolution", "convolution")
TABLES = {
    "lowering": (FIRST, Column("what", "what"), *TIMES, Column("gflops", "GFLOP/s", ".0f")),
    "scan": (FIRST, *TIMES),
}

Timer = Callable[[], list[float]]


def main() -> None:
    """Times the chosen rows."""
    parser = common.parser(__doc__)
    known = common.choices(BY_NAME)
    parser.add_argument("--rows", type=known, default=DEFAULT, help=", ".join(BY_NAME))
    parser.add_argument("--rounds", type=int, default=30, help="turns each way of computing has")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument("--torch-worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_worker:
        return serve()
    rows, reason = [], None
    with_torch = not args.no_torch and common.versions()["torch"] != "absent"
    worker = start_worker() if with_torch else None
    try:
        for case in (BY_NAME[name] for name in args.rows):
            rows += [row(case, kind, args.rounds, worker) for kind in KINDS]
        for case in (BY_NAME[name] for name in args.rows if name in SCANNED):
            rows.append(row(case, "scan", args.rounds, worker))
    finally:
        if worker is not None:
            worker.communicate()
    if worker is None:
        reason = "without PyTorch"
    common.finish(args, TABLES, rows, reason)


def row(case: Case, kind: str, rounds: int, worker: Any) -> Row:
    """One row: every way to compute it, and how they compare."""
    timers = jax_timers(case, kind)
    for layout in LAYOUTS if worker is not None else ():
        timers[layout] = lambda layout=layout: ask(worker, case, kind, layout)
    ms = fastest(timers, rounds)
    layout = min((n for n in LAYOUTS if n in ms), key=lambda name: ms[name], default=None)
    torch_ms = None if layout is None else ms[layout]
    found = {
        "table": "scan" if kind == "scan" else "lowering",
        "case": case.name,
        "convolution": case.title,
        "what": {"input": "input gradient", "full": "full gradient"}.get(kind, kind),
        "native_ms": ms["native"],
        "ours_ms": ms["ours"],
        "torch_ms": torch_ms,
        "layout": layout,
        "native_ratio": ms["native"] / ms["ours"],
        "torch_ratio": None if torch_ms is None else torch_ms / ms["ours"],
        "gflops": case.gflop * (2 if kind == "full" else 1) / ms["ours"] * 1e3,
    }
    ratios = ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items())
    common.log(f"{case.title}, {found['what']}: {ratios}")
    return found


def fastest(timers: Mapping[str, Timer], rounds: int) -> dict[str, float]:
    """The fastest time of each, all taking turns `rounds` times unless that takes long.

    XLA's own convolution leaves after a few turns where it is far behind, so that its slowness
    does not use up the turns of the others.
    """
    for timer in timers.values():
        timer()
    best = dict.fromkeys(timers, math.inf)
    start = time.monotonic()
    for done in range(rounds):
        enough = done >= LEAST_ROUNDS
        if enough and time.monotonic() - start > PATIENCE:
            break
        behind = best["native"] > HOPELESS * min(best.values())
        for name, timer in timers.items():
            if not (enough and behind and name == "native"):
                best[name] = min(best[name], *timer())
    return best


def repeats(case: Case, kind: str) -> int:
    """Timed calls a turn: more of the short ones."""
    work = case.gflop * {"forward": 1, "input": 1, "full": 2, "scan": 2 * STEPS}[kind]
    return 1 if work > 0.5 else 3


def jax_timers(case: Case, kind: str) -> dict[str, Timer]:
    """{`native` or `ours`: how to take its turn}, in JAX."""
    import jax
    import numpy as np

    from dfq_jax.graph.lowering import convolve, xla_convolution
    from dfq_jax.graph.ops import Conv2d

    side = (case.kernel // 2, case.kernel // 2)
    op = Conv2d((case.stride, case.stride), (side, side), case.groups)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jax.device_put(rng.standard_normal(shape, np.float32))
    x = normal(case.n, case.size, case.size, case.cin)
    kernel = normal(case.kernel, case.kernel, case.cin // case.groups, case.cout)
    g = normal(case.n, case.out, case.out, case.cout)
    ways = {"native": xla_convolution, "ours": convolve}
    timers: dict[str, Timer] = {}
    for name, way in ways.items():
        run = jax.jit(jax_program(lambda x, k, way=way: way(x, k, op, None), kind))
        call = lambda run=run: jax.block_until_ready(run(x, kernel, g))
        timers[name] = lambda call=call: scaled(common.turn(call, repeats(case, kind)), kind)
    return timers


def scaled(times: list[float], kind: str) -> list[float]:
    """Times a step."""
    return [t / STEPS for t in times] if kind == "scan" else times


def jax_program(convolution: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """A function of (x, kernel, output gradient) that computes what is to be timed."""
    import jax

    def step(x: Any, kernel: Any) -> Any:
        y, pull = jax.vjp(lambda x: convolution(x, kernel), x)
        return x - 1e-3 * pull(y)[0]

    match kind:
        case "forward":
            return lambda x, k, g: convolution(x, k)
        case "input":
            return lambda x, k, g: jax.vjp(lambda x: convolution(x, k), x)[1](g)
        case "full":
            return lambda x, k, g: jax.vjp(convolution, x, k)[1](g)
        case _:
            body = lambda x, k: (step(x, k), None)
            return lambda x, k, g: jax.lax.scan(lambda x, _: body(x, k), x, None, STEPS)[0]


def start_worker() -> Any:
    """A process that times PyTorch: one JSON line in, one out."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    line = [sys.executable, __file__, "--torch-worker"]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=environment)


def ask(worker: Any, case: Case, kind: str, layout: str) -> list[float]:
    """Lets the worker take its turn."""
    worker.stdin.write(json.dumps([case.name, kind, layout]) + "\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit("the PyTorch process ended early; run again with --no-torch")
    return json.loads(answer)


def serve() -> None:
    """The PyTorch process."""
    import torch

    torch.set_num_threads(THREADS)
    known: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name, kind, _ = json.loads(line)
        if line not in known:
            known.clear()
            for each in LAYOUTS:
                made = torch_program(BY_NAME[name], kind, each)
                known[json.dumps([name, kind, each]) + "\n"] = made
        times = scaled(common.turn(known[line], repeats(BY_NAME[name], kind)), kind)
        print(json.dumps(times), flush=True)


def torch_program(case: Case, kind: str, layout: str) -> Callable[[], object]:
    """What PyTorch does for the same result, as a function without arguments."""
    import torch

    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).contiguous(memory_format=order)
    x = normal(case.n, case.cin, case.size, case.size)
    kernel = normal(case.cout, case.cin // case.groups, case.kernel, case.kernel)
    g = normal(case.n, case.cout, case.out, case.out)
    stride, side, ones, zeros = [case.stride] * 2, [case.kernel // 2] * 2, [1, 1], [0, 0]
    forward = lambda x: torch.nn.functional.conv2d(
        x, kernel, None, case.stride, case.kernel // 2, 1, case.groups
    )
    backward = lambda g, x, wanted: torch.ops.aten.convolution_backward(
        g, x, kernel, None, stride, side, ones, False, zeros, case.groups, wanted
    )

    @torch.no_grad()
    def run() -> object:
        if kind == "forward":
            return forward(x)
        if kind in ("input", "full"):
            return backward(g, x, [True, kind == "full", False])
        images = x
        for _ in range(STEPS):
            images = images - 1e-3 * backward(forward(images), images, [True, False, False])[0]
        return images

    return run


if __name__ == "__main__":
    main()
