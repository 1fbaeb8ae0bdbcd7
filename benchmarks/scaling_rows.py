"""Rows of the cost model, which `scaling.py` prints: a step, this machine, chips and pods."""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

from common import Column, Row
from scaling_model import (
    BYTES,
    CHIPS,
    EXACT,
    Ceiling,
    Chip,
    Work,
    pod_seconds,
    readable,
    step_seconds,
)


class Case(NamedTuple):
    """A network with the images of a device it is measured at, and their size."""

    batch: int
    size: int


CASES = {
    "resnet20": Case(32, 32),
    "efficientnet_lite0": Case(4, 224),
    "mobilenet_v2": Case(4, 224),
    "resnet50": Case(2, 224),
}
PODS = (1, 8, 64, 256)
AMOUNTS = (256, 10_000, 1_000_000)

MODEL_TABLES = {
    "scaling_model": [
        Column("network", "network"),
        Column("size", "pixels"),
        Column("mmacs", "million MACs", ".0f"),
        Column("depthwise", "depthwise %", ".0fx100"),
        Column("gflop", "step GFLOP", ".2f"),
        Column("xla_gflop", "XLA's", ".2f"),
        Column("all_mb", "MB, all nodes", ".1f"),
        Column("xla_mb", "XLA's", ".1f"),
        Column("fused_mb", "MB, fused", ".1f"),
        Column("half_mb", "in bfloat16", ".1f"),
        Column("optimizer_mb", "Adam's part", ".2f"),
        Column("intensity", "FLOP/byte", ".0f"),
        Column("apart_kb", "all-reduced apart", ".0f"),
        Column("together_kb", "together kB", ".1f"),
        Column("program_kb", "in the program", ".1f"),
        Column("collectives", "in operations"),
    ],
    "scaling_chips": [
        Column("chip", "chip"),
        Column("bfloat16", "TFLOP/s bfloat16", ".0f"),
        Column("float32", "float32, default precision", ".0f"),
        Column("bandwidth", "GB/s", ".0f"),
        Column("balance", "FLOP/byte", ".0f"),
        Column("source", "source"),
    ],
    "scaling_rates": [
        Column("network", "network"),
        Column("dtype", "dtype"),
        *(Column(chip.name, chip.name, ".1f") for chip in CHIPS),
    ],
    "scaling_pod": [
        Column("network", "network"),
        Column("chip", "chip"),
        Column("chips", "chips"),
        Column("step_ms", "ms a step", ".2f"),
        *(Column(f"n{amount}", f"{amount:,} images") for amount in AMOUNTS),
    ],
    "scaling_cpu": [
        Column("network", "network"),
        Column("batch", "batch"),
        Column("peak", "GFLOP/s of a product", ".0f"),
        Column("bandwidth", "GB/s of memory", ".1f"),
        Column("arithmetic_ms", "arithmetic ms", ".1f"),
        Column("fused_ms", "traffic ms, fused", ".1f"),
        Column("all_ms", "all nodes", ".1f"),
        Column("measured_ms", "measured ms", ".1f"),
        Column("ratio", "measured/predicted", ".2f"),
    ],
    "scaling_fixed": [
        Column("network", "network"),
        Column("compile_s", "s to compile", ".1f"),
        Column("visit_ms", "ms a visit", ".2f"),
        Column("shard_ms", "ms an image written", ".2f"),
        Column("chunk_here", "steps a visit for 1 %"),
        Column("chunk_chip", "on the chip"),
    ],
}


def chip_row(chip: Chip) -> Row:
    """Published figures of a chip; its balance is the intensity where arithmetic takes over."""
    return {
        "table": "scaling_chips",
        "chip": chip.name,
        "bfloat16": chip.bfloat16 / 1e12,
        "float32": chip.float32 / 1e12,
        "bandwidth": chip.bandwidth / 1e9,
        "balance": chip.bfloat16 / chip.bandwidth,
        "source": chip.source,
    }


