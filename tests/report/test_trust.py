"""The estimate that a report tells, its interval, its words and its gate."""

import dataclasses
import json

import numpy as np
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import Activation
from dfq_jax.graph.tasks import Classifier
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import parse_scheme, resolve
from dfq_jax.quantization.simulate import simulate
from dfq_jax.report.trust import (
    Estimate,
    check_accuracy,
    estimate,
    estimated,
    judges_classes,
    points,
    told_as_data,
    trust_words,
)


@pytest.fixture(scope="module")
def scores():
    random = np.random.default_rng(0)
    return 3 * random.normal(size=(256, 10)), random.normal(size=(256, 10))


def test_identical_networks_lose_nothing(scores):
    exact, _ = scores
    found = estimated(exact, exact, 0.8)
    assert (found.loss, found.low, found.high, found.changed) == (0, 0, 0, 0)
    assert not found.collapsed


@pytest.mark.parametrize("accuracy", [None, 0.72])
@pytest.mark.parametrize("size", [0.1, 0.5, 2.0, 10.0])
def test_the_interval_contains_the_estimate(scores, accuracy, size):
    exact, error = scores
    found = estimated(exact, exact + size * error, accuracy)
    assert found.low < found.loss < found.high
    assert -0.05 < found.low < 1
    assert found.high <= found.accuracy[1]
    assert found.probes == 256
    assert found.accuracy == ((0.72, 0.72) if accuracy else (0.65, 0.92))


def test_knowing_the_accuracy_narrows_the_interval(scores):
    exact, error = scores
    whole, known = (estimated(exact, exact + error, a) for a in (None, 0.8))
    assert whole.loss == known.loss
    assert whole.low < known.low < known.high < whole.high


def test_probes_of_noise_widen_it(scores):
    exact, error = scores
    usual, low = (estimated(exact, exact + error, 0.8, confidence=c) for c in ("usual", "low"))
    assert usual.loss == low.loss
    assert low.low < usual.low < usual.high < low.high


def test_probabilities_are_judged_as_the_scores_behind_them(scores):
    exact, error = scores
    softmax = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)
    plain, behind = exact, softmax(exact)
    rough = exact + error
    one, other = estimated(plain, rough, 0.8), estimated(behind, softmax(rough), 0.8)
    assert other.loss == pytest.approx(one.loss, rel=1e-3)


def test_order_and_constants_of_scores_do_not_matter(scores):
    exact, error = scores
    order = np.random.default_rng(1).permutation(256)
    one = estimated(exact, exact + error, 0.8)
    other = estimated(exact[order] + 4, (exact + error)[order] - 2, 0.8)
    assert other.loss == pytest.approx(one.loss, rel=1e-9)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.01, 72.0, float("nan")])
def test_an_accuracy_that_is_none_is_refused(scores, bad):
    with pytest.raises(UsageError, match="at most 1"):
        estimated(scores[0], scores[0], bad)


def test_percent_are_told_as_fractions():
    with pytest.raises(UsageError, match=r"say 0\.72, not 72"):
        check_accuracy(72.0)
    check_accuracy(1.0)
    check_accuracy(None)


def test_numbers_that_are_none_are_the_worst_case(scores):
    exact, rough = scores[0], scores[0].copy()
    rough[3, 2] = np.nan
    found = estimated(exact, rough)
    assert (found.loss, found.high, found.changed) == (0.8, 0.92, 1)
    assert found.collapsed


def an_estimate(**other):
    given = {"loss": 0.006, "low": -0.001, "high": 0.014, "changed": 0.03}
    return Estimate(**{**given, "accuracy": (0.65, 0.92), "probes": 256, **other})


def test_it_fails_where_half_of_the_accuracy_is_lost():
    assert not an_estimate(loss=0.39, high=0.6).collapsed
    lost = an_estimate(loss=0.41, low=0.2, high=0.6)
    assert lost.collapsed
    assert lost.failure == (
        "it is expected to lose 41.0 points (20.0 to 60.0 on 1,000 images) of top-1 on real "
        "images, more than half of its accuracy (80 %)"
    )
    assert an_estimate(loss=0.41, accuracy=(0.9, 0.9)).failure == ""
    assert an_estimate(loss=0.46, accuracy=(0.9, 0.9)).failure.endswith("(90 %)")


