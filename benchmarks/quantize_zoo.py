"""Quantizes networks of torchvision from their `.pt2` files and verifies them in ONNX Runtime.

Weights are random, so there is no accuracy to measure: what counts is that every structure comes
through, which share of its work runs in integers, and that what runs is what was simulated, also
when it is read back from its folder.
Shifts of batch norms keep most units active, or deep random networks would be chaotic. Images are
small, to judge many networks in little time.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import zoo_networks
from common import Column, Row

NETWORKS = """
resnet18 resnet50 resnext50_32x4d wide_resnet50_2 regnet_x_400mf regnet_y_400mf mobilenet_v2
mobilenet_v3_small mobilenet_v3_large mnasnet1_0 efficientnet_b0 densenet121 googlenet inception_v3
shufflenet_v2_x1_0 squeezenet1_1 vgg11_bn alexnet convnext_tiny vit_b_32 swin_t
deeplabv3_mobilenet_v3_large
"""
SIZES = {"inception_v3": 139, "vit_b_32": 224}
SIZE = 96
LIMITS = ("n", "steps", "reconstruction_steps")
"""What may be cut short of a preset: images, steps to make them, steps of learned rounding."""
TABLES = {
    "quantize_zoo": (
        Column("network", "network"),
        Column("preset", "preset"),
        Column("size", "pixels"),
        Column("coverage", "% of MACs in integers", ".1fx100"),
        Column("layers", "tensors"),
        Column("steps", "most steps apart"),
        Column("runtime_agreement", "same top-1 in ORT %", ".1fx100"),
        Column("undecided", "ties %", ".1fx100"),
        Column("equal", "equal codes %", ".3fx100"),
        Column("beyond", "furthest from a tie, steps", ".1g"),
        Column("noise", "outputs apart, times rounding noise", ".2f"),
        Column("saturated", "with saturation", ".2f"),
        Column("passed", "verified"),
        Column("sqnr", "output SQNR dB", ".1f"),
        Column("seconds", "s", ".0f"),
        Column("note", "note"),
    )
}


def main() -> None:
    """Quantizes the chosen networks."""
    parser = common.parser(__doc__)
    parser.add_argument("--networks", default=",".join(NETWORKS.split()), help="names")
    parser.add_argument("--scheme", default="w8a8")
    presets = common.choices(("fast", "balanced", "best"))
    parser.add_argument("--presets", type=presets, default=("fast",), help="names")
    for name in LIMITS:
        help_text = "of presets that make images; few are enough for a verdict"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=help_text)
    args = parser.parse_args()
    rows, failed = [], []
    for name in common.names(args.networks):
        for preset in args.presets:
            rows.append(attempt(name, preset, args))
            common.logged(rows[-1], TABLES["quantize_zoo"])
            if rows[-1].get("note"):
                failed.append(f"{name} ({preset})")
    common.finish(args, TABLES, rows, f"see the notes of {', '.join(failed)}" if failed else None)


def attempt(name: str, preset: str, args: argparse.Namespace) -> Row:
    """The row of a network and a preset; of one that failed, with the reason."""
    import jax

    size = SIZES.get(name, SIZE)
    made: Row = {"table": "quantize_zoo", "network": name, "preset": preset, "size": size}
    limits = {key: getattr(args, key) for key in LIMITS} if preset != "fast" else {}
    try:
        return {**made, **row(name, size, scheme=args.scheme, preset=preset, **limits)}
    except Exception as error:  # a row tells what failed, the others go on
        return {**made, "note": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    finally:
        jax.clear_caches()
        gc.collect()


def reread(folder: Path) -> list[str]:
    """What in the saved file is not as the exporter writes it for the network read back."""
    from dfq_jax.io.artifacts.artifact import load_artifact
    from dfq_jax.io.runtime.session import read_onnx
    from dfq_jax.io.verification.file import differences

    artifact = load_artifact(folder)
    return list(differences(read_onnx(artifact.onnx_path), artifact.quantized))


def row(name: str, size: int, **settings: Any) -> Row:
    """What one network came to; `settings` are those of `dfq_jax.quantize`."""
    import torch

    import dfq_jax

    module = zoo_networks.network(name, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.pt2"
        path.write_bytes(zoo_networks.pt2(module, torch.zeros(1, 3, size, size)))
        start = time.perf_counter()
        result: Any = dfq_jax.quantize(dfq_jax.load(path), **settings)
        checked = result.verify()
        result.save(Path(folder) / "out", verification=checked)
        again = reread(Path(folder) / "out")
    return {
        "coverage": result.report.coverage,
        "layers": len(checked.layers),
        "steps": checked.most_steps,
        "runtime_agreement": checked.agreement,
        "undecided": checked.undecided,
        "equal": min(c.equal for c in checked.layers),
        "beyond": max(c.beyond for c in checked.layers),
        "noise": checked.noise,
        "saturated": max(o.differences["onnxruntime on"] for o in checked.outputs),
        "passed": "; ".join((*checked.failures, *again)) or "true",
        "sqnr": result.report.sqnr,
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    main()
