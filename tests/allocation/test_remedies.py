"""Remedies are the plans that their options make."""

from typing import Any

import pytest

from dfq_jax.allocation.remedies import counts, least_bits, remedies_for
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.quantization.rules import parse_rule
from dfq_jax.quantization.sites import products


def planned(nets, net, scheme, layers: Any = "qdrop_8bit_ends"):
    model = fold_batch_norm(getattr(nets, net)())
    return model, resolve(model.graph, scheme, layers)


def options(remedy):
    return dict(zip(remedy.options[::2], remedy.options[1::2], strict=True))


@pytest.mark.parametrize("net", ["tiny", "excite", "vit", "two_heads", "shuffle"])
@pytest.mark.parametrize(
    "layers", ["qdrop_8bit_ends", "brecq_8bit_ends_second_shortcuts", "zsq_all_low"]
)
def test_a_remedy_is_what_its_options_make(net, layers, nets):
    model, plan = planned(nets, net, Scheme(3, 4), layers)
    found = remedies_for(model, plan, [n.name for n in products(model.graph)][::-1])
    assert found
    for remedy in found:
        rules = [parse_rule(text) for text in remedy.rules]
        asked: Any = options(remedy).get("--layers", layers)
        wanted = resolve(model.graph, plan.scheme, asked, rules)
        assert remedy.plan.table == wanted.table, remedy.name
        groups = lambda p: {(t, frozenset(sites)) for t, sites in p.groups}
        assert groups(remedy.plan) == groups(wanted)


def test_what_is_tried(nets):
    model, plan = planned(nets, "tiny", Scheme(3, 4))
    found = remedies_for(model, plan, ["conv2", "fc", "project", "depthwise"])
    assert [remedy.name for remedy in found] == [
        "the worst layer at 8 bits",
        "the 2 worst layers at 8 bits",
        "the worst layer and all activations",
        "the 2 worst layers and all activations",
        "all activations at 8 bits",
        "all weights at 8 bits",
        "everything at 8 bits",
        "shortcuts at 8 bits",
    ]
    assert found[1].rules == ("conv2=8", "project=8")  # fc has 8 bits already


def test_a_scheme_with_fine_activations_has_fewer(nets):
    model, plan = planned(nets, "tiny", Scheme(3, 8))
    names = [r.name for r in remedies_for(model, plan, ["project", "conv2", "depthwise"])]
    assert names == [
        "the worst layer at 8 bits",
        "the 2 worst layers at 8 bits",
        "all weights at 8 bits",
    ]


def test_where_all_have_8_bits_the_worst_stay_in_float(nets):
    for net in ("tiny", "excite", "vit"):
        model, plan = planned(nets, net, Scheme(8, 8))
        worst = [n.name for n in products(model.graph)]
        found = remedies_for(model, plan, worst)
        assert [r.name for r in found][:2] == [
            "the worst layer in float",
            "the 2 worst layers in float",
        ]
        for remedy in found:
            rules = [parse_rule(text) for text in remedy.rules]
            wanted = resolve(model.graph, Scheme(8, 8), rules=rules)
            assert remedy.plan.table == wanted.table
            assert dict(remedy.plan.groups) == dict(wanted.groups)


@pytest.mark.parametrize(
    ("layers", "tried"),
    [(1, [1]), (2, [1]), (3, [1, 2]), (18, [1, 2, 5, 9, 13]), (52, [1, 2, 5, 10, 20, 26, 39])],
)
def test_how_many_layers_are_tried(layers, tried):
    assert counts(layers) == tried


def test_the_fewest_bits_of_a_layer(nets):
    _, plan = planned(nets, "tiny", Scheme(3, 4))
    assert [least_bits(plan, name) for name in ("conv1", "depthwise", "add", "none")] == [
        8,
        3,
        4,
        8,
    ]
