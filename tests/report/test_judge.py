"""Outputs are judged by the one that suffers most, and by classes of the first."""

import math

import numpy as np
import pytest

from dfq_jax.report.judge import judged


def test_the_worst_output_decides():
    exact = np.array([[1.0, 2.0], [3.0, 0.0]], np.float32), np.full((2, 4, 1), 10.0, np.float32)
    rough = exact[0] + np.float32(0.1), exact[1] + np.float32(1.0)
    found = judged(exact, rough)
    assert found.sqnr_db == pytest.approx(20.0)
    assert found.agreement == 1.0
    first = judged(exact[:1], rough[:1])
    assert first.sqnr_db == pytest.approx(10 * math.log10(14 / 0.04), abs=1e-4)


def test_agreement_by_class_by_position_and_by_sign():
    a = np.array([[1.0, 2.0], [3.0, 0.0]], np.float32)
    assert judged((a,), (a[:, ::-1],)).agreement == 0.0
    assert judged((a,), (np.array([[1.0, 2.0], [0.0, 3.0]], np.float32),)).agreement == 0.5
    pixels = np.zeros((1, 2, 2, 3), np.float32)
    pixels[..., 1] = 1
    other = pixels.copy()
    other[0, 0, 0, 2] = 5
    assert judged((pixels,), (other,)).agreement == 0.75
    number = np.array([[1.0], [-2.0]], np.float32)
    assert judged((number,), (-number,)).agreement == 0.0


def test_ends():
    a = np.ones((2, 3), np.float32)
    assert judged((a,), (a,)) == (math.inf, 1.0)
    assert judged((a,), (a * np.nan,)).sqnr_db == -math.inf
    assert judged((a * 0,), (a,)).sqnr_db < -200
