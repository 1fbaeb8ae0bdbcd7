"""A diagnosis as people read it: which layers cost most, what would help, and what to type."""

import math
import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

from dfq_jax.allocation.candidates import Judged
from dfq_jax.allocation.diagnosis import Diagnosis, LayerCost, Outcome, worst_first
from dfq_jax.base.finite import finite_or_none
from dfq_jax.report.console import one_line
from dfq_jax.report.decibels import decibel_cell

WIDTH = 80
INDENT = "  "
USABLE = 10.0
"""SQNR in dB from which on, with `AGREEING`, a network is called near the float one."""
AGREEING = 0.9
FEW_RULES = 5
"""More rules than this are spelled out on a terminal for the recommended remedy only."""
ALIKE = 1.03
"""Files whose sizes differ by less are alike: the simpler command is recommended."""
COST_HEADER = ("layer", "bits w/a", "alone dB", "so far dB", "of error")
REMEDY_HEADER = ("remedy", "SQNR dB", "agreement", "file", "s")


def cost_rows(costs: Sequence[LayerCost], top: int) -> list[list[str]]:
    """The rows of the worst layers under `COST_HEADER`."""
    total = sum(cost.noise for cost in costs)
    share = lambda x: f"{100 * x.noise / total:.1f} %" if 0 < total < math.inf else "-"
    return [
        [
            one_line(x.name),
            f"{x.weight_bits or '-'}/{x.input_bits or '-'}",
            decibel_cell(x.alone_db),
            "-" if x.so_far_db is None else decibel_cell(x.so_far_db),
            share(x),
        ]
        for x in worst_first(costs)[:top]
    ]


def remedy_rows(found: Diagnosis, stored: int) -> list[list[str]]:
    """The rows of the network as it is and after each remedy, under `REMEDY_HEADER`.

    Args:
      found: the diagnosis.
      stored: bytes of the file as it is.
    """
    row = lambda name, judged, size, seconds: [
        name,
        decibel_cell(judged.sqnr_db),
        f"{100 * judged.agreement:.1f} %",
        f"{size / 1e6:.2f} MB",
        seconds,
    ]
    after = [
        row(x.remedy.name, x.judged, stored + x.bytes, f"{x.seconds:.1f}") for x in found.outcomes
    ]
    return [row("as it is", found.now, stored, ""), *after]


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of at most `WIDTH`: a name too long for its column has a line of its own."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(1, len(header))]
    numbers = lambda row: "".join(
        f"  {cell.rjust(width)}" for cell, width in zip(row[1:], widths, strict=True)
    )
    room = WIDTH - len(numbers(header))
    first = min(room, max(len(row[0]) for row in (header, *rows)))
    lines = []
    for row in (header, *rows):
        if len(row[0]) > first:
            lines.append(row[0])
        name = "" if len(row[0]) > first else row[0]
        lines.append(f"{name.ljust(first)}{numbers(row)}".rstrip())
    return lines


def recommended(found: Diagnosis, stored: int) -> Outcome | None:
    """The simplest remedy of those with about the smallest file that are enough.

    Args:
      found: the diagnosis.
      stored: bytes of the file as it is.

    Returns:
      None if nothing helps; the best where nothing is enough.
    """
    better = [x for x in found.outcomes if x.judged.sqnr_db > found.now.sqnr_db]
    enough = [x for x in better if is_near(x.judged)]
    if enough:
        most = ALIKE * min(stored + x.bytes for x in enough)
        alike = [x for x in enough if stored + x.bytes <= most]
        return min(alike, key=lambda x: (len(options_of(x)), x.bytes))
    return max(better, key=lambda x: x.judged.sqnr_db, default=None)


def is_near(judged: Judged) -> bool:
    """Whether a network is near enough to the float one to be used."""
    return judged.agreement >= AGREEING and judged.sqnr_db >= USABLE


def advice(now: Judged, best: Outcome | None) -> str:
    """What to say of the network as it is, and of the recommended remedy."""
    if best is None:
        return "nothing that was tried helps"
    if is_near(now):
        return f"it is near the float network as it is; nearer with little: {best.remedy.name}"
    if not is_near(best.judged):
        return f"none of these makes it usable; the best is: {best.remedy.name}"
    return f"near the float network with the smallest file: {best.remedy.name}"


def options_of(outcome: Outcome, rules: Sequence[str] = ()) -> list[str]:
    """What to add to the command for a remedy, rules that are given already included."""
    added = outcome.remedy.rules
    kept = [*rules, *added] if added else []
    return [*outcome.remedy.options, *(word for rule in kept for word in ("--rule", rule))]


def command_lines(words: Sequence[str]) -> list[str]:
    """A command for a shell, broken between its options into lines of at most `WIDTH`."""
    pieces: list[str] = []
    for word in map(shlex.quote, words):
        joins = pieces and pieces[-1].startswith("-") and " " not in pieces[-1]
        if joins and not word.startswith("-"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    lines = [INDENT + pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) + 3 > WIDTH:
            lines[-1] += " \\"
            lines.append(2 * INDENT + piece)
        else:
            lines[-1] += f" {piece}"
    return lines


def in_lines(text: str, hanging: str = "") -> list[str]:
    """A sentence in lines of at most `WIDTH`, `hanging` before the first, twice before others."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=hanging,
        subsequent_indent=2 * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def to_dict(
    found: Diagnosis, stored: int, command: Sequence[str], rules: Sequence[str] = ()
) -> dict[str, Any]:
    """A diagnosis as JSON data.

    Args:
      found: the diagnosis.
      stored: bytes of the file as it is.
      command: that quantizes the network as it is.
      rules: that the command has already.
    """
    best = recommended(found, stored)
    return {
        "images": found.images,
        "output_sqnr_db": finite_or_none(found.now.sqnr_db),
        "agreement": found.now.agreement,
        "bytes": stored,
        "costs": [cost.to_dict() for cost in worst_first(found.costs)],
        "remedies": [
            {
                "remedy": x.remedy.name,
                "output_sqnr_db": finite_or_none(x.judged.sqnr_db),
                "agreement": x.judged.agreement,
                "bytes": stored + x.bytes,
                "seconds": round(x.seconds, 3),
                "options": options_of(x, rules),
                "command": shlex.join([*command, *options_of(x, rules)]),
            }
            for x in found.outcomes
        ],
        "recommended": None if best is None else best.remedy.name,
        "enough": best is not None and is_near(best.judged),
    }
