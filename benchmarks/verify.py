"""Simulator, integer arithmetic in JAX and ONNX Runtime, compared layer by layer.

`dfq verify` does so on the synthetic probes kept with each result; the same is done on real
images. Steps are the largest differences of any code in any layer, with ONNX Runtime's
optimisations off. Results younger than the code are reused, others made.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import artifacts
import common
from artifacts import NETWORKS, Run
from common import Column, Row

TABLES = {
    "verify": (
        Column("network", "network"),
        Column("scheme", "scheme"),
        Column("preset", "preset"),
        Column("images", "images"),
        Column("simulator_steps", "simulator: steps"),
        Column("simulator_equal", "equal codes %", ".4fx100"),
        Column("integer_steps", "integers: steps"),
        Column("integer_equal", "equal codes %", ".4fx100"),
        Column("off", "same top-1 off %", ".1fx100"),
        Column("on", "same top-1 on %", ".1fx100"),
        Column("difference", "logits apart, on", ".2g"),
        Column("noise", "apart, times rounding noise", ".2f"),
        Column("saturated", "with saturation", ".2f"),
        Column("note", "note"),
    )
}


def main() -> None:
    """Verifies the chosen results."""
    parser = common.parser(__doc__)
    artifacts.add_arguments(parser, presets="fast", seeds="0")
    parser.add_argument("--images", type=int, default=64, help="real images; 0 for none")
    args = parser.parse_args()
    runs, reason = artifacts.available(args, artifacts.chosen(args))
    rows = [row for run in runs for row in verified(run, args)]
    common.finish(args, TABLES, rows, reason)


def verified(run: Run, args: argparse.Namespace) -> Iterable[Row]:
    """One row for the probes, one for real images."""
    first: Row = {"table": "verify", **run._asdict()}
    if failure := run.ensure(args.shared):
        yield {**first, "note": failure}
        return
    common.log(f"dfq verify {' '.join(map(str, run))}")
    probes = artifacts.dfq("verify", run.folder)
    if probes.failure:
        yield {**first, "note": probes.failure}
        return
    yield {**first, **summary(probes.data, "synthetic")}
    if args.images:
        found = on_real_images(run.folder, args.shared / NETWORKS[run.network].data, args.images)
        yield {**first, **summary(found, "real")}


def on_real_images(folder: Path, data: Path, count: int) -> dict[str, Any]:
    """What `io/verification/verify.py` finds on real images, evenly spaced over the classes."""
    import numpy as np

    from dfq_jax.data.accuracy import load_example, pick
    from dfq_jax.data.sources import open_source
    from dfq_jax.io.artifacts.artifact import load_artifact
    from dfq_jax.io.verification.verify import verify

    artifact, source = load_artifact(folder), open_source(str(data))
    contract = artifact.quantized.model.contract
    images = np.stack([load_example(source, i, contract)[0] for i in pick(len(source), count)])
    return verify(artifact.quantized, artifact.onnx_path, images).to_dict()


def summary(found: dict[str, Any], kind: str) -> Row:
    """The whole network's numbers: worst layer, share of all codes."""
    layers, ends = found["layers"], {end["runner"]: end for end in found["ends"]}
    total = sum(layer["count"] for layer in layers)
    row: Row = {"images": f"{found['images']} {kind}"}
    for way in ("simulator", "integer"):
        if layers[0][f"{way}_steps"] is None:
            continue  # sums too long for the integer function
        row[f"{way}_steps"] = max(layer[f"{way}_steps"] for layer in layers)
        equal = sum(layer[f"{way}_equal"] * layer["count"] for layer in layers)
        row[f"{way}_equal"] = equal / total
    apart = lambda way: max(output["differences"][way] for output in found["outputs"])
    off, on = ends["onnxruntime off"], ends["onnxruntime on"]
    return {
        **row,
        "off": off["agreement"],
        "on": on["agreement"],
        "difference": on["difference"],
        "noise": apart(found["ends"][-1]["runner"]),
        "saturated": apart("onnxruntime on"),
        "note": "; ".join(found["failures"]) or None,
    }


if __name__ == "__main__":
    main()
