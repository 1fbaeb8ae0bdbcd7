"""Writes the numbers of build/bench/*.json into the marked tables of README and the pages of docs.

A table lies between `<!-- begin NAME -->` and `<!-- end NAME -->`; a table that no result file has
rows for stays as it is.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
from common import DASH, Column

WRITTEN = ("RESULTS.md", "NETWORKS.md", "SCALING.md")
PAGES = (*(common.ROOT / "docs" / name for name in WRITTEN), common.README)
GLANCE = {"preset": "fast", "layers": "qdrop_8bit_ends", "seed": 0}
"""Which rows of `ptq` the table of README shows, a column for each scheme."""
MARKED = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def main() -> None:
    """Rewrites the pages; an error if a table has a place in none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=common.BUILD, help="of the result files")
    parser.add_argument("--results", type=Path, nargs="+", default=PAGES, help="files to rewrite")
    args = parser.parse_args()
    found: dict[str, str] = {}
    for file in sorted(args.folder.glob("*.json")):
        found |= rendered(json.loads(file.read_text(encoding="utf-8")))
    homeless = found.keys() - set[str]().union(*(rewrite(page, found) for page in args.results))
    if homeless:
        raise SystemExit(f"no place is marked for {', '.join(sorted(homeless))}")


def rewrite(page: Path, found: Mapping[str, str]) -> set[str]:
    """Puts tables where a page has marked a place for them; returns the names of all its places."""
    before = page.read_text(encoding="utf-8")
    after = MARKED.sub(lambda m: m[1] + found.get(m[2], inside(m)) + m[3], before)
    page.write_text(after, encoding="utf-8")
    marked = {m[2] for m in MARKED.finditer(before)}
    common.log(f"{page.name}: {', '.join(sorted(marked & found.keys())) or 'nothing new'}")
    return marked


def inside(match: re.Match[str]) -> str:
    """What lies between two markers now."""
    return match[0][len(match[1]) : -len(match[3])]


def rendered(facts: Mapping[str, Any]) -> dict[str, str]:
    """{name of a table: Markdown} for the tables of a result file that have rows."""
    made = {}
    for name, columns in facts["tables"].items():
        rows = [row for row in facts["rows"] if row["table"] == name]
        if rows:
            made[name] = markdown([Column(*column) for column in columns], rows) + origin(facts)
    shown = [r for r in facts["rows"] if r["table"] == "ptq" and r.items() >= GLANCE.items()]
    return made | ({"glance": glance(shown)} if shown else {})


def glance(rows: list[dict[str, Any]]) -> str:
    """README's table: a row for each network."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        network = found.setdefault(row["network"], dict(row))
        network[row["scheme"]] = row["top1"]
    schemes = sorted({row["scheme"] for row in rows}, reverse=True)
    columns = [
        Column("network", "network"),
        Column("judged", "images judged", ",d"),
        Column("float_top1", "FP32", ".2fx100"),
        *(Column(scheme, scheme, ".2fx100") for scheme in schemes),
    ]
    return markdown(columns, list(found.values()))


def markdown(columns: list[Column], rows: list[dict[str, Any]]) -> str:
    """A table; columns without any value are left out."""
    columns = [c for c in columns if any(c.text(row) != DASH for row in rows)]
    lines = [[c.heading for c in columns], ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[c.text(row) for c in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def origin(facts: Mapping[str, Any]) -> str:
    """Command, date, commit, machine and versions in one paragraph."""
    machine = facts["machine"]
    features = ", ".join(machine["instructions"]) or "no known 8-bit instructions"
    hardware = f"{machine['cpu']}, {machine['cores']} cores ({features})"
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    versions = ", ".join(f"{n} {v}" for n, v in facts["versions"].items() if v != "absent")
    commit = f", commit {facts['commit']}" if facts.get("commit") else ""
    missing = f" Incomplete: {facts['reason']}." if facts["reason"] else ""
    missing += f" Note: {facts['note']}." if facts.get("note") else ""
    return (
        f"\n`{facts['command']}`, {facts['date']}{commit}; {hardware}{memory}, {machine['os']}; "
        f"{versions}.{missing}\n"
    )


if __name__ == "__main__":
    main()
