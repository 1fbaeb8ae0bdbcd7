import pytest

from dfq_jax.allocation.choices import space_of
from dfq_jax.errors import PlanError
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.plan import Rule, Site, parse_scheme, resolve

W4A8, W4A4 = parse_scheme("w4a8"), parse_scheme("w4a4")


@pytest.fixture(scope="module")
def graph(nets):
    return fold_batch_norm(nets.tiny()).graph


def names(space):
    return [(c.name, c.weight) for c in space.choices]


def test_ends_are_pinned_and_tensors_are_asked_for(graph):
    kernels = [("depthwise", True), ("project", True), ("conv2", True)]
    assert names(space_of(graph, scheme=W4A8)) == kernels
    tensors = [("relu1", False), ("relu2", False), ("relu3", False)]
    assert names(space_of(graph, scheme=W4A4, tensors=True)) == kernels + tensors
    low = names(space_of(graph, "zsq_all_low", scheme=W4A8))
    assert low == [("conv1", True), *kernels, ("fc", True)]


def test_rules_pin(graph):
    rules = [Rule("project", weight_bits=3), Rule("conv2", keep_float=True)]
    space = space_of(graph, rules=rules, scheme=W4A4, tensors=True)
    assert names(space) == [("depthwise", True), ("relu1", False), ("relu2", False)]
    assert space.rules_for((2, 5, 6))[:2] == tuple(rules)
    eight = space_of(graph, rules=[Rule("depthwise", input_bits=8)], scheme=W4A4, tensors=True)
    assert ("relu1", False) not in names(eight)


@pytest.mark.parametrize("net", ["tiny", "vit", "inception", "excite"])
def test_rules_give_every_choice_its_bits_and_nothing_else(net, nets):
    graph = fold_batch_norm(getattr(nets, net)()).graph
    space = space_of(graph, scheme=W4A4, tensors=True)
    bits = tuple(space.bits[(3 * i + 1) % 6] for i in range(len(space.choices)))
    table = resolve(graph, W4A4, rules=space.rules_for(bits)).table
    wanted = {site: bits[owner] for site, owner in space.owners.items()}
    assert {site: table[site].grid.bits for site in wanted} == wanted
    plain = resolve(graph, W4A4).table
    rest = plain.keys() - wanted.keys()
    assert {site: table[site] for site in rest} == {site: plain[site] for site in rest}


def test_both_tensors_of_a_product_are_one_choice(nets):
    graph = fold_batch_norm(nets.vit()).graph
    space = space_of(graph, scheme=W4A4, tensors=True)
    (choice,) = [c for c in space.choices if Site("attention0.scores", 0) in c.sites]
    assert Site("attention0.scores", 1) in choice.sites
    assert "attention0.scores" in choice.layers


def test_a_layer_kept_in_float_does_not_come_back(graph):
    """Its input is read by another layer too, whose bits are chosen."""
    rules = [Rule("depthwise", keep_float=True)]
    space = space_of(graph, rules=rules, scheme=W4A4, tensors=True)
    table = resolve(graph, W4A4, rules=space.rules_for([4] * len(space.choices))).table
    assert Site("depthwise") not in table


def test_names_with_wildcards_mean_themselves(nets):
    from dfq_jax.types import InputContract

    builder = nets.Builder(InputContract(6, 6))
    x = builder.conv("first", "images", 3, bias=True)
    x = builder.conv("a[0]", x, 3, bias=True)
    x = builder.conv("a0", x, 3, bias=True)
    graph = builder.done(builder.conv("last", x, 2, bias=True)).graph
    space = space_of(graph, scheme=W4A8)
    table = resolve(graph, W4A8, rules=space.rules_for((2, 6))).table
    assert table[Site("a[0]")].grid.bits == 2
    assert table[Site("a0")].grid.bits == 6


def test_nothing_to_choose_is_an_error(graph):
    with pytest.raises(PlanError, match="pin every layer"):
        space_of(graph, rules=[Rule("*", weight_bits=8)], scheme=W4A8)
    with pytest.raises(PlanError, match="matches no layer"):
        space_of(graph, rules=[Rule("nothing", weight_bits=8)], scheme=W4A8)
