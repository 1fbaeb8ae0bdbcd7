import math

import numpy as np
import pytest

from dfq_jax.graph.heads import Kind, Part
from dfq_jax.io.verification.ends import (
    CLEAR,
    LEAST_NOISE,
    difference,
    end_checks,
    legible,
    look,
    output_check,
)

RNG = np.random.default_rng(0)
WAYS = ("integer", "onnxruntime off")


def part(*shape, curve=None, kind: Kind = "classes", axis=None):
    axis = len(shape) - 1 if axis is None and kind == "classes" else axis
    where = np.arange(math.prod(shape)).reshape(shape)
    return Part("logits", "logits", "fc", curve, kind, axis, True, where, where)


def test_differences_are_in_units_of_the_noise_of_rounding():
    plain = RNG.normal(size=(40, 10)) * 5
    simulator = plain + RNG.normal(size=(40, 10)) * 0.2
    other = simulator + RNG.normal(size=(40, 10)) * 0.1
    runs = [plain, simulator, simulator, other]
    whole = output_check(part(10), [look(part(10), runs)], WAYS)
    noise = np.sqrt(np.mean((simulator - plain) ** 2))
    assert whole.noise == pytest.approx(noise)
    assert whole.differences["integer"] == 0
    gap = np.sqrt(np.mean((other - simulator) ** 2))
    assert whole.differences["onnxruntime off"] == pytest.approx(gap / noise)
    batches = [look(part(10), [y[a:b] for y in runs]) for a, b in ((0, 8), (8, 30), (30, 40))]
    parts = output_check(part(10), batches, WAYS)
    assert parts.differences == pytest.approx(whole.differences)
    assert (parts.counted, parts.images) == (whole.counted, 40)
    grown = output_check(part(10), [look(part(10), [7 * y for y in runs])], WAYS)
    assert grown.differences == pytest.approx(whole.differences)
    assert grown.counted == whole.counted


def test_decisions_count_that_rounding_cannot_turn():
    """The margin of the network that does not round, against the noise of this image too."""
    plain = np.array([[3.0, 0.0], [2.0, 1.9], [0.0, 4.0], [5.0, 0.0], [4.0, 0.0]])
    simulator = plain + 0.1 * np.array([[1, -1], [1, -1], [-1, 1], [1, 1], [30, -1]])
    same = np.array([[3.1, 0.0], [1.8, 1.9], [0.0, 4.0], [5.0, 0.5], [0.0, 3.0]])
    wrong = np.array([[0.0, 3.0], [2.0, 1.9], [0.0, 4.0], [5.0, 0.0], [4.0, 0.0]])
    made = look(part(2), [plain, simulator, same, wrong])
    noise = np.sqrt(np.mean((simulator - plain) ** 2, axis=1))
    unit = np.sqrt(np.mean((simulator - plain) ** 2))
    clear = np.abs(plain[:, 0] - plain[:, 1]) > CLEAR * np.sqrt(2) * np.maximum(noise, unit)
    found = output_check(part(2), [made], WAYS)
    assert found.counted == clear.sum() == 0
    assert found.agreements == dict.fromkeys(WAYS, 1.0)  # nothing counts: nothing is said
    quiet = output_check(
        part(2), [look(part(2), [y[:4] for y in (plain, simulator, same, wrong)])], WAYS
    )
    assert (quiet.decisions, quiet.counted) == (4, 3)
    assert quiet.agreements == pytest.approx({"integer": 1.0, "onnxruntime off": 2 / 3})


def test_signs_count_where_values_are_far_from_zero():
    plain = np.array([[5.0, -5.0, 0.01]])
    simulator = plain + 0.1
    other = np.array([[5.0, 5.0, -0.2]])
    found = output_check(
        part(3, kind="signs"),
        [look(part(3, kind="signs"), [plain, simulator, simulator, other])],
        WAYS,
    )
    assert (found.decisions, found.counted) == (3, 2)
    assert found.agreements["onnxruntime off"] == 0.5
    none = output_check(part(3, kind="values"), [look(part(3, kind="values"), [plain] * 4)], WAYS)
    assert (none.decisions, none.counted, none.agreements["integer"]) == (0, 0, 1.0)


def test_classes_lie_along_their_axis():
    plain = RNG.normal(size=(2, 4, 5, 3))
    simulator, other = plain.copy(), plain.copy()
    top = plain.argmax(1)
    other[0, :, 0, 0] = np.roll(other[0, :, 0, 0], 1)
    assert (other.argmax(1) != top).sum() == 1
    how = part(4, 5, 3, axis=0)
    found = output_check(how, [look(how, [plain, simulator, other, plain])], WAYS)
    assert found.decisions == 2 * 5 * 3
    assert found.agreements["integer"] == pytest.approx(1 - 1 / found.counted, abs=1e-9) or (
        found.agreements["integer"] == 1.0 and found.counted < 30
    )


