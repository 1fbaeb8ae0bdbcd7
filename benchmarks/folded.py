"""Networks whose exporter folded batch norms away, as most ONNX files are, judged like `ptq`.

Every network is written as a float ONNX file without a trace of its statistics and quantized from
that by `dfq quantize --no-bn-fallback`, with biases corrected by what layers read of noise, and
without. Top-1 is that of the integer file in ONNX Runtime on labelled images.
"""

from pathlib import Path

import artifacts
import common
from artifacts import NETWORKS
from common import Column, Row

TABLES = {
    "folded": (
        Column("network", "network"),
        Column("scheme", "scheme"),
        Column("bias", "biases"),
        Column("float_top1", "FP32 top-1 %", ".2fx100"),
        Column("top1", "top-1 %", ".2fx100"),
        Column("loss", "expected loss", ".1fx100"),
        Column("sqnr", "SQNR dB", ".1f"),
        Column("seconds", "s", ".0f"),
        Column("note", "note"),
    )
}


def main() -> None:
    """Folds, quantizes and judges the chosen networks."""
    parser = common.parser(__doc__)
    of = common.choices
    parser.add_argument("--networks", type=of(NETWORKS), default=tuple(NETWORKS), metavar="A,B")
    parser.add_argument("--schemes", type=common.names, default=("w8a8", "w4a8"), metavar="A,B")
    parser.add_argument(
        "--bias", type=of(("analytic", "none")), default=("analytic", "none"), metavar="A,B"
    )
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    args = parser.parse_args()
    limit = () if args.limit is None else ("--limit", args.limit)
    there, reason = artifacts.present(args.shared, args.networks)
    rows: list[Row] = []
    for network in there:
        judge = ("--data", args.shared / NETWORKS[network].data, *limit)
        file = folded(network, args.shared)
        float_top1 = top1(file, judge)
        for scheme in args.schemes:
            for bias in args.bias:
                row: Row = {"table": "folded", "network": network, "scheme": scheme, "bias": bias}
                row |= {"float_top1": float_top1, **quantized(file, scheme, bias, judge)}
                rows.append(row)
                common.logged(row, TABLES["folded"])
    common.finish(args, TABLES, rows, reason)


def folded(network: str, shared: Path) -> Path:
    """The network as a float ONNX file without statistics."""
    import dfq_jax
    from dfq_jax.edits import fold_batch_norm

    known = NETWORKS[network]
    name = known.model if known.arch is None else str(shared / known.model)
    model = dfq_jax.load(name, arch=known.arch)
    file = artifacts.FOLDER / f"{network}-folded.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    dfq_jax.export(fold_batch_norm(model), file)
    return file


def quantized(file: Path, scheme: str, bias: str, judge: tuple[object, ...]) -> Row:
    """What `dfq quantize` says of the file, and how its network does on real images."""
    folder = artifacts.FOLDER / f"{file.stem}-{scheme}-{bias}"
    options = ("-o", folder, "--scheme", scheme, "--bias-correction", bias, "--no-bn-fallback")
    made = artifacts.dfq("quantize", file, *options)
    if made.failure:
        return {"note": made.failure}
    report = made.data["report"]
    return {
        "top1": top1(folder, judge),
        "loss": report.get("expected_loss"),
        "sqnr": report["output_sqnr_db"],
        "seconds": round(made.seconds, 1),
        "note": "called collapsed" if made.code == artifacts.COLLAPSED else None,
    }


def top1(model: Path, judge: tuple[object, ...]) -> float | None:
    """What `dfq evaluate` says of a file or folder; None if that fails."""
    found = artifacts.dfq("evaluate", model, *judge)
    if found.failure:
        common.log(found.failure)
        return None
    return found.data["top1"]


if __name__ == "__main__":
    main()
