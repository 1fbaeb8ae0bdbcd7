import io

import numpy as np
import PIL.Image
import pytest

from dfq_jax.allocation.allocate import Allocation
from dfq_jax.allocation.choices import Choice, Space
from dfq_jax.allocation.costs import Budget, BudgetUnit
from dfq_jax.allocation.diagnosis import LayerCost
from dfq_jax.quantization.plan import Plan, Scheme
from dfq_jax.report.plots import (
    BITS_HEADER,
    FRONT_HEADER,
    bit_rows,
    costs_png,
    front_png,
    front_rows,
    name_in_chart,
)


def point(amount, loss, bits=(4, 8), unit: BudgetUnit = "bits"):
    return Allocation(bits, Budget(amount, unit), loss, ())


FRONT = (point(3.0, 0.5, (2, 4)), point(5.0, 1e-3, (4, 8)), point(8.0, 0.0, (8, 8)))
CHOICES = Choice("conv", (), ("conv",), True), Choice("relu", (), (), False)
SPACE = Space(CHOICES, (2, 4, 8), (), Plan((), (), Scheme(8, 8), "qdrop_8bit_ends"), ())


@pytest.mark.parametrize("unit", ["bits", "bytes", "bops"])
def test_front_is_a_picture_that_shows_what_was_chosen(unit):
    front = [point(p.cost.amount, p.loss, p.bits, unit) for p in FRONT]
    data = front_png(front, front[1], front[0])
    picture = PIL.Image.open(io.BytesIO(data))
    assert picture.format == "PNG"
    assert min(picture.size) > 300
    assert data == front_png(front, front[1], front[0])
    other = PIL.Image.open(io.BytesIO(front_png(front, front[2])))
    assert np.any(np.asarray(picture) != np.asarray(other))


def test_rows_of_bits():
    losses = np.array([[0.3, 0.02, 1e-4], [0.1, 0.01, 0.0]])
    rows = bit_rows(SPACE, losses, FRONT[1], FRONT[0])
    assert rows == [
        ["conv", "kernel", "4", "2", "2.00e-02", "1.00e-04"],
        ["relu", "tensor", "8", "4", "0.00e+00", "0.00e+00"],
    ]
    assert all(len(row) == len(BITS_HEADER) for row in rows)


def test_rows_of_the_front():
    rows = front_rows(SPACE, FRONT)
    assert rows[0] == ["3bits", "5.00e-01", "1x2", "1x4"]
    assert rows[2] == ["8bits", "0.00e+00", "1x8", "1x8"]
    assert all(len(row) == len(FRONT_HEADER) for row in rows)


def costs(count, **how):
    return [LayerCost(f"layer{i}", "Conv2d", 4, 4, 20.0 + i, **how) for i in range(count)]


def size(data):
    with PIL.Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_costs_are_a_picture_as_tall_as_there_are_layers():
    few, many = costs_png(costs(3, so_far_db=9.0)), costs_png(costs(30))
    assert few == costs_png(costs(3, so_far_db=9.0))
    assert size(few)[0] == size(many)[0] > 600
    assert size(many)[1] > 2 * size(few)[1]
    assert size(costs_png(costs(200)))[1] == size(costs_png(costs(60)))[1]
    ruined = LayerCost("$x^2\n", "Conv2d", 4, 4, float("-inf"), float("-inf"))
    assert size(costs_png([ruined]))[0] > 600


def test_the_layer_that_costs_most_is_red():
    with PIL.Image.open(io.BytesIO(costs_png(costs(20)))) as picture:
        shown = np.asarray(picture.convert("RGB"), np.int32).reshape(-1, 3)
    red, blue = (np.all(shown == c, axis=1).sum() for c in ((0xB0, 0, 0x20), (0x7A, 0x8B, 0xA8)))
    assert red > blue > 0  # five of twenty, far longer


def test_names_for_a_chart():
    assert name_in_chart("layer1.conv") == "layer1.conv"
    assert name_in_chart("a$b\nc\u00e9") == "a?b?c?"
    long = name_in_chart("x" * 30 + ".features.17.conv")
    assert len(long) == 36
    assert long.startswith("...")
    assert long.endswith(".features.17.conv")
