"""Rules as people write them."""

import pytest

from dfq_jax.errors import PlanError
from dfq_jax.quantization.plan import Rule
from dfq_jax.quantization.rules import parse_rule, written


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("layer3.*=8", Rule("layer3.*", 8, 8)),
        ("fc=w8a4", Rule("fc", 8, 4)),
        ("*.fc = W5", Rule("*.fc", 5)),
        ("*=a6", Rule("*", None, 6)),
        ("a=b=float", Rule("a=b", keep_float=True)),
        ("layer3.*=w4g64", Rule("layer3.*", 4, sharing=64)),
        ("fc=w8ta16", Rule("fc", 8, 16, sharing="tensor")),
        ("fc=w8c", Rule("fc", 8, sharing="channel")),
        ("features.[0-9]=2", Rule("features.[0-9]", 2, 2)),
    ],
)
def test_rules(text, rule):
    assert parse_rule(text) == rule
    assert parse_rule(written(rule)) == rule


@pytest.mark.parametrize(
    "text", ["", "fc", "=8", "fc=", "fc=8w", "fc=a4w8", "fc=int8", "fc=w", "x=-4"]
)
def test_what_is_no_rule_is_told(text):
    with pytest.raises(PlanError, match=r"is none: write PATTERN=8, .*=w4g64, =w8t or =float"):
        parse_rule(text)


@pytest.mark.parametrize("text", ["fc=9", "fc=1", "fc=w16", "fc=w8a0"])
def test_bits_there_are_none_of(text):
    with pytest.raises(PlanError, match=r"rule 'fc' has \w+ \d+; there are [12] to 8"):
        parse_rule(text)
