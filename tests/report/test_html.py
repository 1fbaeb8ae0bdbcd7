import base64
import dataclasses
import io
import math
import re

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from dfq_jax.allocation.diagnosis import LayerCost
from dfq_jax.examples import Examples
from dfq_jax.optim.progress import UnitReport
from dfq_jax.quantization.shared_grids import SharedGrid
from dfq_jax.report.analyze import LayerReport, Report
from dfq_jax.report.float_kinds import FloatKind
from dfq_jax.report.html import Making, report_html
from dfq_jax.report.outputs import OutputReport
from dfq_jax.report.trust import Estimate
from dfq_jax.types import InputContract

NASTY = "<script>alert('x')</script>\x1b[31m\n\"&%s{{ 7 * 7 }}"


def page_of(report, channels=3, **how):
    contract = InputContract(8, 6, mean=(0.5,) * channels, std=(0.25,) * channels)
    images = Examples((jnp.zeros((2, 8, 6, channels)),), (contract,))
    settings = how.pop("settings", {"scheme": "w8a8", "seed": 3})
    return report_html(report, images, settings, **how).decode()


@pytest.fixture
def report():
    layers = (
        LayerReport("conv1", "Conv2d", 8, 8, 1_234_567, 432, 31.25),
        LayerReport(NASTY, "Linear", None, None, 10, 20, math.inf),
    )
    return Report(layers, 0.75, 4, 28.66, True)


def test_the_page_says_what_matters(report):
    page = page_of(report)
    assert page.startswith("<!doctype html>")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "Agreement with the float network 75.0 % of 4 held-out synthetic images" in text
    assert "they are not an accuracy on real data" in text
    for fact in (
        "input 8 x 6, RGB",
        "normalisation (pixel/255 - (0.5, 0.5, 0.5)) / (0.25, 0.25, 0.25)",
        "integer share of multiply-accumulates 100.0 %",
        "SQNR of the output 28.7 dB",
        "scheme w8a8",
        "seed 3",
        "conv1 Conv2d 8 8 1,234,567 432 31.2",
        "Linear float float 10 20 exact",
    ):
        assert fact in text
    assert 'class="ok"' in page


def test_the_page_says_what_it_is_of(report):
    """The file first, whatever its name; pictures only where there are some."""
    about = {"model": NASTY, "SHA-256 of the model": "ab" * 32, "bytes of model.onnx": "1,234"}
    png = b"\x89PNG picture"
    page = page_of(report, about=about, making=Making({"front": png, "histograms": png}))
    assert "<script" not in page
    assert "<h1>Quantization report: &lt;script&gt;" in page
    first, second = (page.index(text) for text in ("ab" * 32, "<td>input</td>"))
    assert first < second
    assert page.count(f'base64,{base64.b64encode(png).decode()}"') == 2
    bare = page_of(report)
    assert "<h1>Quantization report</h1>" in bare
    assert "Bits within the budget" not in bare
    assert "Weights on their grids" not in bare


def test_the_worst_layers_come_first():
    """By what they cost alone, where that is known; else by the fidelity of their outputs."""
    named = lambda name, sqnr: LayerReport(name, "Conv2d", 8, 8, 10, 10, sqnr)
    layers = (named("a", 30.0), named("b", 20.0), named("c", math.inf), named("d", math.nan))
    found = Report(layers, 1.0, 4, 30.0, True)
    page = page_of(found)
    assert re.findall(r"<tr><td>(\w)</td><td>Conv2d", page) == ["d", "b", "a", "c"]
    assert re.findall(r"<td></td><td>(\d)</td></tr>", page) == ["4", "2", "1", "3"]
    assert "The least faithful outputs first" in page
    known = LayerCost("a", "Conv2d", 8, 8, 30.0, 30.0)
    page = page_of(dataclasses.replace(found, costs=(known,)))
    assert re.findall(r"<tr><td>(\w)</td><td>Conv2d", page)[0] == "a"


def test_every_outer_table_fits_a_phone(report):
    """Tables either break their words or scroll by themselves."""
    unit = UnitReport("u", "qdrop", 1.0, 0.5, True, 1.0)
    page = page_of(dataclasses.replace(report, units=(unit,)))
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in page
    starts = re.findall(r'(<div class="wide">)?<table( class="facts")?>', page)
    assert len(starts) == 3
    assert all(wide or facts for wide, facts in starts)


