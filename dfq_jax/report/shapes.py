"""What a pruned network has lost, in words and rows."""

from dfq_jax.pruning.prune import Pruned

SHAPE_HEADER = ("layer", "channels made", "channels read", "of MACs", "all stay because")


def pruned_line(pruned: Pruned) -> str:
    """What is left of the work and of the stored numbers."""
    (work, less), (values, fewer) = pruned.macs, pruned.values
    return (
        f"pruned to {100 * less / max(work, 1):.1f} % of {work:,} multiply-accumulates and "
        f"{100 * fewer / max(values, 1):.1f} % of {values:,} values"
    )


def shape_rows(pruned: Pruned) -> list[list[str]]:
    """A line for every layer: name, what it made and makes, what is left of its work."""
    return [
        [
            x.name,
            str(x),
            str(x.inputs[0]) if x.inputs[0] == x.inputs[1] else f"{x.inputs[0]} -> {x.inputs[1]}",
            f"{100 * x.macs[1] / max(x.macs[0], 1):.0f} %",
            pruned.left.get(x.name, ""),
        ]
        for x in pruned.layers
    ]