def test_probabilities_are_compared_as_logarithms():
    """A sure network: behind the softmax nothing moves, before it everything does."""
    logits = RNG.normal(size=(6, 4)) * 3
    soft = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    plain, simulator, other = (soft(logits + RNG.normal(size=(6, 4)) * 0.1) for _ in range(3))
    how = part(4, curve="softmax")
    seen = look(how, [plain, simulator, other, simulator])
    np.testing.assert_allclose(seen.noise, np.mean((np.log(simulator) - np.log(plain)) ** 2, 1))
    sigmoid = part(4, curve="sigmoid", kind="signs")
    np.testing.assert_allclose(legible(sigmoid, 1 / (1 + np.exp(-logits))), logits, rtol=1e-6)
    assert np.isfinite(legible(sigmoid, np.array([[0.0, 1.0, 1.25, -1.0]]))).all()
    assert np.isfinite(legible(how, np.array([[0.0, 1.0]]))).all()


def test_classes_whose_probabilities_are_cut_are_no_measure_of_noise():
    """Of 5,000 classes ten are told; a decision counts by the noise of those, not of the zeros."""
    logits = np.full((8, 3, 5000), -60.0)
    logits[..., :10] = RNG.normal(size=(8, 3, 10))
    logits[..., 0] += 8  # clear by 8, beside noise of 1
    soft = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    shake = lambda: soft(logits + RNG.normal(size=logits.shape))
    runs = [soft(logits), shake(), shake(), shake()]
    how = part(3, 5000, curve="softmax")
    seen = look(how, runs)
    told = (np.log(runs[1]) - np.log(runs[0]))[..., :10].reshape(8, -1)
    np.testing.assert_allclose(seen.noise, np.mean(told**2, 1), rtol=1e-9)
    found = output_check(how, [seen], WAYS)
    assert found.counted < found.decisions
    assert found.noise == pytest.approx(np.sqrt(np.mean(told**2)), rel=1e-9)
    assert found.agreements == dict.fromkeys(WAYS, 1.0)


def test_a_probability_of_one_in_place_of_zero_is_seen():
    """Both are cut, at other ends: what is noisy elsewhere must not hide it."""
    logits = np.tile([[-60.0, 60.0, 1.0, 0.0]], (4, 1))
    shake = logits + np.array([0, 0, 6.0, -6.0]) * RNG.choice([-1, 1], (4, 1))
    swapped = shake[:, [1, 0, 2, 3]]
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    how = part(4, curve="sigmoid", kind="signs")
    runs = [sigmoid(z) for z in (logits, shake, shake, swapped)]
    found = output_check(how, [look(how, runs)], WAYS)
    assert found.counted == 0
    assert found.differences["integer"] == 0
    assert found.differences["onnxruntime off"] > 3


def test_a_decision_that_rounding_moved_far_is_none_that_counts():
    """One place of an image may be chaotic where the image as a whole is not."""
    plain = np.tile([20.0, 0.0], (4, 50, 1))
    simulator = plain + RNG.normal(size=plain.shape) * 0.1
    simulator[0, 0] = [3.0, 14.0]  # this place alone
    how = part(50, 2)
    found = output_check(how, [look(how, [plain, simulator, plain, simulator])], WAYS)
    assert (found.decisions, found.counted) == (200, 199)
    assert found.agreements == dict.fromkeys(WAYS, 1.0)


def test_what_is_not_finite():
    a, b = np.array([1.0, np.inf, np.nan, 2.0]), np.array([1.0, np.inf, np.nan, np.nan])
    np.testing.assert_array_equal(difference(a, b), [0, 0, 0, np.nan])
    runs = [np.ones((2, 3)), np.ones((2, 3)), np.full((2, 3), np.nan), np.ones((2, 3))]
    found = output_check(part(3), [look(part(3), runs)], WAYS)
    assert math.isnan(found.differences["integer"])
    assert found.to_dict()["differences"] == {"integer": None, "onnxruntime off": 0.0}


def test_without_noise_float_arithmetic_is_the_unit():
    plain = RNG.normal(size=(5, 3))
    found = output_check(part(3), [look(part(3), [plain, plain, plain * (1 + 1e-6), plain])], WAYS)
    assert found.noise == pytest.approx(LEAST_NOISE * np.sqrt(np.mean(plain**2)))
    assert found.differences["integer"] == pytest.approx(1e-6 / LEAST_NOISE, rel=1e-3)
    zero = np.zeros((2, 3))
    found = output_check(part(3), [look(part(3), [zero, zero, zero, zero + 1])], WAYS)
    assert found.differences == {"integer": 0.0, "onnxruntime off": math.inf}


def test_every_way_has_an_entry():
    plain = RNG.normal(size=(4, 3)) * 9
    wrong = np.roll(plain, 1, axis=1)
    seen = look(part(3), [plain, plain, plain + 0.5, wrong])
    outputs = [output_check(part(3), [seen], WAYS)]
    integer, off = end_checks(outputs, seen.worst, WAYS)
    assert (integer.runner, off.runner) == WAYS
    assert integer.difference == pytest.approx(0.5)
    assert (integer.agreement, off.agreement) == (1.0, 0.0)
    assert end_checks([], np.zeros(2), WAYS)[0].undecided == 0.0
