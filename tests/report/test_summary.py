"""A result as text."""

import dataclasses
import math

import dfq_jax as dfq
from dfq_jax.report.analyze import LayerReport, Report
from dfq_jax.report.summary import MOST_LAYERS, in_short, summary


def report(count):
    layers = tuple(
        LayerReport(f"stage{i}.{'block.' * 10}conv", "Conv2d", 8, 8, 10, 10, 10.0 + i)
        for i in range(count)
    )
    return Report(layers, 0.975, 40, 25.0, True)


def test_a_summary_is_short_and_says_what_matters():
    text = summary(report(50), {"scheme": "w4a8", "preset": "fast"})
    lines = text.splitlines()
    assert lines[0] == "scheme w4a8, preset fast"
    assert "quantized 50/50 layers (100.0 % of MACs" in text
    assert "agreement with the float network 97.5 % of 40 held-out synthetic images" in text
    at = lines.index("the worst layers of 50:")
    assert [line.split(".")[0] for line in lines[at + 2 :]] == [
        f"stage{i}" for i in range(MOST_LAYERS)
    ]
    assert max(len(line) for line in lines[at:]) <= 100
    assert "FAILED" not in text


def test_a_failure_is_not_overlooked():
    failed = dataclasses.replace(report(2), agreement=0.1, sqnr=math.nan)
    assert "FAILED: the integer network agrees" in summary(failed, {"scheme": "w2a2"})
    assert in_short(failed, {"scheme": "w2a2", "preset": "fast"}).startswith("w2a2 fast: FAILED")


def test_a_result_is_printed_without_its_arrays(tiny_net, nets):
    images = dfq.Examples((nets.images(tiny_net, 8),), tiny_net.inputs)
    made = dfq.quantize(tiny_net, images)
    assert str(made) == made.summary() == summary(made.report, made.settings)
    assert repr(made).startswith("<Result w8a8 fast: passed, ")
    assert "\n" not in repr(made)
    assert len(repr(made)) < 300
