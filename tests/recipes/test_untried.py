"""What is not computed, and what it takes."""

import pytest

from dfq_jax.allocation.candidates import Judged
from dfq_jax.allocation.costs import cost_of
from dfq_jax.allocation.diagnosis import Diagnosis, Outcome
from dfq_jax.allocation.remedies import remedies_for
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.recipes.untried import foretold, other_presets, to_dicts, within_budget
from dfq_jax.types import plain_contract

W4A8 = Scheme(4, 8)
MADE = {"n": 12, "steps": 40, "seconds": 60.0, "compile_seconds": 12.0}


def test_seconds_of_other_images():
    assert foretold(MADE, 12, 40) == 60.0
    assert foretold(MADE, 24, 20) == 60.0
    assert foretold(MADE, 64, 60) == pytest.approx(12 + 48 * 8)
    for missing in MADE:
        assert missing == "compile_seconds" or foretold({**MADE, missing: None}, 1, 1) is None
    assert foretold({}, 64, 60) is None


def test_the_presets_that_do_more():
    large = other_presets("fast", plain_contract((224, 224, 3)), Scheme(6, 8), MADE)
    assert [x.options for x in large] == [("--preset", "balanced"), ("--preset", "best")]
    assert large[0].takes == (
        "makes 64 images in 60 steps (about 396 s, going by those it has), "
        "solves every layer in closed form"
    )
    assert large[0].seconds == pytest.approx(396)
    few = other_presets("fast", plain_contract((224, 224, 3)), Scheme(4, 4), MADE)
    assert few[0].takes.startswith("makes 128 images in 60 steps")
    assert few[0].takes.endswith("learns stage after stage by gradient steps")
    small = other_presets("balanced", plain_contract((32, 32, 3)), W4A8, {})
    assert [x.takes for x in small] == [
        "makes 256 images in 100 steps, learns rounding by gradient steps"
    ]
    assert small[0].seconds is None
    assert other_presets("best", plain_contract((32, 32, 3)), W4A8, MADE) == ()
    assert other_presets("None", plain_contract((32, 32, 3)), W4A8, MADE) == ()
    assert to_dicts(small)[0]["options"] == ["--preset", "best"]


def test_a_budget_of_as_many_bytes(tiny_net):
    graph = tiny_net.graph
    plan = resolve(graph, Scheme(4, 8))
    remedies = remedies_for(tiny_net, plan, ["conv2", "project", "depthwise"])
    outcomes = tuple(Outcome(r, Judged(1.0, 1.0), 10, 0.5) for r in remedies)
    found = Diagnosis((), Judged(0.0, 0.0), outcomes, 10)
    told = within_budget(tiny_net, plan, found, images=12)
    assert told is not None
    two = next(r for r in remedies if r.name == "the 2 worst layers at 8 bits")
    assert told.options == ("--budget", str(cost_of(tiny_net, two.plan, "bytes")))
    assert told.seconds == pytest.approx(3 * 6 * 43 * 0.05)  # kernels, candidates, images
    assert told.takes.startswith("makes 43 images, spends the bytes of the 2 worst layers at 8")
    more = within_budget(tiny_net, plan, found, images=64)
    assert more is not None
    assert more.takes.startswith("spends")
    fine = resolve(graph, Scheme(8, 8))
    assert within_budget(tiny_net, fine, found, images=64) is None