def test_every_output_is_shown_with_what_is_wrong_with_it(report):
    sound = OutputReport("logits", "classes", 21.25, 20.5, 0.975, 10, False, certain=True)
    ruined = OutputReport(NASTY, "values", 1.5, 1.5, None, 0, False, certain=False)
    page = page_of(dataclasses.replace(report, outputs=(sound, ruined)))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "logits classes 21.2 20.5 97.5 % sound" in text
    assert "values 1.5 1.5 output &#39;" in text
    assert "has an SQNR of only 1.5 dB" in text
    assert "<h2>Outputs</h2>" not in page_of(report)


def test_names_cannot_add_to_the_page(report):
    page = page_of(report, settings={NASTY: NASTY})
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    assert "\x1b" not in page
    assert "\\x1b[31m\\n&#34;&amp;%s" in page


def test_the_page_is_whole(report):
    page = page_of(report)
    assert not re.search(r"https?://|<link|<iframe", page)
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", page)
    with PIL.Image.open(io.BytesIO(base64.b64decode(picture))) as shown:
        assert shown.format == "PNG"


def test_large_images_leave_the_page_small(report):
    contract = InputContract(224, 224)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(40, 224, 224, 3)), jnp.float32)
    page = report_html(report, Examples((noise,), (contract,)), {}).decode()
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", page)
    with PIL.Image.open(io.BytesIO(base64.b64decode(picture))) as shown:
        assert shown.size == (6 * 226 - 2, 4 * 226 - 2)  # 20 of them
    assert len(page) < 5e6


def test_low_confidence_floats_and_notes_are_told(report):
    found = dataclasses.replace(
        report,
        layers=(dataclasses.replace(report.layers[0], reason="a <rule>"),),
        confidence="low",
        notes=("ranges come from <noise>",),
        in_float=(FloatKind("LayerNorm", 12, "no 8-bit form"),),
        dense=True,
    )
    page = page_of(found)
    assert '<p class="bad">Low confidence in these numbers.</p>' in page
    assert "<p>Note: ranges come from &lt;noise&gt;.</p>" in page
    assert "<td>12 LayerNorm</td><td>in float: no 8-bit form</td>" in page
    assert "<td>a &lt;rule&gt;</td>" in page
    assert "75.0 % of the positions of 4 held-out synthetic images" in page
    assert "Low confidence" not in page_of(report)


def test_unequal_parts_on_one_grid_are_told(report):
    found = SharedGrid("join", "<scores>", 41.44, 2.16)
    page = page_of(dataclasses.replace(report, shared_grids=(found,)))
    assert "<h2>Unequal parts on one grid</h2>" in page
    row = "<tr><td>&lt;scores&gt;</td><td>join</td>\n<td>2.2</td><td>41.4</td></tr>"
    assert row in page
    assert "Unequal parts" not in page_of(report)


def test_the_expected_loss_is_told(report):
    found = dataclasses.replace(
        report, estimate=Estimate(0.006, -0.001, 0.014, 0.03, (0.65, 0.92), 256)
    )
    page = page_of(found)
    assert "Expected loss of top-1 on real images 0.6 points (-0.1 to 1.4 on 1,000 images);" in page
    assert "from 256 probes made from the network; not a measurement" in page
    assert "<td>agreement with the float network</td><td>75.0 % of 4 held-out" in page
    lost = dataclasses.replace(found.estimate, loss=0.5)
    page = page_of(dataclasses.replace(found, estimate=lost))
    assert "FAILED: it is expected to lose 50.0 points" in page


VERIFIED = {"most_steps": 1, "agreement": 0.985, "runner": "ONNX Runtime"}


def test_failure_and_verification_are_told(report):
    failed = Report(report.layers, 0.25, 4, math.nan, True)
    page = page_of(failed, channels=1, verification=VERIFIED)
    assert 'class="bad"' in page
    assert "FAILED: the integer network agrees with the float one on only 25.0 % of 4" in page
    broken = page_of(dataclasses.replace(failed, finite=False))
    assert "FAILED: outputs of the integer network are not finite." in broken
    assert "<td>input</td><td>8 x 6, 1 channels</td>" in page
    assert "<td>largest difference to ONNX Runtime</td><td>1 step</td>" in page
    assert "<td>same decisions as ONNX Runtime</td><td>98.5 %</td>" in page