def cost_row(name: str, work: Work, found: dict[str, Any], args: argparse.Namespace) -> Row:
    """Operations and bytes of one image and step: by count, and by XLA where it counts them."""
    batch, wide, half = found["batch"], BYTES["float32"], BYTES["bfloat16"]
    moved = work.step_bytes(half, args.chip_batch)
    return {
        "size": CASES[name].size,
        "mmacs": work.macs / 1e6,
        "depthwise": work.depthwise / work.macs,
        "gflop": work.step_flops / 1e9,
        "xla_gflop": found["xla_flops"] / 1e9,
        "all_mb": work.step_bytes(wide, batch, fused=False) / 1e6,
        "xla_mb": found["xla_bytes"] / 1e6,
        "fused_mb": work.step_bytes(wide, batch) / 1e6,
        "half_mb": moved / 1e6,
        "optimizer_mb": work.optimizer_bytes / 1e6,
        "intensity": work.step_flops / moved,
        "apart_kb": 0,
        "together_kb": work.reduced_bytes / 1e3,
        "program_kb": found["collective_bytes"] / 1e3,
        "collectives": found["collectives"],
    }


def cpu_row(work: Work, found: dict[str, Any], here: Chip) -> Row:
    """What the same formulas say of this machine, and what its clock says."""
    batch = found["batch"]
    traffic = [
        batch * work.step_bytes(BYTES["float32"], batch, fused=fused) / here.bandwidth
        for fused in (True, False)
    ]
    predicted = step_seconds(work, here, "float32", batch, EXACT, fused=False)
    return {
        "batch": batch,
        "peak": here.float32 / 1e9,
        "bandwidth": here.bandwidth / 1e9,
        "arithmetic_ms": 1000 * batch * work.step_flops / here.float32,
        "fused_ms": 1000 * traffic[0],
        "all_ms": 1000 * traffic[1],
        "measured_ms": 1000 * found["step_s"],
        "ratio": found["step_s"] / predicted,
    }


def ceiling_of(args: argparse.Namespace) -> Ceiling:
    """The assumed shares of published peaks."""
    return Ceiling(args.flops_ceiling, args.bytes_ceiling)


def chip_named(name: str) -> Chip:
    """One of the chips."""
    return next(chip for chip in CHIPS if chip.name == name)


def rate_rows(name: str, work: Work, args: argparse.Namespace) -> Iterator[Row]:
    """Finished images a second of every chip, in both precisions."""
    for dtype in BYTES:
        row: Row = {"table": "scaling_rates", "network": name, "dtype": dtype}
        for chip in CHIPS:
            step = step_seconds(work, chip, dtype, args.chip_batch, ceiling_of(args))
            row[chip.name] = args.chip_batch / (args.recipe_steps * step)
        yield row


def pod_rows(name: str, work: Work, args: argparse.Namespace) -> Iterator[Row]:
    """Time to make some images on some chips, apart, start and compilation not counted."""
    chip, batch = chip_named(args.chip), args.chip_batch
    step = step_seconds(work, chip, "bfloat16", batch, ceiling_of(args))
    for chips in PODS:
        row: Row = {"table": "scaling_pod", "network": name, "chip": chip.name, "chips": chips}
        row["step_ms"] = 1000 * step
        for amount in AMOUNTS:
            spent = pod_seconds(amount, chips, batch, args.recipe_steps, step)
            row[f"n{amount}"] = readable(spent)
        yield row


def fixed_row(
    work: Work, found: dict[str, Any], own: dict[str, Any], args: argparse.Namespace
) -> Row:
    """What does not shrink with more devices."""
    chip = chip_named(args.chip)
    step = step_seconds(work, chip, "bfloat16", args.chip_batch, ceiling_of(args))
    chunk = lambda step_s: max(1, round(own["visit_s"] / (0.01 * step_s)))
    return {
        "compile_s": found["compile_s"],
        "visit_ms": 1000 * own["visit_s"],
        "shard_ms": 1000 * found["shard_s"] / found["batch"],
        "chunk_here": chunk(found["step_s"]),
        "chunk_chip": chunk(step),
    }
