"""What TOML files may say, in the form of flags."""

import pytest

from dfq_jax.base import settings
from dfq_jax.errors import UsageError

VERSION = "schema_version = 1\n"


@pytest.fixture
def said(tmp_path):
    """The table `[quantize]` of a file."""

    def read(text, verb="quantize"):
        path = tmp_path / "run.toml"
        path.write_text(VERSION + text)
        return settings.read_tables(path)[verb]

    return read


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ('pattern = "layer3.*"\nbits = 8', "layer3.*=8"),
        ('pattern = "fc"\nbits = "w4a8"', "fc=w4a8"),
        ('pattern = "fc"\nbits = "float"', "fc=float"),
        ('pattern = "a=b"\nweight_bits = 4', "a=b=w4"),
        ('pattern = "x"\ninput-bits = 6', "x=a6"),
        ('pattern = "x"\nweight-bits = 4\ninput-bits = 6', "x=w4a6"),
        ('pattern = "x"\nkeep_float = true', "x=float"),
    ],
)
@pytest.mark.parametrize("table", ["[[rules]]", "[[quantize.rules]]"])
def test_rules_one_by_one(said, table, rule, text):
    assert said(f"{table}\n{rule}\n") == {"rule": [text]}


def test_rules_come_after_those_of_the_table(said):
    """The last that matches wins."""
    text = '[quantize]\nrule = "*=4"\n[[quantize.rules]]\npattern = "b"\nbits = 6\n'
    assert said(text + '[[rules]]\npattern = "c"\nbits = 8\n')["rule"] == ["*=4", "b=6", "c=8"]
    assert said('[quantize]\nrules = ["a=8"]')["rule"] == ["a=8"]


@pytest.mark.parametrize(
    "rule",
    [
        "bits = 8",
        'pattern = "x"',
        "pattern = 3\nbits = 8",
        'pattern = "x"\nbits = 8\nkeep_float = true',
        'pattern = "x"\nbits = true',
        'pattern = "x"\nbits = 4.5',
        'pattern = "x"\nkeep_float = false',
        'pattern = "x"\nbit = 8',
        'pattern = "x"\nweight_bits = 8\nactivation_bits = 8',
    ],
)
def test_what_is_no_rule(said, rule):
    with pytest.raises(UsageError, match=r'(?s)run\.toml.* is no rule: write pattern = "layer3'):
        said(f"[[rules]]\n{rule}\n")


def test_rules_are_tables(said):
    with pytest.raises(UsageError, match=r"rules = 3 must be tables, \[\[rules\]\]"):
        said("rules = 3")
    with pytest.raises(UsageError, match=r"3 is no rule"):
        said("[quantize]\nrules = [3]")


def test_numbers_and_groups(said):
    text = (
        "[quantize]\naccuracy = 0.72\nmean = [0.485, 0.5, 1]\nstd = 0.25\n"
        '[quantize.reading]\narch = "resnet18"\nsize = [48, 192]\nno-bn-fallback = true\n'
    )
    assert said(text) == {
        **{"accuracy": 0.72, "mean": "0.485,0.5,1", "std": "0.25"},
        **{"arch": "resnet18", "size": "48x192", "no-bn-fallback": True},
    }
    assert said("[synthesize]\nn = 3\n[synthesize.machine]\ndevices = 2\n", "synthesize") == {
        **{"n": 3, "devices": 2}
    }


@pytest.mark.parametrize(
    "text",
    [
        "[quantize]\nmean = [0.5, true]",
        "[quantize]\nseed = 1.5",
        "[quantize.machine]\ndevices = 2",
        "[quantize.reading.more]\narch = 2",
        "[quantize]\nseed = [1]",
    ],
)
def test_values_that_no_flag_has(said, text):
    with pytest.raises(UsageError, match=r"in \[quantize\] must be text in quotes"):
        said(text)


def test_what_the_settings_were_used_for_is_no_setting(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(VERSION + '[model]\nname = "net.pth"\nsha256 = "ab"\n[quantize]\nseed = 1\n')
    assert settings.read_tables(path) == {"quantize": {"seed": 1}}
