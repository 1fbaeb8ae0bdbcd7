"""What a pruned network has lost, in words and rows."""

from collections import Counter

from dfq_jax.pruning.prune import Pruned
from dfq_jax.pruning.sparse import Zeros

SHAPE_HEADER = ("layer", "channels made", "channels read", "of MACs")


def pruned_line(pruned: Pruned) -> str:
    """What is left of the work and of the stored numbers."""
    (work, less), (values, fewer) = pruned.macs, pruned.values
    return (
        f"pruned to {100 * less / max(work, 1):.1f} % of {work:,} multiply-accumulates and "
        f"{100 * fewer / max(values, 1):.1f} % of {values:,} values"
    )


def zeros_line(zeros: Zeros) -> str:
    """How many weights are zero."""
    before, after = (f"{100 * share:.1f} %" for share in zeros.shares)
    return f"{before} of the weights made zero ({zeros.pattern}), {after} zero once quantized"


def lost_lines(pruned: Pruned | None, zeros: Zeros | None) -> list[str]:
    """What a network lost before it was quantized, if it did."""
    channels = [] if pruned is None else [pruned_line(pruned)]
    return channels if zeros is None else [*channels, zeros_line(zeros)]


def shape_rows(pruned: Pruned) -> list[list[str]]:
    """A line for every layer: name, what it makes and reads, what is left of its work."""
    return [
        [
            x.name,
            str(x),
            str(x.inputs[0]) if x.inputs[0] == x.inputs[1] else f"{x.inputs[0]} -> {x.inputs[1]}",
            f"{100 * x.macs[1] / max(x.macs[0], 1):.0f} %",
        ]
        for x in pruned.layers
    ]


def whole_lines(pruned: Pruned) -> list[str]:
    """How many layers keep all their channels, and why: a line for every reason."""
    return [
        f"all channels stay in {count} layer{'s' if count > 1 else ''}: {reason}"
        for reason, count in Counter(pruned.left.values()).items()
    ]
