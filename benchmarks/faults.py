"""A campaign of faults: nothing that was there is lost, nothing is mixed, nobody sees a traceback.

    kills           processes killed before an operation on a file, in every stage of the verbs
                    that write; what is there then is whole, old or new, and the same command
                    makes what an undisturbed one makes, and leaves nothing lying about
    full disk       files that cannot grow beyond some bytes
    two writers     pairs of processes that save at one place at once
    pictures        bombs, lying archives, foreign formats, devices, in a process each
    mutated inputs  changed output folders, image sets, options and contracts

Tests run a short form of a minute; `--long` is the whole of it, two hours of one core.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import fault_children as children
import fault_disks as disks
import fault_inputs as inputs
import fault_pictures as pictures
import numpy as np
from common import Column, Row
from fault_children import OK, REFUSED, Limits
from fault_disks import Case, Place

LONG = {"kills": 1000, "disks": 120, "pairs": 60, "pictures": 200, "inputs": 100_000}
SHORT = {"kills": 100, "disks": 25, "pairs": 6, "pictures": 50, "inputs": 2000}
PICTURE = Limits(seconds=20.0)
BATCH = 2500
MOST_MIB = 1024.0
TABLES = {
    "faults": (
        Column("kind", "kind"),
        Column("what", "what"),
        Column("count", "cases", ","),
        Column("killed", "killed", ","),
        Column("refused", "refused", ","),
        Column("wrong", "lost, mixed, traceback or hung", ","),
        Column("slowest", "slowest s", ".1f"),
        Column("peak", "peak MiB", ".0f"),
        Column("note", "note"),
    )
}


def main() -> None:
    """Runs the campaign."""
    parser = common.parser(__doc__)
    parser.add_argument("--long", action="store_true", help="the counts of NETWORKS.md")
    for name, count in SHORT.items():
        text = f"how many (default: {count}, --long: {LONG[name]})"
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    usual = LONG if args.long else SHORT
    counts = {n: usual[n] if getattr(args, n) is None else getattr(args, n) for n in usual}
    sys.path[:0] = [str(common.ROOT / "tests"), str(common.ROOT / "tests" / "io")]
    with tempfile.TemporaryDirectory() as parent:
        rows = []
        for row in campaign(Path(parent).resolve(), counts, args.seed):
            common.logged(row, TABLES["faults"])
            rows.append(row)
    bad = [f"{row['kind']}, {row['what']}" for row in rows if row["wrong"]]
    common.finish(args, TABLES, rows, f"wrong: {'; '.join(bad)}" if bad else None)
    if bad:
        raise SystemExit(1)


def campaign(root: Path, counts: dict[str, int], seed: int) -> Iterator[Row]:
    """All rows."""
    load_the_rest()
    seeds = prepared(root)
    random = np.random.default_rng(seed)
    places = verbs(root)
    for kind, cases, total in (
        ("kills", disks.kills, counts["kills"]),
        ("full disk", disks.full_disks, counts["disks"]),
    ):
        for name, place, share in places:
            if count := round(total * share):
                yield told(kind, name, cases(place, name, count, random))
    yield told("two writers", "save", disks.two_writers(root, counts["pairs"], random))
    yield told("pictures", "all kinds", shown(root, counts["pictures"], seed))
    for kind in inputs.KINDS:
        yield tried(root, kind, counts["inputs"] // len(inputs.KINDS), seed, seeds)


def load_the_rest() -> None:
    """Imports what children need, so that each of them finds it there; JAX starts in none yet."""
    from dfq_jax.base.machine import keep_programs

    for name in ("cli.verbs", "cli.synthesize", "api.given", "io.verification.verify"):
        importlib.import_module(f"dfq_jax.{name}")
    keep_programs()


def prepared(root: Path) -> inputs.Seeds:
    """A small network, images of it, and what `dfq quantize` makes of both."""
    (root / "seeds").mkdir()
    net, out, images = root / "seeds" / "net.onnx", root / "seeds" / "out", root / "seeds" / "i.npz"

    def make() -> None:
        nets: Any = importlib.import_module("nets")
        from dfq_jax.io.onnx.export import float_onnx, serialize

        net.write_bytes(serialize(float_onnx(nets.tiny())))

    def run(*line: object) -> None:
        from dfq_jax.cli.app import main as dfq

        dfq([str(part) for part in line])

    steps = (
        make,
        partial(run, "synthesize", net, "-o", images, *disks.SYNTHESIZE),
        partial(run, "quantize", net, "-o", out, "--images", images, *disks.QUANTIZE),
    )
    for step in steps:
        ended = children.in_child(step)
        if ended.kind != OK:
            raise SystemExit(f"could not prepare: {ended.kind}: {ended.text}")
    options = (out / "config.toml").read_bytes()
    return inputs.Seeds(out, images.read_bytes(), options, net.read_bytes())


def verbs(root: Path) -> list[tuple[str, Place, float]]:
    """(name, verb, share of the cases) of all that writes."""
    seeds = root / "seeds"
    synthesize = lambda out: ["synthesize", str(seeds / "net.onnx"), "-o", str(out)]
    quantize = lambda out: ["quantize", str(seeds / "net.onnx"), "-o", str(out)]
    images = ["--images", str(seeds / "i.npz")]
    file = lambda out: [*synthesize(out), *disks.SYNTHESIZE]
    whole = lambda out: [*quantize(out), *images, *disks.QUANTIZE]
    return [
        ("save over another", disks.saving(root), 0.8),
        ("synthesize to a file", disks.verb(root, "file", file, "images.npz"), 0.08),
        ("synthesize to a folder", disks.verb(root, "shards", file, "images"), 0.08),
        ("quantize", disks.verb(root, "quantize", whole, "out"), 0.04),
    ]


def shown(root: Path, count: int, seed: int) -> Iterator[Case]:
    """Hostile pictures, each read in a process of its own."""
    for number in range(count):
        kind, path = pictures.made(root / f"pictures-{number}", number, seed)
        ended = children.in_child(pictures.reading(path), PICTURE)
        wrong = "" if ended.kind in (OK, REFUSED) else f"{ended.kind}: {ended.text}"
        if not wrong and ended.mib > MOST_MIB:
            wrong = f"took {ended.mib:.0f} MiB"
        yield Case(f"{kind} {number}", ended, wrong)


def told(kind: str, what: str, cases: Iterator[Case]) -> Row:
    """The row of these cases; what is wrong is logged."""
    done = []
    for case in cases:
        done.append(case)
        if case.wrong:
            common.log(f"  {kind}: {case.name}: {case.wrong}")
    wrong = [case for case in done if case.wrong]
    return {
        "table": "faults",
        "kind": kind,
        "what": what,
        "count": len(done),
        "killed": sum(case.ended.kind == children.KILLED for case in done),
        "refused": sum(case.ended.kind == REFUSED for case in done),
        "wrong": len(wrong),
        "slowest": max((case.ended.seconds for case in done), default=0.0),
        "peak": max((case.ended.mib for case in done), default=0.0),
        "note": wrong[0].name if wrong else None,
    }


def tried(root: Path, kind: str, count: int, seed: int, seeds: inputs.Seeds) -> Row:
    """The row of one kind of mutated inputs, read by processes that each take a batch."""
    report, total, peak = root / "told.json", dict[str, Any](), 0.0
    failures: list[str] = []
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))

        def run(numbers: range = numbers) -> None:
            import jax.numpy as jnp

            jnp.zeros(1).block_until_ready()
            inputs.bounded()
            found = inputs.tried(kind, numbers, seed, seeds, root / "broken")
            report.write_text(json.dumps(found))

        report.unlink(missing_ok=True)
        ended = children.in_child(run, Limits(seconds=30 + 0.5 * len(numbers)))
        peak = max(peak, ended.mib)
        if not report.exists():
            failures.append(f"{kind} {numbers.start}..{numbers.stop}: {ended.kind}: {ended.text}")
            continue
        found = json.loads(report.read_text())
        failures += found.pop("failures")
        total = {k: v + total.get(k, 0) for k, v in found.items() if k != "slowest"} | {
            "slowest": max(found["slowest"], total.get("slowest", 0.0)),
            **{k: v for k, v in total.items() if k not in found},
        }
    for failure in failures:
        common.log(f"  mutated inputs: {failure}")
    return {
        "table": "faults",
        "kind": "mutated inputs",
        "what": kind,
        "count": count,
        "refused": total.get("refused", 0),
        "wrong": total.get("failed", 0) + sum(".." in f.split(":")[0] for f in failures),
        "slowest": total.get("slowest", 0.0),
        "peak": peak,
        "note": failures[0] if failures else None,
    }


if __name__ == "__main__":
    main()
