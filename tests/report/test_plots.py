import io

import numpy as np
import PIL.Image
import pytest

from dfq_jax.quantize.bits import Allocation
from dfq_jax.quantize.choices import Choice, Space
from dfq_jax.quantize.costs import Budget, Unit
from dfq_jax.quantize.plan import Plan, Scheme
from dfq_jax.report.plots import BITS_HEADER, FRONT_HEADER, bit_rows, front_png, front_rows


def point(amount, loss, bits=(4, 8), unit: Unit = "bits"):
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
