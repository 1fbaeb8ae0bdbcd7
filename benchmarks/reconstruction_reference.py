"""What GENIE-M reaches in an independent PyTorch implementation, batch norms not folded.

It answers two questions about figures of released code: do we compute the same method, and is a
block's shortcut quantized with what the first convolution reads, or left in float? ResNet-20 has no
layer in its shortcuts, so code that quantizes layers leaves them alone. Images are real ones of the
training set; accuracy is on the whole test set.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import synthesis_quality
from common import Column, Row
from reconstruction import RELEASED

COLUMNS = [
    Column("network", "network"),
    Column("images", "images"),
    Column("n", "n"),
    Column("scheme", "scheme"),
    Column("shortcuts", "shortcuts"),
    Column("steps", "steps"),
    Column("seed", "seed"),
    Column("top1", "top-1 %", ".2fx100"),
    Column("released", "released %", ".2fx100"),
    Column("seconds", "s", ".0f"),
]
TABLE = "reconstruction_reference"
KINDS = {"float": False, "quantized": True}
BATCH = 32


def main() -> None:
    """A row for every scheme and kind of shortcut."""
    parser = common.parser(__doc__)
    parser.add_argument("--networks", type=common.choices(("resnet20",)), default=("resnet20",))
    parser.add_argument("--schemes", type=common.names, default=("w2a2",))
    parser.add_argument("--shortcuts", type=common.choices(KINDS), default=tuple(KINDS))
    parser.add_argument("--steps", type=int, default=2000, help="of each unit")
    parser.add_argument("--n", type=int, default=256, help="images")
    parser.add_argument("--seeds", type=lambda t: [int(v) for v in common.names(t)], default=[0])
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    args = parser.parse_args()
    rows, reason = synthesis_quality.measured(args, COLUMNS, lambda s: learned(s, args))
    common.finish(args, {TABLE: COLUMNS}, rows, reason)


def learned(subject: Any, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of a network."""
    for seed, scheme, kind in itertools.product(args.seeds, args.schemes, args.shortcuts):
        images = synthesis_quality.real_images(subject, args.n, seed)
        start = time.monotonic()
        found: Row = {"table": TABLE, "network": subject.name, "images": "real", "n": args.n}
        found |= {"scheme": scheme, "shortcuts": kind, "steps": args.steps, "seed": seed}
        network = network_of(args.shared / subject.about.model)
        found["top1"] = accuracy(network, subject, images, found, KINDS[kind])
        found["released"] = RELEASED["real"].get(scheme)
        yield found | {"seconds": time.monotonic() - start}


def accuracy(network: Any, subject: Any, images: Any, row: Row, shortcuts: bool) -> float:
    """The share of labelled images that the network gets right after learning."""
    import torch
    from reconstruction_torch import reconstruction, switch, units

    torch.manual_seed(row["seed"])
    as_torch = lambda x: torch.from_numpy(x.copy()).permute(0, 3, 1, 2).contiguous()
    bits = int(row["scheme"][1]), int(row["scheme"][3])
    exact = rough = as_torch(images)
    judged, done = as_torch(subject.judged[0]), []
    for unit in units(network, bits, shortcuts=shortcuts).values():
        with torch.no_grad():
            targets = switch(unit, "float")(exact)
        step = reconstruction(unit, exact, rough, targets, row["steps"], BATCH)
        for _ in range(row["steps"]):
            step()
        with torch.no_grad():
            exact, rough = targets, switch(unit, "hard")(rough)
        done.append(unit)
    with torch.no_grad():
        found = [torch.nn.Sequential(*done)(x).argmax(1) for x in judged.split(500)]
    return float((torch.cat(found).numpy() == subject.judged[1]).mean())


def network_of(checkpoint: Path) -> Any:
    """The network as a PyTorch module, in evaluation mode; its layers come in the same order."""
    import torch
    from synthesis_loops import cifar_resnet

    module = cifar_resnet(torch.nn, 3)
    values = torch.load(checkpoint, weights_only=True).values()
    module.load_state_dict(dict(zip(module.state_dict(), values, strict=True)))
    return module.eval()


if __name__ == "__main__":
    main()
