"""How many channels of every network with a name can be removed, and in which sets.

A set is what can be removed only together, such as one channel of all layers that add to a residual
stream; a group is the sets that the same layers make. Weights are zeros: only shapes count.
"""

import re
import time

import common
import numpy as np
from common import Column, Row

TABLES = {
    "coupled_channels": (
        Column("network", "network"),
        Column("size", "pixels"),
        Column("nodes", "nodes", ","),
        Column("groups", "groups", ","),
        Column("sets", "sets", ","),
        Column("channels", "channels", ","),
        Column("removable", "of them removable, %", ".0fx100"),
        Column("weights", "weights that go with them, %", ".0fx100"),
        Column("seconds", "s", ".2f"),
    )
}
PIXELS = {"inception_v3": 96}
"""Of networks that read larger images than 64x64."""
FIXED = re.compile("vit_|vgg.*_bn|.*_cifar")
"""Networks that read the images they were published with only."""


def main() -> None:
    """Asks the chosen networks."""
    from dfq_jax.io.zoo.known import names

    parser = common.parser(__doc__)
    parser.add_argument(
        "--networks", type=common.choices(names()), default=names(), help="names, default: all"
    )
    args = parser.parse_args()
    rows = []
    for name in args.networks:
        rows.append(row(name))
        text = ", ".join(f"{c.heading} {c.text(rows[-1])}" for c in TABLES["coupled_channels"])
        common.log(text)
    common.finish(args, TABLES, rows, None)


def row(name: str) -> Row:
    """One network."""
    from dfq_jax.graph.coupling import coupled_channels
    from dfq_jax.graph.query import parameter_count, weighted_nodes
    from dfq_jax.io.load import bound
    from dfq_jax.io.zoo.known import network

    net = network(name, size=None if FIXED.match(name) else PIXELS.get(name, 64))
    zeros = {w.torch_name: np.zeros(w.torch_shape, np.float32) for w in net.expected}
    model = bound(net, zeros).model
    start = time.perf_counter()
    coupled = coupled_channels(model)
    seconds = time.perf_counter() - start
    made = [coupled.tensors[node.name][-1] for node in weighted_nodes(model.graph)]
    gone = [
        model.params[node][slot].size * (1 - np.prod([(a == 0).mean() for a in axes]))
        for node, slots in coupled.slots.items()
        for slot, axes in slots.items()
    ]
    channels = sum(map(len, made))
    return {
        "table": "coupled_channels",
        "network": name,
        "size": model.contract.height,
        "nodes": len(model.graph.nodes),
        "groups": len(coupled.groups()),
        "sets": len(coupled),
        "channels": channels,
        "removable": sum(int((numbers > 0).sum()) for numbers in made) / channels,
        "weights": float(sum(gone)) / parameter_count(model),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
