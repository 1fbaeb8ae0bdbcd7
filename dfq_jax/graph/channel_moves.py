"""How channels pass through what only moves, drops or repeats values; see `channel_flow`."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from dfq_jax.graph.labels import Flow, Labels, Read, Tie, Tied, fixed, labelled, own_labels, stay
from dfq_jax.graph.ops import Pad


def regrouped(x: Read, shape: tuple[int, ...]) -> Flow:
    """The same values in row-major order with other axes."""
    before = [labels for labels in x.axes[1:] if len(labels) > 1]
    after = [size for size in shape[1:] if size > 1]
    made, ties = [], fixed(*(labels for labels in x.axes if len(labels) == 1))
    for read, sizes in blocks(before, after):
        axes, more = refitted(read, sizes)
        made, ties = [*made, *axes], ties + more
    found = iter(made)
    axes = (x.axes[0], *(next(found) if size > 1 else stay(size) for size in shape[1:]))
    return Flow(axes, x.silent, ties)


def blocks(before: list[Labels], after: list[int]) -> Iterable[tuple[list[Labels], list[int]]]:
    """The smallest runs of axes that hold as many values before and after; no axis has size 1."""
    i = j = 0
    while i < len(before):
        start, read, made = (i, j), len(before[i]), after[j]
        i, j = i + 1, j + 1
        while read != made:
            if read < made:
                read, i = read * len(before[i]), i + 1
            else:
                made, j = made * after[j], j + 1
        yield before[start[0] : i], after[start[1] : j]


def refitted(axes: list[Labels], sizes: list[int]) -> tuple[list[Labels], tuple[Tie, ...]]:
    """The labels of some axes on other axes that hold the same values.

    What is left after removing must be whole along every axis, so one of the new axes loses
    positions, and labels of all values at one position are tied: of the axes the one that leaves
    the most to choose from. Channels that are split in two to be shuffled lose the same of each
    part, heads the same of each head.
    """
    stays = [stay(size) for size in sizes]
    lost = [at for at, labels in enumerate(axes) if labels.any()]
    if not lost:
        return stays, ()
    if len(lost) > 1:
        return stays, fixed(*axes)
    form = [-1 if at == lost[0] else 1 for at in range(len(axes))]
    read = axes[lost[0]].reshape(form)
    grid = np.broadcast_to(read, [len(labels) for labels in axes]).reshape(sizes)
    options = [np.moveaxis(grid, at, 0).reshape(size, -1) for at, size in enumerate(sizes)]
    ties = [tied_rows(rows) for rows in options]
    left = [
        len({one for one in Tied(tie).resolved(rows[:, 0]) if one != 0})
        for rows, tie in zip(options, ties, strict=True)
    ]
    best = max(range(len(sizes)), key=left.__getitem__)
    made = [options[at][:, 0] if at == best else stays[at] for at in range(len(sizes))]
    return made, ties[best]


def cut(bounds: tuple[tuple[int, int | None, int], ...], x: Read) -> Flow:
    """Part of a tensor; channels that are taken with a stride stay."""
    made, ties = [], ()
    for labels, (start, stop, step) in zip(x.axes, bounds, strict=True):
        part = labels[start:stop:step]
        made.append(part if step == 1 else stay(len(part)))
        ties += fixed(labels) if step != 1 else ()
    start, _, step = bounds[-1]
    return Flow(tuple(made), x.silent, ties, factors=start == 0 and step == 1)


def beside(axis: int, xs: tuple[Read, ...]) -> Flow:
    """Tensors joined along one axis; they lose the same along the others."""
    others, ties = xs[0].axes, ()
    for x in xs[1:]:
        ties += tuple((others[a], x.axes[a]) for a in range(len(others)) if a not in (0, axis))
    joined = np.concatenate([x.axes[axis] for x in xs]) if axis else others[0]
    made = tuple(joined if a == axis else labels for a, labels in enumerate(others))
    return Flow(made, all(x.silent for x in xs), ties)


def repeated_labels(x: Read, shape: tuple[int, ...], first: int) -> Flow:
    """Axes of one repeated: any number of copies may go of what has no other channels."""
    axes = (x.axes[0],) + (stay(1),) * (len(shape) - len(x.axes)) + x.axes[1:]
    copies = tuple(map(stay, shape)) if labelled(x.axes) else own_labels(shape, first)
    made, ties = [], ()
    for read, copied in zip(axes, copies, strict=True):
        made.append(read if len(read) == len(copied) else copied)
        ties += fixed(read) if len(read) != len(copied) else ()
    return Flow(tuple(made), x.silent and labelled(x.axes), ties)


def padded_labels(op: Pad, x: Read, first: int) -> Flow:
    """Padding along channels can be removed like them if it is a constant."""
    made, ties = [], ()
    for labels, (before, after) in zip(x.axes, op.widths, strict=True):
        edges = stay(before + after)
        if len(edges) and op.mode != "constant":
            ties += fixed(labels)
            labels = stay(len(labels))
        elif labels.any():
            edges = np.arange(first, first + len(edges))
            first += len(edges)
        made.append(np.concatenate([edges[:before], labels, edges[before:]]))
    zero = op.value == 0 or op.mode != "constant"
    return Flow(tuple(made), x.silent and zero, ties, factors=zero and op.widths[-1] == (0, 0))


def tied_rows(rows: Int[np.ndarray, "size values"]) -> tuple[Tie, ...]:
    """All labels of each row made the same."""
    pairs = np.stack([np.broadcast_to(rows[:, :1], rows.shape).ravel(), rows.ravel()])
    pairs = np.unique(pairs[:, pairs[0] != pairs[1]], axis=1)
    return ((pairs[0], pairs[1]),) if pairs.size else ()
