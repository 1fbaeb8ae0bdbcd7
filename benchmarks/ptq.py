"""Data-free quantization, judged on labelled images in ONNX Runtime.

Every row is a fresh `dfq quantize`, then `dfq evaluate` of what it wrote. Seconds and memory are
those of the whole `dfq quantize` process, verification included.
"""

import artifacts
import common
from artifacts import NETWORKS, Run
from common import Column, Row

TABLES = {
    "ptq": (
        Column("network", "network"),
        Column("scheme", "scheme"),
        Column("layers", "layers preset"),
        Column("preset", "preset"),
        Column("seed", "seed"),
        Column("float_top1", "FP32 top-1 %", ".2fx100"),
        Column("top1", "top-1 %", ".2fx100"),
        Column("agreement", "agreement %", ".1fx100"),
        Column("sqnr", "SQNR dB", ".1f"),
        Column("seconds", "s", ".0f"),
        Column("peak_mib", "peak MiB", ".0f"),
        Column("note", "note"),
    )
}


def main() -> None:
    """Quantizes and judges the chosen networks."""
    parser = common.parser(__doc__)
    artifacts.add_arguments(parser, presets="fast,balanced", seeds="0,1,2")
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    args = parser.parse_args()
    limit = () if args.limit is None else ("--limit", args.limit)
    runs, reason = artifacts.available(args, artifacts.chosen(args))
    rows: list[Row] = []
    float_top1: dict[str, float | None] = {}
    for run in runs:
        made = run.quantize(args.shared)
        found: Row = {"table": "ptq", **run._asdict(), "note": made.failure}
        rows.append(found)
        if made.failure:
            common.log(made.failure)
            continue
        judge = ("--data", args.shared / NETWORKS[run.network].data, *limit)
        if run.network not in float_top1:
            float_top1[run.network] = accuracy(run, judge, "float.onnx").get("top1")
        found |= measured(made, run, judge) | {"float_top1": float_top1[run.network]}
        common.logged(found, TABLES["ptq"][5:])
    common.finish(args, TABLES, rows, reason)


def measured(made: artifacts.Ran, run: Run, judge: tuple[object, ...]) -> Row:
    """What a finished `dfq quantize` says, and how its network does on real images."""
    report = made.data["report"]
    found = accuracy(run, judge)
    return {
        "top1": found.get("top1"),
        "judged": found.get("n"),
        "agreement": report["agreement"],
        "sqnr": report["output_sqnr_db"],
        "bytes_float": made.data["bytes_float"],
        "bytes_int": made.data["bytes_int"],
        "seconds": round(made.seconds, 1),
        "peak_mib": round(made.peak_mib),
        "note": "collapsed" if made.code == artifacts.COLLAPSED else None,
    }


def accuracy(run: Run, judge: tuple[object, ...], file: str = "") -> Row:
    """What `dfq evaluate` says of a folder, or of one file in it; nothing if that fails."""
    found = artifacts.dfq("evaluate", run.folder / file, *judge)
    if found.failure:
        common.log(found.failure)
        return {}
    return found.data


if __name__ == "__main__":
    main()
