"""Plans of whole networks: transformers, gates, shuffled channels, several outputs."""

from plans import W4A3, edge_bits, kernel_bits

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import ConvTranspose2d
from dfq_jax.numerics.affine import Grid
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.in_float import float_layers
from dfq_jax.quantization.plan import LAYER_PRESETS, Rule, Scheme, Site, resolve
from dfq_jax.quantization.sites import NO_FORM, STREAM, float_operators


def written(graph, scheme=W4A3, **how):
    """{tensor: (bits, edges that read it)} as text."""
    plan = resolve(graph, scheme, **how)
    return {
        tensor: f"{plan.table[sites[0]].grid.bits}: "
        + " ".join(f"{s.node}.{s.argument}" for s in sites)
        for tensor, sites in plan.groups
    }


def test_the_plan_of_a_transformer(nets):
    graph = nets.vit().graph
    moved = ("heads", "order", "q.cut", "q", "k.cut", "k", "v.cut", "v", "scaled")
    wanted = {
        "images": "8: patches.0",
        "patches": "8: tokens.0 joined.1",
        "token": "8: joined.0",
    }
    for i in range(2):
        at = f"attention{i}"
        qkv = [*(f"{at}.{m}.0" for m in moved), f"{at}.scores.1", f"{at}.values.1"]
        wanted |= {
            f"before{i}": f"3: {at}.qkv.0",
            f"{at}.qkv": f"3: {' '.join(qkv)}",
            f"{at}.scaled": f"3: {at}.scores.0",
            f"{at}.weights": f"3: {at}.values.0",
            f"{at}.values": f"3: {at}.back.0 {at}.flat.0 {at}.out.0",
            f"between{i}": f"3: wide{i}.0",
            f"gelu{i}": f"3: narrow{i}.0",
        }
    wanted["last"] = "8: cut.0 first.0 head.0"
    assert written(graph) == wanted
    assert float_operators(graph) == {
        "placed": STREAM,
        **{f"before{i}": NO_FORM for i in range(2)},
        **{f"attention{i}.weights": NO_FORM for i in range(2)},
        **{f"attended{i}": STREAM for i in range(2)},
        **{f"between{i}": NO_FORM for i in range(2)},
        **{f"gelu{i}": NO_FORM for i in range(2)},
        **{f"block{i}": STREAM for i in range(2)},
        "last": NO_FORM,
    }


def test_the_plan_of_convnext(nets):
    wanted = {
        "images": "8: stem.0",
        "stem.norm": "3: depthwise0.0 add0.1",
        "norm0": "3: wide0.0",
        "gelu0": "3: narrow0.0",
        "gain0": "8: scaled0.0",
        "narrow0": "8: scaled0.1",
        "scaled0": "8: add0.0",
        "add0": "3: depthwise1.0",
        "norm1": "3: wide1.0",
        "gelu1": "3: narrow1.0",
        "gain1": "8: scaled1.0",
        "narrow1": "8: scaled1.1",
        "down.norm": "3: down.0",
        "down": "3: depthwise2.0 add2.1",
        "norm2": "3: wide2.0",
        "gelu2": "3: narrow2.0",
        "gain2": "8: scaled2.0",
        "narrow2": "8: scaled2.1",
        "scaled2": "8: add2.0",
        "add2": "8: pool.0",
        "last": "8: fc.0",
    }
    graph = nets.convnext().graph
    assert written(graph) == wanted  # add1 is read by a layer norm: nothing is quantized for it
    assert [k for k, v in float_operators(graph).items() if v == STREAM] == ["add1"]


def test_the_plan_of_squeeze_and_excite(nets):
    graph = fold_batch_norm(nets.excite()).graph
    wanted = {
        "images": "8: stem.0",
        "stem": "8: stem.act.0",
        "stem.act": "3: expand0.0 add0.1",
        "pool": "8: fc.0",
    }
    for i, residual in ((0, "3: expand1.0 add1.1"), (1, "8: pool.0")):
        wanted |= {
            f"expand{i}": f"8: expand{i}.act.0",
            f"expand{i}.act": f"3: depthwise{i}.0",
            f"depthwise{i}": f"8: depthwise{i}.act.0",
            f"depthwise{i}.act": f"8: pool{i}.0 excite{i}.0",
            f"pool{i}": f"3: reduce{i}.0",
            f"reduce{i}.act": f"3: restore{i}.0",
            f"restore{i}": f"8: gate{i}.0",
            f"gate{i}": f"8: excite{i}.1",
            f"excite{i}": f"3: project{i}.0",
            f"project{i}": f"8: add{i}.0",
            f"add{i}": residual,
        }
    assert written(graph) == wanted
    assert float_operators(graph) == {}


def test_the_plan_of_shuffled_channels(nets):
    found = written(fold_batch_norm(nets.shuffle()).graph)
    assert found["join0"] == ("3: split0.0 swap0.0 merge0.0 left1.0 right1.0 enter1.0 join1.0")


def test_products_have_the_bits_of_activations(nets):
    graph = nets.vit().graph
    for layers in LAYER_PRESETS:
        if layers.startswith("zsq"):
            continue
        bits = edge_bits(resolve(graph, Scheme(2, 5), layers))
        scores = (bits["attention1.scores.0"], bits["attention1.scores.1"])
        assert (*scores, bits["attention1.values.0"]) == (5, 5, 5)
        assert bits["head.0"] == 8
    for layers in ("zsq_all_low", "zsq_all_rectified"):
        low = resolve(graph, W4A3, layers)
        assert edge_bits(low) == {}  # nothing is rectified
        assert len(kernel_bits(low)) == 10


def test_rules_reach_products(nets):
    rules = [Rule("*.scores", keep_float=True), Rule("attention1.values", input_bits=6)]
    bits = edge_bits(resolve(nets.vit().graph, W4A3, rules=rules))
    assert "attention0.scores.0" not in bits
    assert "attention0.scaled.0" in bits  # `qkv` is quantized for the other product
    assert (bits["attention1.values.0"], bits["attention1.values.1"]) == (6, 6)


def test_every_output_has_its_last_layer(nets):
    plan = resolve(fold_batch_norm(nets.two_heads()).graph, W4A3)
    assert kernel_bits(plan) == {"stem": 8, "conv": 4, "classes": 8, "number": 8}


def test_transposed_convolutions(nets):
    table = resolve(fold_batch_norm(nets.unet()).graph, W4A3).table
    assert table[Site("up1")].grid == Grid(4, axis=-1)
    assert table[Site("up3")].grid == Grid(4, axis=None)  # grouped
    graph = Graph((Node("t", ConvTranspose2d(groups=2), ("x",)),), ("x",), ("t",))
    kernel = resolve(graph, W4A3).table[Site("t")]
    assert kernel.grid == Grid(8, symmetric=True, axis=None)


def test_reasons_for_float(nets):
    graph = nets.vit().graph
    assert float_layers(graph, resolve(graph, W4A3)) == {}
    rules = [Rule("wide0", keep_float=True), Rule("attention0.values", keep_float=True)]
    ruled = float_layers(graph, resolve(graph, W4A3, rules=rules))
    reason = "a rule keeps it in float"
    assert ruled == {"attention0.values": reason, "wide0": reason}
    graph = fold_batch_norm(nets.excite()).graph
    low = float_layers(graph, resolve(graph, W4A3, "zsq_all_low", [Rule("fc", keep_float=True)]))
    unread = "zsq_all_low: its input is not behind a ReLU"
    assert low.pop("fc") == reason
    assert set(low.values()) == {unread}
    assert "restore0" not in low  # the one behind a ReLU
