"""How the benchmarks of tasks score: each rule by hand."""

import numpy as np
import pytest
from tasks_detection import Boxes, area_under, average_precisions, decoded, kept, matched, overlaps
from tasks_images import luma, psnr, ssim

RNG = np.random.default_rng(0)


def boxes(corners, classes, scores):
    return Boxes(np.array(corners, float).reshape(-1, 4), np.array(classes), np.array(scores))


def test_luma_and_psnr():
    image = np.full((12, 12, 3), 255.0)
    assert luma(image) == pytest.approx(np.full((4, 4), 235.0), abs=1e-9)
    assert psnr(np.full((4, 4), 10.0), np.full((4, 4), 12.0)) == pytest.approx(
        20 * np.log10(255 / 2)
    )


def test_ssim_of_equal_and_of_shifted_images():
    image = RNG.uniform(0, 255, (24, 24))
    assert ssim(image, image) == pytest.approx(1)
    grey = np.full((24, 24), 100.0)
    one = (0.01 * 255) ** 2  # without contrast only the means count
    wanted = (2 * 100 * 110 + one) / (100**2 + 110**2 + one)
    assert ssim(grey, grey + 10) == pytest.approx(wanted)
    assert ssim(image, 255 - image) < 0


def test_overlap_and_suppression():
    found = overlaps(
        np.array([[0, 0, 2, 2.0]]), np.array([[1, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]])
    )
    np.testing.assert_allclose(found, [[1 / 7, 1, 0]])
    some = boxes(
        [[0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0, 1, 0.9], [0, 0, 0.4, 1]],
        [1, 1, 2, 1],
        [0.5, 0.9, 0.1, 0.3],
    )
    left = kept(some)
    assert left.scores.tolist() == [0.9, 0.3, 0.1]


def test_boxes_find_their_own_once():
    overlap = np.array([[0.6, 0.9], [0.7, 0.95], [0.8, 0.2]])
    assert matched(overlap, 0.5) == [True, True, False]
    assert matched(overlap, 0.85) == [True, False, False]
    assert matched(np.zeros((2, 0)), 0.5) == [False, False]


def test_area_under_precision():
    assert area_under(np.array([True, True]), 2) == pytest.approx(1)
    assert area_under(np.array([True]), 2) == pytest.approx(51 / 101)  # recalls up to one half
    late = area_under(np.array([False, True]), 1)
    assert late == pytest.approx(0.5)
    assert area_under(np.array([], bool), 3) == 0


def test_mean_over_classes_and_images():
    wanted = [boxes([[0, 0, 1, 1]], [0], [1]), boxes([[0, 0, 1, 1]], [4], [1])]
    right = [w._replace(scores=np.array([0.8])) for w in wanted]
    np.testing.assert_allclose(average_precisions(right, wanted), np.ones(10))
    half = [right[0], boxes([[0, 0, 1, 0.6]], [4], [0.8])]
    np.testing.assert_allclose(average_precisions(half, wanted), [1, 1, 1, *[0.5] * 7])


def test_decoding_of_a_cell():
    output = np.zeros((1 + 4 + 2, 2, 2), np.float32)
    output[0, 1, 0], output[6, 1, 0] = 0.5, 0.9
    output[3:5] = np.log(0.25 / 0.75)
    (corners,), (label,), (score,) = decoded(output)
    np.testing.assert_allclose(corners, [-0.125, 0.375, 0.125, 0.625], atol=1e-6)
    assert label == 1
    assert score == pytest.approx(0.5**0.6 * 0.9**0.4)
