import jax
import numpy as np
import pytest

from dfq_jax.io.verify_ends import decided, end_checks, end_gaps, first_output

RNG = np.random.default_rng(0)


def test_ties_are_closer_than_rounding_moves_scores():
    plain = RNG.normal(size=(40, 10))
    scores = plain + RNG.normal(size=(40, 10)) * 0.05
    noise = np.sqrt(np.mean((scores - plain) ** 2))
    ordered = np.sort(scores, axis=1)
    wanted = ordered[:, -1] - ordered[:, -2] > 6 * noise
    found = decided(scores, plain)
    np.testing.assert_array_equal(found, wanted)
    assert 0 < found.sum() < 40
    assert decided(scores, scores).all()  # nothing was rounded
    grown = decided(scores * 7, plain * 7)
    np.testing.assert_array_equal(grown, found)  # whatever the unit of scores


def test_a_network_that_decides_nothing_is_judged_on_all():
    plain = RNG.normal(size=(6, 4, 5, 3))
    assert decided(plain + RNG.normal(size=plain.shape) * 9, plain).all()
    assert decided(np.zeros((3, 1)), np.ones((3, 1))).all()  # no classes to choose from


def test_agreement_counts_decided_images_only():
    simulator = np.array([[3.0, 0.0], [2.0, 1.9], [0.0, 4.0], [5.0, 0.0]])
    same = np.array([[3.1, 0.0], [1.8, 1.9], [0.0, 4.0], [5.0, 0.5]])
    wrong = np.array([[0.0, 3.0], [2.0, 1.9], [0.0, 4.0], [5.0, 0.0]])
    counted = np.array([True, False, True, True])
    gaps = end_gaps([[simulator], [simulator], [same], [wrong]], counted)
    np.testing.assert_allclose(gaps[:, 0], [0, 0.5, 3])
    checks = end_checks(np.stack([gaps, gaps]), ("integer", "onnxruntime off", "onnxruntime on"))
    assert [c.runner for c in checks] == ["integer", "onnxruntime off", "onnxruntime on"]
    assert [c.agreement for c in checks] == pytest.approx([1, 1, 2 / 3])
    assert [c.undecided for c in checks] == pytest.approx([0.25] * 3)


def test_scores_before_rounding(onnx_nets):
    q = onnx_nets.quantized("residual", "w4a4", "brecq_8bit_ends_second")
    x = onnx_nets.images(q.model, 2)
    from dfq_jax.io.verify import simulated

    plain, rounded = first_output(q.model, x), simulated(q, x)
    assert plain.shape == rounded.shape
    assert 0 < float(jax.numpy.abs(plain - rounded).max()) < 10