def test_where_little_is_known_it_fails_only_for_certain():
    assert not an_estimate(loss=0.5, low=0.3, confidence="low").collapsed
    assert an_estimate(loss=0.7, low=0.41, confidence="low").collapsed


def test_what_noise_tells_is_a_range_in_whole_points():
    """Files of networks without statistics: 32 points were told to a tenth, 10.5 were true."""
    wide = an_estimate(loss=0.321, low=0.068, high=0.6612, confidence="low")
    assert points(wide) == "6 to 67 points"
    assert trust_words(wide)[0] == "expected loss of top-1 on real images 6 to 67 points"
    assert points(an_estimate(confidence="low")) == "0 to 2 points"
    lost = dataclasses.replace(wide, low=0.45)
    assert lost.failure.startswith("it is expected to lose 45 to 67 points of top-1 on real images")


def test_lines_are_called_rows():
    told = trust_words(an_estimate(noun="row"))[0]
    assert told == "expected loss of top-1 on real rows 0.6 points (-0.1 to 1.4 on 1,000 rows)"


def test_its_words_fit_a_terminal():
    lines = trust_words(an_estimate())
    assert lines[0] == (
        "expected loss of top-1 on real images 0.6 points (-0.1 to 1.4 on 1,000 images)"
    )
    assert lines[1].strip() == (
        "estimated from 256 probes made from the network; not a measurement"
    )
    assert "`accuracy=0.72`" in lines[2]
    assert len(trust_words(an_estimate(accuracy=(0.72, 0.72)))) == 2
    told = trust_words(an_estimate(accuracy=(0.72, 0.72), confidence="low"))
    assert told[2].strip() == "the probes are noise, which tells no more about it: low confidence"
    widest = an_estimate(loss=0.888, low=0.777, high=0.888)
    assert all(len(line) <= 80 for found in (lines, told, trust_words(widest)) for line in found)


def test_its_data_have_the_same_keys_without_it():
    found = json.loads(json.dumps(told_as_data(an_estimate())))
    assert found == {
        "expected_loss": 0.006,
        "expected_loss_low": -0.001,
        "expected_loss_high": 0.014,
        "expected_changed": 0.03,
        "assumed_accuracy": [0.65, 0.92],
        "probes": 256,
    }
    assert told_as_data(None) == dict.fromkeys(found)


@pytest.fixture(scope="module")
def reference(nets):
    return fold_batch_norm(nets.tiny())


def on_grids(reference, images, scheme):
    plan = resolve(reference.graph, parse_scheme(scheme), "qdrop_8bit_ends", ())
    return calibrate(reference, plan, images)


def test_both_networks_are_run_on_every_probe(reference, nets):
    images = nets.images(reference, 10, seed=3)
    quantized = on_grids(reference, images, "w3a4")
    exact, rough = evaluate(reference, images)[0][0], simulate(quantized, images)
    found = estimate(reference, quantized, images, 0.8, batch=4)
    assert found.probes == 10
    by_hand = estimated(np.asarray(exact), np.asarray(rough), 0.8)
    assert found.loss == pytest.approx(by_hand.loss, abs=1e-4)
    assert found.changed == pytest.approx(by_hand.changed, abs=1e-3)


def test_fewer_bits_are_expected_to_cost_more(reference, nets):
    images = nets.images(reference, 64, seed=3)
    losses = [
        estimate(reference, on_grids(reference, images, scheme), images, 0.8).loss
        for scheme in ("w8a8", "w4a4", "w2a2")
    ]
    assert losses == sorted(losses)
    assert losses[0] < losses[2]


def test_only_one_vector_of_scores_is_judged(nets):
    assert judges_classes(nets.tiny())
    assert not judges_classes(nets.unet())


def test_a_state_behind_a_tanh_is_no_vector_of_scores(nets):
    scores = nets.tiny()
    (last,) = scores.graph.outputs
    state = Node("state", Activation("tanh"), (last,))
    graph = dataclasses.replace(
        scores.graph, nodes=(*scores.graph.nodes, state), outputs=("state",)
    )
    model = dataclasses.replace(scores, graph=graph)
    assert not judges_classes(model)
    assert judges_classes(model, Classifier())
