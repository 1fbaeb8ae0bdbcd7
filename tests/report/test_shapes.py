"""What a terminal shows of a network that lost channels."""

from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.prune import Pruning, prune
from dfq_jax.report.shapes import SHAPE_HEADER, shape_rows, whole_lines


def test_a_row_for_every_layer_fits_80_columns_and_reasons_are_told_once(tiny_net):
    found = prune(
        Subject(tiny_net), Pruning(0.3, restore="none", channels="all", untouched=("conv2",))
    )
    rows = shape_rows(found)
    assert [row[0] for row in rows] == [layer.name for layer in found.layers]
    assert all(len(row) == len(SHAPE_HEADER) for row in rows)
    assert max(sum(len(cell) + 2 for cell in row) for row in (list(SHAPE_HEADER), *rows)) <= 80
    lines = whole_lines(found)
    assert len(lines) == len(set(found.left.values()))
    assert "all channels stay in 1 layer: the pattern conv2 says so" in lines
