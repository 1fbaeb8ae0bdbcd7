import math

import numpy as np
import pytest

from dfq_jax.io.verification.ends import OutputCheck
from dfq_jax.io.verification.layers import LayerCheck
from dfq_jax.io.verification.rules import (
    MOST_BEYOND,
    failures_of,
    judged_by,
    most_noise,
    moved_by_saturation,
)

OFF, ON, PRECISE = "onnxruntime off", "onnxruntime on", "onnxruntime precise"


def layer(tensor="relu1", steps=1, beyond=0.0, **how):
    return LayerCheck(tensor, 8, steps, 0, 1.0, 1.0, 100, beyond, **how)


def output(differences, agreements=None, name="logits"):
    ways = dict.fromkeys(differences, 1.0)
    return OutputCheck(
        name, "classes", 0.1, 8, 6, differences, {**ways, **(agreements or {})}, 8, 10
    )


def test_a_file_passes():
    assert failures_of((), [layer()], [output({OFF: 0.4})], [OFF]) == ()
    assert failures_of((), [], [], [OFF]) == ()


def test_damage_fails_whatever_it_does():
    (told,) = failures_of(["node 'a' is missing", "b", "c"], [layer()], [], [OFF])
    assert told == "the file is not what was exported: node 'a' is missing, and 2 more"


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (layer(steps=2), "the codes of 'relu1' are up to 2 steps apart, 1 is allowed"),
        (layer(steps=0, integer_beyond=0.3), "codes of 'relu1' differ that are no ties"),
        (layer(beyond=2 * MOST_BEYOND), "codes of 'relu1' differ that are no ties"),
        (layer(beyond=math.nan), "no ties"),
    ],
)
def test_layers_differ_by_ties_only(check, words):
    (told,) = failures_of((), [layer("input"), check, check], [], [OFF])
    assert told.startswith(words) or words in told


def test_outputs_are_as_near_as_rounding_leaves_them():
    fine = output({OFF: 0.9 * most_noise(8, 10), ON: 0.1})
    assert failures_of((), [], [fine], [OFF, ON]) == ()
    for far in (1.1 * most_noise(8, 10), math.nan, math.inf):
        (told,) = failures_of((), [], [fine, output({OFF: 0.1, ON: far}, name="depth")], [OFF, ON])
        assert told.startswith(f"output 'depth' ({ON}) is {far:.2g} times the noise of rounding")
    (told,) = failures_of((), [], [output({OFF: 0.1}, {OFF: 0.98})], [OFF])
    assert told == (
        f"output 'logits' ({OFF}) decides as the simulator in only 98.0 % of 6 cases that are no "
        "ties"
    )


def test_saturation_is_told_and_not_judged():
    names = ("integer", OFF, ON, PRECISE)
    assert judged_by(names) == ("integer", OFF, PRECISE)
    assert judged_by(names[:3]) == names[:3]
    moved = output({"integer": 0.0, OFF: 0.0, ON: 9.0, PRECISE: 0.01}, {ON: 0.875})
    assert failures_of((), [], [moved], judged_by(names)) == ()
    still = output({OFF: 0.0, ON: 0.05, PRECISE: 0.01})
    (told,) = moved_by_saturation([still, moved])
    assert "moves output 'logits' by 9 times the noise of rounding (0.01 in precise mode)" in told
    assert "decides otherwise in 12.5 % of clear cases" in told
    assert 'session.x64quantprecision = "1"' in told
    assert moved_by_saturation([still, output({OFF: 0.0, ON: 9.0})]) == ()


def test_the_limit_allows_for_how_noise_is_measured():
    """Two roundings with nothing in common, over and over, on as few values."""
    rng = np.random.default_rng(0)
    for images, values in ((1, 1), (2, 3), (8, 1), (8, 10), (64, 1000)):
        count = images * min(values, 8)
        ours, theirs = rng.normal(size=(2, 4000, count))
        ratio = np.sqrt(np.mean((ours - theirs) ** 2, 1) / np.mean(ours**2, 1))
        assert ratio.max() < most_noise(images, values)
    assert most_noise(8, 10) < 8
    assert 2.83 < most_noise(10_000, 1000) < 3
