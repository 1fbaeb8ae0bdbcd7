import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Linear, Recurrent
from dfq_jax.graph.query import macs
from dfq_jax.graph.token_ops import Embed
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.narrowing import gap_of
from dfq_jax.quantization.plan import Plan, Rule, Scheme, parse_scheme, resolve
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.report.analyze import LayerReport, Report, analyze
from dfq_jax.report.float_kinds import FloatKind, float_kinds
from dfq_jax.report.trust import Estimate
from dfq_jax.types import Tokens


@pytest.fixture(scope="module")
def reference(nets):
    return fold_batch_norm(nets.tiny())


@pytest.fixture(scope="module")
def images(reference, nets):
    return nets.images(reference, 10, seed=3)


@pytest.fixture(scope="module")
def quantized(reference, images):
    plan = resolve(reference.graph, parse_scheme("w8a8"), "qdrop_8bit_ends", ())
    return calibrate(reference, plan, images)


def with_slots(quantized, name, **slots):
    model = quantized.model
    params = {**model.params, name: {**model.params[name], **slots}}
    return dataclasses.replace(quantized, model=dataclasses.replace(model, params=params))


def test_a_good_network(reference, quantized, images):
    report = analyze(reference, quantized, images)
    assert [x.name for x in report.layers] == ["conv1", "depthwise", "project", "conv2", "fc"]
    assert {(x.weight_bits, x.input_bits, x.integer) for x in report.layers} == {(8, 8, True)}
    assert [x.kind for x in report.layers] == ["Conv2d"] * 4 + ["Linear"]
    assert [x.params for x in report.layers] == [162, 54, 36, 432, 40]
    assert [x.macs for x in report.layers] == [10368, 3456, 2304, 1728, 40]
    assert (report.coverage, report.weight_coverage, report.average_bits) == (1.0, 1.0, 8.0)
    assert (report.images, report.finite, report.passed) == (10, True, True)
    assert all(15 < x.sqnr < 60 for x in report.layers)
    assert report.sqnr > 15
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert set(data) == {
        *("agreement", "held_out_images", "output_sqnr_db", "finite", "passed", "coverage_macs"),
        *("images_given", "task"),
        *(
            "coverage_params",
            "average_weight_bits",
            "layers",
            "confidence",
            "notes",
            "in_float",
            "units",
            "shared_grids",
            "layer_costs",
            "outputs",
        ),
        *("expected_loss", "expected_loss_low", "expected_loss_high", "expected_changed"),
        *("assumed_accuracy", "probes", "not_finite"),
    }
    assert (data["confidence"], data["notes"], data["in_float"]) == ("usual", [], [])
    assert data["layers"][0]["macs"] == 10368


def test_noise_is_counted_against_numpy(reference, quantized, images, nets):
    """A bias of fc off by one: its error energy is 1 in every class."""
    exact = QuantizedModel(quantized.model, empty_plan(), {})
    shifted = with_slots(exact, "fc", bias=exact.model.params["fc"]["bias"] + 1)
    report = analyze(reference, shifted, images)
    scores = nets.forward(reference, images)["fc"]
    assert report.sqnr == pytest.approx(10 * math.log10((scores**2).mean()), abs=1e-4)
    assert [x.sqnr for x in report.layers[:4]] == [math.inf] * 4
    assert report.agreement == 1.0


def empty_plan():
    return Plan((), (), Scheme(8, 8), "qdrop_8bit_ends")


def test_a_network_left_in_float(reference, images):
    report = analyze(reference, QuantizedModel(reference, empty_plan(), {}), images)
    assert (report.coverage, report.weight_coverage, report.average_bits) == (0.0, 0.0, 32.0)
    assert report.agreement == 1.0
    assert report.sqnr == math.inf
    assert report.to_dict()["output_sqnr_db"] is None
    assert report.to_dict()["layers"][0]["sqnr"] is None


def test_layers_left_in_float_lower_the_coverage(reference, images):
    rules = [Rule("conv2", keep_float=True)]
    plan = resolve(reference.graph, parse_scheme("w4a8"), "zsq_all_low", rules)
    report = analyze(reference, calibrate(reference, plan, images), images)
    inner = {x.name: x for x in report.layers}
    assert (inner["conv2"].weight_bits, inner["conv2"].integer) == (None, False)
    assert inner["project"].weight_bits == 4
    assert report.coverage == pytest.approx(sum(x.macs for x in report.layers if x.integer) / 17896)
    reasons = {x.name: x.reason for x in report.layers if not x.integer}
    unread = "zsq_all_low: its input is not behind a ReLU"
    assert reasons == {"conv1": unread, "conv2": "a rule keeps it in float", "fc": unread}
    assert report.weight_coverage == pytest.approx(1 - 432 / 724)
    assert report.average_bits == pytest.approx((432 * 32 + 292 * 4) / 724)


