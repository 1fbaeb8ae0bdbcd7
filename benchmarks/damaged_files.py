"""Damages real exported files in small ways and counts which of them still verify: none may.

The networks are those of the tests, at several schemes. A damage is a flipped bit of a kernel, bias
or scale, a scale off by 2 %, a zero point off by one, exchanged constants, another attribute, input
or operator of a node. Files as they were written must verify, with 8 and with 64 images.
"""

import argparse
import importlib
import sys
from typing import Any

import common
import file_mutations
from common import Column, Row

NETWORKS = """
residual:w8a8 option_a:w4a8 vgg:w8a8 odd:w5a6 extreme:w2a2 squeeze:w8a8 convnext:w4a8
transformer:w8a8 dense:w4a4 shuffle:w8a8 unet:w5a6 windows:w4a6
"""
TABLES = {
    "mutations": (
        Column("network", "network"),
        Column("scheme", "scheme"),
        Column("intact", "intact files that verify"),
        Column("mutations", "damaged files"),
        Column("passed", "verify all the same"),
        Column("failed", "fail"),
        Column("note", "note"),
    )
}


def main() -> None:
    """Damages the chosen networks."""
    parser = common.parser(__doc__)
    parser.add_argument("--networks", default=",".join(NETWORKS.split()), help="NAME:SCHEME")
    parser.add_argument("--each", type=int, default=17, help="damages of a network")
    args = parser.parse_args()
    sys.path.append(str(common.ROOT / "tests" / "io"))
    rows = []
    for name in common.names(args.networks):
        network, _, scheme = name.partition(":")
        rows.append(row(network, scheme, args))
        common.logged(rows[-1], TABLES["mutations"])
    wrong = [r["network"] for r in rows if r["passed"] or not r["intact"].startswith("2")]
    common.finish(args, TABLES, rows, f"wrong: {', '.join(wrong)}" if wrong else None)


def row(network: str, scheme: str, args: argparse.Namespace) -> Row:
    """How many damages of one network pass."""
    nets: Any = importlib.import_module("onnx_nets")
    quantized, file = nets.quantized(network, scheme), nets.integer_file(network, scheme)
    intact = sum(passes(quantized, file, nets.images(quantized.model, n, 5)) for n in (8, 64))
    images = nets.images(quantized.model, 8, 5)
    made = list(file_mutations.mutations(file, args.each))
    passed = [m for m in made if passes(quantized, m.file, images)]
    return {
        "table": "mutations",
        "network": network,
        "scheme": scheme,
        "intact": f"{intact} of 2",
        "mutations": len(made),
        "passed": len(passed),
        "failed": len(made) - len(passed),
        "note": "; ".join(f"{m.kind}: {m.where}" for m in passed) or None,
    }


def passes(quantized: Any, file: bytes, images: Any) -> bool:
    """Whether a file verifies; one that cannot be run does not."""
    from dfq_jax.errors import DfqError
    from dfq_jax.io.verification.verify import verify

    try:
        return verify(quantized, file, images).passed
    except DfqError:
        return False


if __name__ == "__main__":
    main()
