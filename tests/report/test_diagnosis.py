"""A diagnosis in words: tables of 80 columns, the remedy to take, commands a shell understands."""

import json
import math
import shlex

import pytest

from dfq_jax.allocation.candidates import Judged
from dfq_jax.allocation.diagnosis import Diagnosis, LayerCost, Outcome
from dfq_jax.allocation.remedies import Remedy
from dfq_jax.quantization.plan import Plan, Scheme
from dfq_jax.report.diagnosis import (
    COST_HEADER,
    REMEDY_HEADER,
    advice,
    columns,
    command_lines,
    cost_rows,
    in_lines,
    options_of,
    recommended,
    remedy_rows,
    to_dict,
)

PLAN = Plan((), (), Scheme(4, 4), "qdrop_8bit_ends")
LONG = "backbone.features.denseblock4.denselayer24.squeeze_and_excite.convolution"
COSTS = (
    LayerCost("stem", "Conv2d", 8, 8, 40.0, 41.5),
    LayerCost("body", "Conv2d", 4, 4, 10.0, 9.0),
    LayerCost(f"{LONG}\n", "Add", None, 4, 20.0),
)


def outcome(name, db, agreement, size, *rules, options=()):
    return Outcome(Remedy(name, PLAN, rules, options), Judged(db, agreement), size, 0.25)


FOUND = Diagnosis(
    COSTS,
    Judged(3.0, 0.5),
    (
        outcome("one", 6.0, 0.6, 1000, "body=8"),
        outcome("two", 12.0, 0.95, 3000, "body=8", "[x] y=8"),
        outcome("all", 30.0, 1.0, 9000, "*=8"),
        outcome("shortcuts", 2.0, 0.5, 0, options=("--layers", "qdrop_8bit_ends_shortcuts")),
    ),
    16,
)


def test_the_worst_layers_come_first_with_their_share_of_the_error():
    rows = cost_rows(COSTS, 2)
    assert rows == [
        ["body", "4/4", "10.0", "9.0", "90.8 %"],
        [f"{LONG}\\n", "-/4", "20.0", "-", "9.1 %"],
    ]
    none = LayerCost("a", "Conv2d", 8, 8, math.inf)
    assert cost_rows([none], 5) == [["a", "8/8", "exact", "-", "-"]]


def test_tables_keep_to_80_columns_and_names_stay_whole():
    lines = columns(COST_HEADER, cost_rows(COSTS, 5))
    assert max(map(len, lines)) <= 80
    assert f"{LONG}\\n" in lines
    assert lines[0].split("  ")[0] == "layer"
    after = lines[lines.index(f"{LONG}\\n") + 1]
    assert after.split() == ["-/4", "20.0", "-", "9.1", "%"]
    assert after.index("9.1 %") == lines[1].index("90.8 %") + 1


def test_remedies_with_the_size_of_the_file():
    lines = columns(REMEDY_HEADER, remedy_rows(FOUND, 180_000))
    assert [line.split() for line in lines[1:3]] == [
        ["as", "it", "is", "3.0", "50.0", "%", "0.18", "MB"],
        ["one", "6.0", "60.0", "%", "0.18", "MB", "0.2"],
    ]


def test_the_smallest_file_that_is_enough_is_recommended():
    best = recommended(FOUND, 10_000)
    assert best is FOUND.outcomes[1]
    assert advice(FOUND.now, best) == "near the float network with the smallest file: two"
    alike = recommended(FOUND, 10_000_000)
    assert alike is FOUND.outcomes[2]  # hardly larger, and one rule instead of two
    poor = recommended(FOUND._replace(outcomes=FOUND.outcomes[:1]), 10_000)
    assert advice(FOUND.now, poor) == "none of these makes it usable; the best is: one"
    assert recommended(FOUND._replace(outcomes=FOUND.outcomes[3:]), 10_000) is None
    assert advice(FOUND.now, None) == "nothing that was tried helps"
    assert advice(Judged(14.0, 1.0), best) == (
        "it is near the float network as it is; nearer with little: two"
    )


@pytest.mark.parametrize("rules", [[], ["head=float"]])
def test_options_repeat_the_rules_that_are_given(rules):
    kept = [word for rule in rules for word in ("--rule", rule)]
    two, shortcuts = FOUND.outcomes[1], FOUND.outcomes[3]
    assert options_of(two, rules) == [*kept, "--rule", "body=8", "--rule", "[x] y=8"]
    assert options_of(shortcuts, rules) == ["--layers", "qdrop_8bit_ends_shortcuts"]


def test_a_shell_reads_the_command_as_it_was():
    rules = [word for i in range(9) for word in ("--rule", f"[block {i}].conv*=8")]
    words = ["dfq", "quantize", "my net.pt2", "--no-bn-fallback", "-o", "out", *rules]
    lines = command_lines(words)
    assert max(map(len, lines)) <= 80
    assert len(lines) > 3
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == words


def test_json_has_everything():
    command = ("dfq", "quantize", "net.pth", "-o", "out")
    data = json.loads(json.dumps(to_dict(FOUND, 180_000, command), allow_nan=False))
    assert set(data) == {
        *("images", "output_sqnr_db", "agreement", "bytes", "costs", "remedies"),
        *("recommended", "enough"),
    }
    assert [x["name"] for x in data["costs"]] == ["body", f"{LONG}\n", "stem"]
    one = data["remedies"][0]
    assert set(one) == {
        *("remedy", "output_sqnr_db", "agreement", "bytes", "seconds", "options", "command"),
    }
    assert one["command"] == "dfq quantize net.pth -o out --rule body=8"
    assert (one["bytes"], data["recommended"], data["enough"]) == (181_000, "two", True)


def test_sentences_are_wrapped():
    lines = in_lines("word " * 40, hanging="  ")
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("  word")
    assert lines[1].startswith("    word")