def test_batches_do_not_change_the_verdict(reference, quantized, images):
    whole, parts = (analyze(reference, quantized, images, batch=b) for b in (10, 4))
    assert (parts.agreement, parts.images) == (whole.agreement, 10)
    assert parts.sqnr == pytest.approx(whole.sqnr, abs=1)


def test_a_collapsed_network_does_not_pass(reference, quantized, images, nets):
    scores = np.zeros(5, np.float32)
    winners = np.argmax(nets.forward(reference, images)["fc"], axis=-1)
    scores[np.setdiff1d(np.arange(5), winners)[0]] = 100
    report = analyze(reference, with_slots(quantized, "fc", bias=jnp.asarray(scores)), images)
    assert report.agreement == 0.0
    assert not report.passed
    assert report.to_dict()["passed"] is False


def test_scores_that_are_not_finite_do_not_pass(reference, quantized, images):
    bias = jnp.full(5, jnp.inf)
    exact = QuantizedModel(quantized.model, empty_plan(), {})
    report = analyze(reference, with_slots(exact, "fc", bias=bias), images)
    assert not report.finite
    assert not report.passed
    assert math.isnan(report.sqnr)
    assert report.to_dict()["output_sqnr_db"] is None
    assert report.not_finite == ("'fc'",)
    assert report.failure == "outputs of the integer network are not finite: in 'fc'"
    assert report.to_dict()["not_finite"] == ["'fc'"]


def test_tensors_that_are_not_finite_are_named_in_order(reference, quantized, images):
    """The first of them is where to look."""
    exact = QuantizedModel(quantized.model, empty_plan(), {})
    kernel = quantized.model.params["depthwise"]["kernel"]
    huge = with_slots(exact, "depthwise", kernel=kernel * np.float32(3e38))
    report = analyze(reference, huge, images)
    assert report.not_finite[0] == "'depthwise'"
    assert "not finite: in 'depthwise', " in report.failure
    both = analyze(huge.model, huge, images)
    assert both.not_finite[0] == "'depthwise' (in float too)"


def test_large_values_are_no_fault(reference, quantized, images):
    """Whose squares float32 does not hold: losses are the same in any unit."""
    exact = QuantizedModel(reference, empty_plan(), {})
    slots = {name: value * np.float32(1e25) for name, value in reference.params["fc"].items()}
    large = with_slots(exact, "fc", **slots).model
    rough = with_slots(exact, "fc", **{k: v * np.float32(1.01) for k, v in slots.items()})
    report = analyze(large, rough, images)
    assert report.finite
    assert report.layers[-1].sqnr == pytest.approx(40, abs=0.01)
    assert report.sqnr == pytest.approx(40, abs=0.01)
    assert float(gap_of((jnp.full(3, 1.01e30),), (jnp.full(3, 1e30),))) == pytest.approx(
        1e-4, rel=0.01
    )


def test_a_report_without_layers():
    report = Report((), 1.0, 1, 10.0, True)
    assert (report.coverage, report.weight_coverage, report.average_bits) == (0, 0, 0)
    assert LayerReport("a", "Conv2d", 8, None, 1, 1, 1.0).integer is False


def made(nets, name, **how):
    """The report of a modern network at 8 bits, on images it was not calibrated with."""
    model = fold_batch_norm(getattr(nets, name)())
    plan = resolve(model.graph, parse_scheme("w8a8"), **how)
    quantized = calibrate(model, plan, nets.images(model, 8))
    return analyze(model, quantized, nets.images(model, 6, seed=3))


def test_a_transformer(nets):
    report = made(nets, "vit", rules=[Rule("attention0.scores", keep_float=True)])
    layers = {x.name: x for x in report.layers}
    assert len(layers) == 14
    scores, values = layers["attention0.scores"], layers["attention0.values"]
    assert (scores.kind, scores.params, scores.macs) == ("MatMul", 0, 200)
    assert (scores.integer, scores.reason) == (False, "a rule keeps it in float")
    assert (values.weight_bits, values.input_bits, values.integer) == (8, 8, True)
    assert report.coverage == pytest.approx(1 - 200 / sum(x.macs for x in report.layers))
    assert report.weight_coverage == 1.0
    assert report.in_float == (
        FloatKind("Add", 5, "residual stream"),
        FloatKind("LayerNorm", 5, "no 8-bit form"),
        FloatKind("Softmax", 2, "no 8-bit form"),
        FloatKind("GELU", 2, "no 8-bit form"),
    )
    assert report.sqnr > 15
    assert report.passed


