"""Files of few bits in ONNX Runtime, batch 1, 1 thread: bytes and time against W8A8 and float.

Kernels below 8 bits lie in the file packed, as int8, or as ONNX's 4-bit integers (`dfq quantize
--store`). The networks are quantized from their statistics alone, which changes neither bytes nor
time; that all forms compute the same is a test. All files take turns in one process. A ratio above
1 means that the file is faster than W8A8.
"""

import argparse
import dataclasses
from functools import partial
from typing import Any

import common
from artifacts import NETWORKS, present
from common import Column, Row

THREADS = 1
SCHEMES = ("w4a8", "w4a4", "w3a3", "w2a2")
TABLES = {
    "few_bits": (
        Column("network", "network"),
        Column("model", "model"),
        Column("store", "store"),
        Column("mb", "MB", ".2f"),
        Column("zipped", "MB zipped", ".2f"),
        Column("load_ms", "ms to load", ".0f"),
        Column("ms", "ms an image", ".2f"),
        Column("ratio", "w8a8/this", ".2f"),
    )
}


def main() -> None:
    """Times every form of every scheme of the chosen networks."""
    parser = common.parser(__doc__)
    parser.add_argument("--networks", type=common.choices(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--schemes", type=common.names, default=SCHEMES, metavar="A,B")
    parser.add_argument("--weights", help="checkpoint of the one network, instead of its own")
    parser.add_argument("--rounds", type=int, default=30, help="turns of every file")
    args = parser.parse_args()
    if args.weights:
        networks, reason = args.networks, None
    else:
        networks, reason = present(args.shared, args.networks)
    rows = [row for network in networks for row in timed(network, args)]
    common.finish(args, TABLES, rows, reason)


def timed(network: str, args: argparse.Namespace) -> list[Row]:
    """The rows of one network."""
    import zlib

    files = files_of(model_of(network, args), args.schemes)
    opened_files = {" ".join(name): opened(file) for name, file in files.items()}
    runs = {name: run for name, (run, _) in opened_files.items()}
    times = common.interleaved(runs, args.rounds, block=3, warmup=2)
    return [
        {
            "table": "few_bits",
            "network": network,
            "model": scheme,
            "store": store,
            "mb": len(file) / 1e6,
            "zipped": len(zlib.compress(file)) / 1e6,
            "load_ms": opened_files[f"{scheme} {store}"][1],
            "ms": times[f"{scheme} {store}"],
            "ratio": times["w8a8 "] / times[f"{scheme} {store}"],
        }
        for (scheme, store), file in files.items()
    ]


def model_of(network: str, args: argparse.Namespace) -> Any:
    """The float network."""
    import dfq_jax

    known = NETWORKS[network]
    if args.weights:
        return dfq_jax.load(args.weights, arch=known.arch or network)
    if known.arch is None:
        return dfq_jax.load(known.model)
    return dfq_jax.load(args.shared / known.model, arch=known.arch)


def files_of(model: Any, schemes: tuple[str, ...]) -> dict[tuple[str, str], bytes]:
    """{(scheme, form): file}; the float network and 8 bits have one form."""
    from dfq_jax.io.onnx.export import float_onnx, quantized_onnx, serialize
    from dfq_jax.quantization.plan import STORES, parse_scheme, stored_as
    from dfq_jax.recipes.dfq import dfq

    files = {("float32", ""): serialize(float_onnx(model))}
    for scheme in ("w8a8", *schemes):
        made = dfq(model, None, parse_scheme(scheme)).quantized
        for store in ("",) if scheme == "w8a8" else STORES:
            plan = stored_as(made.plan, store or STORES[0])
            file = serialize(quantized_onnx(dataclasses.replace(made, plan=plan)))
            files[scheme, store] = file
    return files


def opened(file: bytes) -> tuple[Any, float]:
    """A function that runs the file on noise, and the milliseconds that opening it took."""
    import time

    from dfq_jax.io.runtime.latency import random_feed
    from dfq_jax.io.runtime.session import open_session

    start = time.perf_counter()
    session = open_session(file, optimize=True, threads=THREADS)
    took = 1000 * (time.perf_counter() - start)
    return partial(session.run, None, random_feed(session, 1, None)), took


if __name__ == "__main__":
    main()
