"""What a reconstruction takes of the machine's memory, against what `dfq` foretells.

Every row is a process of its own: a network, images (noise: what they show does not matter here),
grids for them, then one reconstruction with a few steps. *Taken* is the growth of the process's
peak from just before the reconstruction, *foretold* what `recipes.reconstructions.foretold` says
at that moment, *peak* the whole process at its largest, the images included. Linux only.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import artifacts
import common
from artifacts import NETWORKS
from common import Column, Row

COLUMNS = [
    Column("network", "network"),
    Column("scheme", "scheme"),
    Column("n", "images"),
    Column("seen", "with enlarged"),
    Column("reconstruction", "reconstruction"),
    Column("steps", "steps"),
    Column("before", "before MiB", ".0f"),
    Column("foretold", "foretold MiB", ".0f"),
    Column("taken", "taken MiB", ".0f"),
    Column("ratio", "foretold/taken", ".2f"),
    Column("peak", "peak MiB", ".0f"),
    Column("seconds", "s", ".0f"),
]


def main() -> None:
    """A row for every network and reconstruction."""
    parser = common.parser(__doc__)
    parser.add_argument("--networks", type=common.choices(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--reconstructions", type=common.names, default=("closed_form", "best"))
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--n", type=int, default=256, help="images")
    parser.add_argument("--steps", type=int, default=5, help="of each unit that learns")
    args = parser.parse_args()
    rows: list[Row] = []
    networks, reason = artifacts.present(args.shared, args.networks)
    for network in networks:
        for name in args.reconstructions:
            rows.append(alone(network, name, args))
            common.logged(rows[-1], COLUMNS)
    common.finish(args, {"reconstruction_memory": COLUMNS}, rows, reason)


def alone(network: str, name: str, args: argparse.Namespace) -> Row:
    """`measured` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(measured, network, name, args).result()


def measured(network: str, name: str, args: argparse.Namespace) -> Row:
    """One reconstruction."""
    import jax

    import dfq_jax
    from dfq_jax.quantization.plan import parse_scheme
    from dfq_jax.recipes.dfq import dfq
    from dfq_jax.recipes.reconstructions import (
        LEARNED,
        enlarges,
        foretold,
        methods_of,
        reconstructed,
    )

    about = NETWORKS[network]
    source = args.shared / about.model if about.arch else about.model
    model = dfq_jax.load(source, arch=about.arch)
    images = dfq_jax.synthesize(model, "noise", args.n).images
    made = dfq(model, images, parse_scheme(args.scheme), bias="none")
    steps = args.steps if name in LEARNED else None
    methods, enlarge = methods_of(name, steps), enlarges(name, model.contract)
    seen = args.n * (enlarge.times if enlarge else 1)
    expected = foretold(made, seen, methods, None) / 2**20
    before, earlier = held("VmRSS"), held("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.monotonic()
    made, _ = reconstructed(made, images, methods, jax.random.key(0), enlarge=enlarge)
    jax.block_until_ready(made.quantized.qparams)
    peak = held("VmHWM")
    found: Row = {"table": "reconstruction_memory", "network": network, "scheme": args.scheme}
    found |= {"n": args.n, "seen": seen, "reconstruction": name, "steps": steps, "before": before}
    found |= {"foretold": expected, "taken": peak - before, "ratio": expected / (peak - before)}
    return found | {"peak": max(peak, earlier), "seconds": time.monotonic() - start}


def held(name: str) -> float:
    """`VmRSS` or `VmHWM` of this process, in MiB."""
    lines: Any = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    main()