def test_weights_that_stay_in_float_count():
    """Of a GRU, an LSTM with what it keeps, and a table: 7 positions, 3 channels, 4 or 5 hidden."""
    ones = lambda *shape: jnp.ones(shape, jnp.float32)
    slots = lambda wide, n, gates: {
        "input": ones(wide, gates * n),
        "state": ones(n, gates * n),
        "bias": ones(gates * n),
        "state_bias": ones(gates * n),
    }
    nodes = (
        Node("table", Embed(), ("ids",)),
        Node("gru", Recurrent("gru"), ("table",)),
        Node("lstm", Recurrent("lstm"), ("gru",)),
        Node("kept", Recurrent("lstm", remembers=True), ("gru",)),
        Node("fc", Linear(), ("lstm",)),
    )
    params = {
        "table": {"table": ones(11, 3)},
        "gru": slots(3, 4, 3),
        "lstm": slots(4, 5, 4),
        "kept": slots(4, 5, 4),
        "fc": {"kernel": ones(5, 2)},
    }
    model = Model(Graph(nodes, ("ids",), ("fc", "kept")), params, (Tokens(7, 11),))
    recurrent = 12 * (3 + 4) + 20 * (4 + 5)
    assert macs(model) == {"gru": 7 * 84, "lstm": 7 * 180, "kept": 0, "fc": 7 * 10}
    kinds = float_kinds(model)
    assert kinds == (
        FloatKind("Embed", 1, "reads ids", 0, 33),
        FloatKind("Recurrent", 3, "recurrent", 7 * recurrent, recurrent),
    )
    layer = LayerReport("fc", "Linear", 8, 8, 7 * 10, 10, 40.0)
    report = Report((layer,), 1.0, 4, 40.0, True, in_float=kinds)
    assert report.coverage == pytest.approx(10 / (10 + recurrent))
    assert report.weight_coverage == pytest.approx(10 / (10 + recurrent + 33))
    assert report.average_bits == pytest.approx((80 + 32 * (recurrent + 33)) / (43 + recurrent))


def test_batch_norms_that_stay(nets):
    report = made(nets, "dense")
    assert report.in_float == (FloatKind("BatchNorm", 5, "not behind a convolution"),)
    assert report.coverage == 1.0


def test_scores_of_pixels(nets):
    report = made(nets, "unet")
    assert (report.classes, report.dense, report.images) == (3, True, 6)
    assert 0.5 < report.agreement < 1
    assert report.to_dict()["in_float"] == []


def test_every_output_is_judged(nets):
    report = made(nets, "two_heads")
    assert not report.dense
    assert [x.name for x in report.layers] == ["stem", "conv", "classes", "number"]
    assert [(o.name, o.kind, o.classes) for o in report.outputs] == [
        ("classes", "classes", 5),
        ("number", "values", 0),
    ]
    deciding = report.outputs[0]
    assert (report.agreement, report.sqnr) == (deciding.agreement, deciding.sqnr)
    assert report.to_dict()["task"] == {"name": "detector"}
    assert (report.passed, report.faults) == (True, ())
    data = report.to_dict()["outputs"]
    assert [set(o) for o in data] == [
        {
            "name",
            "kind",
            "sqnr",
            "sqnr_returned",
            "agreement",
            "passed",
            "positive",
            "overlap",
            "chance",
        }
    ] * 2


def test_a_ruined_second_output_fails_and_is_named(nets):
    model = fold_batch_norm(nets.two_heads())
    plan = resolve(model.graph, parse_scheme("w8a8"), "qdrop_8bit_ends")
    quantized = calibrate(model, plan, nets.images(model, 8))
    bias = model.params["number"]["bias"] + 100
    report = analyze(
        model, with_slots(quantized, "number", bias=bias), nets.images(model, 6, seed=3)
    )
    assert report.outputs[0].fault == ""
    assert not report.passed
    (told,) = report.faults
    assert told.startswith("output 'number' has ")


def test_an_estimate_decides_where_there_is_one():
    """Agreement on a few held-out images is neither needed nor enough."""
    spared = Estimate(0.05, 0.01, 0.1, 0.1, (0.65, 0.92), 256)
    lost = dataclasses.replace(spared, loss=0.5, low=0.3, high=0.7)
    report = Report((), 0.2, 4, 12.0, True, classes=10)
    assert "agrees with the float one on only 20.0 % of 4 held-out" in report.failure
    assert dataclasses.replace(report, estimate=spared).passed
    assert not dataclasses.replace(report, estimate=spared, finite=False).passed
    sure = dataclasses.replace(report, agreement=1.0, estimate=lost)
    assert not sure.passed
    assert "expected to lose 50.0 points" in sure.failure
    assert sure.to_dict()["expected_loss"] == 0.5
    assert sure.to_dict()["probes"] == 256
    assert report.to_dict()["expected_loss"] is None


def test_a_single_score_must_also_be_close():
    report = Report((), 1.0, 4, 2.9, True, classes=1)
    assert not report.passed
    assert dataclasses.replace(report, sqnr=3.1).passed
    assert dataclasses.replace(report, classes=2).passed
    assert not dataclasses.replace(report, sqnr=math.nan).passed
